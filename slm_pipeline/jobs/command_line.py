"""From a command line to a checked job, or a checked study: what happens before Hydra makes a folder. No torch."""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from slm_pipeline import config
from slm_pipeline.config import COMPOSITION_ERRORS, plugins
from slm_pipeline.config.overrides import (
    asks_for_several_jobs,
    check_added_measures,
    check_group,
    first_value,
    parse_overrides,
    refusal,
)
from slm_pipeline.errors import UserError, did_you_mean
from slm_pipeline.jobs import study
from slm_pipeline.machine import gpus, ranks
from slm_pipeline.store import run_folder
from slm_pipeline.store.files import LONGEST_NAME

if TYPE_CHECKING:
    from slm_pipeline.jobs.job import Job

config.register()
# groups of which one option is chosen
_ONE_OPTION = (
    "model", "pruning_ratio", "threshold", "method", "calibration", "repair", "recovery", "evaluation", "tracker",
)  # fmt: skip


def set_environment() -> None:
    """Set what conf/ reads from the environment: where sweeps/ are (the user's own folder, then the ones shipped with
    the package), and how many GPUs this host has."""
    shipped = str(config.SWEEPS_ROOT)
    os.environ["SLM_SHIPPED_SWEEPS"] = shipped
    os.environ["SLM_USER_SWEEPS"] = str(Path.cwd()) if Path("sweeps").is_dir() else shipped
    os.environ["SLM_NUM_GPUS"] = str(len(gpus.visible()))


def use_plugins(overrides: Sequence[str]) -> None:
    """Import what ``plugins=`` names, and what is installed: before anything is composed, for they bring options."""
    named: list[str] = []
    for item in parse_overrides([word for word in overrides if re.match(r"\+{0,2}plugins=", word)]):
        value = item.value()
        if item.is_sweep_override() or not isinstance(value, list):
            text = (item.input_line or "").partition("=")[2]
            raise UserError(f"{item.input_line}: plugins are a list, the same for all jobs: plugins=[{text}]")
        named = [str(name) for name in value]
    plugins.use(named)


def check_command_line(arguments: Namespace) -> bool:
    """Compose and check before Hydra makes a run folder; whether that was all (``dry_run=true``).

    Of a multirun every job is composed, and the first checked; each is checked when it starts.
    """
    with config_loader(arguments) as loader:
        overrides = parse_overrides(arguments.overrides, loader)
        multirun = arguments.multirun or any(
            item.key_or_group == "hydra.mode" and str(item.value()).upper() == "MULTIRUN" for item in overrides
        )
        for item in overrides:
            if item.is_sweep_override() and not multirun:
                raise UserError(f"{asks_for_several_jobs(item)}; for these add -m: slm -m {item.input_line}")
            check_group(item)
        composed = composed_of(arguments, [first_value(item) for item in overrides])
        from slm_pipeline.jobs.job import make_output_root

        if multirun and (place := ranks.launched()) is not None:
            raise UserError(
                f"{place.launcher} starts {place.count} processes for one job; a study (-m) starts its own:"
                " hydra/launcher=slurm or gpus, without " + place.launcher
            )
        if multirun:
            _check_study(composed, overrides)
            task = [item.input_line or "" for item in overrides if not item.is_hydra_override()]
            listed = study.jobs(composed, task, loader)
            if composed.dry_run:
                _describe_study(composed, arguments, loader)
            else:
                study.check_composed(composed, listed, loader)
            study.check_folders(composed, listed, loader)
            if composed.dry_run:
                return True
        else:
            _check_not_a_study(composed, overrides)
            if check_run(composed, sys.argv[1:]):
                return True
        make_output_root(composed.output_dir)
        return False


def _check_hydra_options(hydra: DictConfig) -> None:
    """Raise `UserError` for what Hydra would do, but a run is not made for."""
    if hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true would look for the paths of the configuration in the folder of each run; leave it"
            " out: a run writes into its folder anyway, and paths start where you do"
        )
    if hydra.output_subdir != ".hydra":
        raise UserError(f"hydra.output_subdir={hydra.output_subdir}: reports look for .hydra; leave it out")
    name = str(hydra.job.name)
    if not name.isprintable() or "/" in name or len(os.fsencode(f"{name}.log")) > LONGEST_NAME:
        raise UserError(f"hydra.job.name={name[:300]!r} must do as the name of a file, that of the run's log")


