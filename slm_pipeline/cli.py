"""Command line: ``slm [group=option] [key=value] ...``. See ``slm --help``.

Nothing heavy is imported here, so that help, tab completion and ``dry_run=true`` answer at once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.main import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig

from slm_pipeline import __version__, config
from slm_pipeline.config import COMPOSITION_ERRORS, help_page
from slm_pipeline.errors import Terminated, UserError, did_you_mean, printable
from slm_pipeline.jobs import study
from slm_pipeline.jobs.command_line import check_command_line, run_inside_hydra, set_environment, use_plugins
from slm_pipeline.machine import ranks, signals, together

VERSION = f"slm_pipeline {__version__}"

_error_of_single_run: list[UserError] = []


@hydra.main(version_base="1.3", config_path=str(config.CONF_DIR), config_name="config")
def _hydra_main(composed: DictConfig) -> float | None:
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    be_heard_or_not()
    try:
        return run_inside_hydra(composed, sys.argv[1:])
    except UserError as error:
        if multirun:
            raise
        _error_of_single_run.append(error)  # past Hydra, which would print a line of its own before ours
        return None


def main() -> None:
    """Console entry point. Exit status 0, 2 for a user's error (one ``error:`` line), 1 for anything else."""
    be_heard_or_not()
    with errors_in_one_line():
        place = ranks.read_environment()
    if place is not None and place.rank:
        together.be_quiet()
    set_environment()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries among themselves: nothing a user can do
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors reach us instead of being printed by Hydra
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
    if "--version" in sys.argv[1:]:
        print(VERSION)
        return
    with errors_in_one_line():
        arguments = _read_command_line()
    if arguments.help:
        with errors_in_one_line():
            use_plugins(arguments.overrides)
            print(help_page.text(arguments.config_dir), flush=True)
        return
    if place is not None and place.rank:
        _follow(arguments)
        return
    with errors_in_one_line():
        use_plugins(arguments.overrides)
        if not _only_asks_hydra(arguments) and check_command_line(arguments):
            return
        with study.reported(), _foreign_errors_explained():
            _hydra_main()
        if _error_of_single_run:
            raise _error_of_single_run.pop()


def _no_flag(word: str, flags: list[str]) -> str:
    key, _, value = word.lstrip("-").partition("=")
    key = key.replace("-", "_")
    is_option = key.partition(".")[0] in config.Config.__dataclass_fields__ or (config.CONF_DIR / key).is_dir()
    near = "" if is_option else did_you_mean(word, flags)
    value = value or ("true" if key in ("dry_run", "pictures") else "VALUE")
    as_option = f", such as {key}={value}" if is_option else ""
    return f"{word} is no flag of slm{near}; options are written without dashes{as_option}; see slm --help"


def _follow(arguments: Namespace) -> None:
    """What a process that torchrun or srun started beside the first does: it checks the command line, then what the
    first one calls for. Signals end it at once: it has nothing to lose, and the first one says so."""
    refused = None
    try:
        use_plugins(arguments.overrides)
        if _only_asks_hydra(arguments) or check_command_line(arguments):
            return
    except UserError as error:
        refused = error
    except COMPOSITION_ERRORS as error:
        refused = UserError(config.one_line(error))
    together.follow(refused)


def _read_command_line() -> Namespace:
    """The flags, wherever they stand among the overrides. Hydra wants them side by side: so they are from now on.

    Raises:
        UserError: there is no such flag.
    """
    parser = get_args_parser()
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        raise UserError(_no_flag(unknown[0], list(parser._option_string_actions)))
    waiting = list(arguments.overrides)
    flags = []
    for word in sys.argv[1:]:
        if waiting and word == waiting[0]:
            waiting.pop(0)
        else:
            flags.append(word)
    sys.argv[1:] = [*flags, *arguments.overrides]
    return arguments


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print a user's error as one line and exit with status 2; let a defect of ours show its traceback.

    SIGTERM ends what runs inside as Ctrl-C does, with status 143. Output that nobody takes is no error.
    """
    be_heard_or_not()
    try:
        with signals.raised():
            yield
    except UserError as error:
        _fail(str(error))
    except COMPOSITION_ERRORS as error:
        _fail(config.one_line(error))
    except BrokenPipeError:  # the reader of our output has seen enough, as in `slm dry_run=true | head -3`
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT):
            raise
        place = error.filename or ("standard output" if _cannot_print() else "output_dir")
        _fail(f"{place}: {error.strerror}; nothing unfinished is taken for a result")
    except Terminated:
        _fail("ended by SIGTERM; the same command goes on from here", status=143)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal's own ^C, or a bar, stands on this line
        _fail("interrupted; the same command goes on from here", status=130)
    finally:
        _flush()


def be_heard_or_not() -> None:
    """What a terminal cannot show is spelt out; closed output or a log that cannot be written stops nobody."""
    logging.raiseExceptions = False
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _cannot_print() -> bool:
    """Whether standard output takes not even an empty line: the error of a `print` does not say whose it is."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _flush() -> None:
    """Now, as Python would at its end: a closed pipe or a full disk would change the exit status then."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _foreign_errors_explained() -> Iterator[None]:
    """Say in our words why Optuna or joblib ended a multirun with an error of its own."""
    try:
        yield
    except BrokenProcessPool as error:
        found = re.search(r"exit codes of the workers are \{(.+)\}", str(error))
        if not found:
            raise UserError(f"joblib ended the study: {' '.join(str(error).split())}") from error
        memory = " for want of memory, perhaps," if "SIGKILL" in found[1] else ""
        raise UserError(
            f"a worker process was killed{memory} ({found[1]}) and took the study with it: the same command runs what"
            " is missing; hydra/launcher=slurm_local goes on without the job that was killed"
        ) from error
    except ValueError as error:
        if str(error) in ("Record does not exist.", "No trials are completed yet."):
            raise UserError(
                "no trial of the search has succeeded so far; each said why, above and in its table"
            ) from error
        if "does not support dynamic value space" in str(error):
            raise UserError(
                "the search has trials with other choices than these; a name of its own makes it another search:"
                " name=search_2"
            ) from error
        raise


def _only_asks_hydra(arguments: Namespace) -> bool:
    """Whether the flags ask for something that runs no job: --cfg, --info, completion, version."""
    names = ("cfg", "info", "shell_completion", "hydra_help", "experimental_rerun")
    return any(getattr(arguments, name, None) for name in names)


def _fail(message: str, status: int = 2) -> NoReturn:
    with suppress(OSError):
        print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(status)