def check_run(composed: DictConfig, words: Sequence[str]) -> bool:
    """Check a single run and its folder; whether that was all. ``words``: of the command line."""
    from slm_pipeline.jobs.job import check_output_root
    from slm_pipeline.jobs.steps import describe_plan, plan, preflight

    _check_hydra_options(composed.hydra)
    job = _job(composed, words)
    run_dir = study.folder(composed, "hydra.run.dir")
    check_output_root(str(run_dir), option="hydra.run.dir")
    run_folder.check_run(run_dir, "hydra.run.dir", beginnings=())
    run_folder.check_outside(run_dir, job.store, "hydra.run.dir")
    if job.config.dry_run:
        print(describe_plan(job), flush=True)
        return True
    plan(job)
    if os.path.lexists(run_dir / run_folder.SUMMARY):  # Hydra would describe it anew even if this run is refused then
        preflight(job)
    return False


def _check_study(composed: DictConfig, overrides: Sequence[Override]) -> None:
    """Raise `UserError` for what no job of a multirun could say by itself."""
    from slm_pipeline.jobs.job import check_output_root

    _check_hydra_options(composed.hydra)
    check_output_root(str(study.folder(composed, "hydra.sweep.dir")), option="hydra.sweep.dir")
    if composed.hydra.runtime.choices["hydra/launcher"] == "gpus":
        gpus.check(composed.hydra.launcher.n_jobs)
    if str(composed.hydra.launcher.get("_target_")).endswith("RayLauncher") and not find_spec(
        "hydra_plugins.hydra_ray_launcher"
    ):
        raise UserError("hydra/launcher=ray needs hydra-ray-launcher: pip install 'slm-pipeline[ray]'")
    if not study.is_search(composed):
        return
    if composed.objective.metric is None:
        raise UserError("a search needs objective.metric=, such as pruned/perplexity/bundled; see sweeps/search.yaml")
    for item in overrides:
        if isinstance(item.value(), Glob):
            names = ",".join(item.sweep_string_iterator())
            raise UserError(f"{item.input_line}: a search chooses from a list, {item.key_or_group}=choice({names})")


def _check_not_a_study(composed: DictConfig, overrides: Sequence[Override]) -> None:
    """Raise `UserError` for a study without -m, unless all its axes have a value: that is how one of its jobs runs."""
    name = composed.hydra.runtime.choices.get("sweeps")
    axes = {axis.lstrip("+") for axis in composed.hydra.sweeper.get("params") or {}}
    if name and (without_value := sorted(axes - {item.key_or_group for item in overrides})):
        raise UserError(
            f"sweeps={name} is a study, of which one job needs a value for {', '.join(without_value)}; for all of them"
            f" add -m: slm -m sweeps={name}"
        )


def _describe_study(composed: DictConfig, arguments: Namespace, loader: ConfigLoader) -> None:
    """Print each job of a multirun and what it would do; `UserError` if one would fail."""
    from slm_pipeline.jobs.steps import describe_plan, plan

    here = composed.hydra.runtime.choices["hydra/launcher"] != "slurm"
    if study.is_search(composed):
        print(_describe_search(composed), flush=True)
    failures = 0
    said: dict[Path, str] = {}
    listed = study.jobs(composed, arguments.overrides, loader)
    for number, overrides in enumerate(listed):
        print(f"#{number} {study.own(overrides, listed)}".rstrip(), flush=True)
        try:
            job = _job(composed_of(arguments, overrides), overrides, runs_here=here)
            print(describe_plan(job, said), flush=True)
            for _, artifact in plan(job):
                if artifact is not None:
                    said.setdefault(artifact.path, f"#{number}")
        except UserError as error:
            failures += 1
            print(f"would fail: {error}", flush=True)
        except COMPOSITION_ERRORS as error:
            failures += 1
            print(f"would fail: {config.one_line(error)}", flush=True)
    if failures:
        raise UserError(f"{failures} of {len(listed)} jobs would fail, see above")


def compose_job(
    program: Sequence[str],
    overrides: Sequence[str],
    defaults: Sequence[str] = (),
    config_dir: str | os.PathLike[str] | None = None,
) -> Job:
    """The job of another console script that takes overrides as ``slm`` does, checked.

    Args:
        program: the words of the command line before the overrides, such as ``["slm-bench", "search"]``.
        defaults: overrides that the user's own may override.
        config_dir: a folder with options of the user's own, as ``--config-dir``.

    Raises:
        UserError: for anything that can be known without loading the model.
    """
    set_environment()
    arguments = Namespace(config_dir=config_dir, config_name=None)
    use_plugins(overrides)
    with config_loader(arguments) as loader:
        for item in parse_overrides(overrides, loader):
            if item.is_sweep_override():
                raise UserError(f"{asks_for_several_jobs(item)}; {' '.join(program)} runs one")
            check_group(item)
        return _job(composed_of(arguments, [*defaults, *overrides]), overrides, program)


@contextmanager
def config_loader(arguments: Namespace) -> Iterator[ConfigLoader]:
    """What Hydra itself will load configurations with, ``--config-dir`` included; `composed_of` works inside."""
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise UserError(f"--config-dir={arguments.config_dir} is not a folder")
    with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF_DIR)):
        loader: Any = GlobalHydra.instance().config_loader()
        if arguments.config_dir:
            path = f"file://{Path(arguments.config_dir).absolute()}"
            loader.get_search_path().prepend("command-line", path, anchor="schema")
            loader.repository.initialize_sources(loader.get_search_path())
        yield loader


def composed_of(arguments: Namespace, overrides: list[str]) -> DictConfig:
    """What Hydra composes of the overrides, with its own part; `UserError` where it cannot. Inside `config_loader`."""
    try:
        composed = compose(arguments.config_name or "config", overrides=overrides, return_hydra_config=True)
    except COMPOSITION_ERRORS as error:
        raise UserError(_with_the_nearest_key(refusal(error))) from error
    except YAMLError as error:
        raise UserError(f"a YAML file cannot be read: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError, RecursionError, AssertionError) as error:  # not all are Hydra's own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot read the overrides {overrides}: {reason}") from error
    if unknown := set(composed.plugins or []) - {plugin.name for plugin in plugins.in_use()}:
        raise UserError(
            f"plugins=[{','.join(sorted(map(str, unknown)))}] stands in a file; what it brings must be known before a"
            " file is read: name it on the command line, or give the package an entry point"
        )
    if several := [group for group in _ONE_OPTION if group not in composed.hydra.runtime.choices]:
        raise UserError(
            f"a file chooses several options of {several[0]}, which Hydra would lay over one another; choose one"
        )
    others = [word for word in overrides if not word.startswith("+measure=")]
    if len(others) < len(overrides):
        before = compose(arguments.config_name or "config", overrides=others)
        check_added_measures(before.evaluation, composed.evaluation)
    return composed


def _with_the_nearest_key(message: str) -> str:
    """A message about a key that nobody has, with those that it nearly is."""
    found = re.match(r"Could not override '([\w.]+)'", message)
    if found is None:
        return message
    key = found[1]
    container: Any = OmegaConf.to_container(compose("config"), resolve=False)
    near = did_you_mean(key, _keys(container)) or did_you_mean(key.rpartition(".")[2], _keys(container))
    return f"{found[0]}{near}{message[found.end() :]}"


def _keys(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """The whole names of all keys in a configuration."""
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{name}.")


def _describe_search(composed: DictConfig) -> str:
    sweeper = composed.hydra.sweeper
    space = "".join(f"\n  {key}={value}" for key, value in (sweeper.params or {}).items())
    return (
        f"{sweeper.n_trials} trials, {sweeper.n_jobs} at a time, to {composed.objective.direction}"
        f" {composed.objective.metric}, added to the search '{sweeper.study_name}' in {sweeper.storage}, over{space}"
        "\nwhich values they try is known only when the earlier ones are done; one corner of it as an example:"
    )


def _job(
    composed: DictConfig, overrides: Sequence[str], program: Sequence[str] = ("slm",), *, runs_here: bool = True
) -> Job:
    from slm_pipeline.jobs.job import prepare

    return prepare(config.to_config(composed), shlex.join([*program, *overrides]), runs_here=runs_here)


def run_inside_hydra(composed: DictConfig, words: Sequence[str]) -> float | None:
    """The job that Hydra has composed and made a folder for; its objective. ``words``: of the command line."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    option = "hydra.sweep.subdir" if hydra_config.mode == RunMode.MULTIRUN else "hydra.run.dir"
    run_folder.check_run(run_dir, option, run_folder.beginnings(hydra_config))
    with run_folder.running(run_dir):
        from slm_pipeline.jobs.runner import run_job

        return run_job(composed, words)
