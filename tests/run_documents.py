"""Every command that README and docs show, run at a small size: python tests/run_documents.py [--only WORD].

test_documents.py composes all of them and test_commands.py runs one of each kind; this runs all, in some fifteen
minutes on a CPU, without a model hub. Each command keeps its own words; general rules add or change some:

- a model of a name becomes a random one of that name, ten layers deep; FOLDER and other paths are there
- texts and instructions that come with pip stay, those of the hub become files; little of either is read
- two examples a task, from files; one training step, one timed run; without a GPU no captured graphs
- a study has the first and the last value of each parameter, a search two trials
- RUN, DIR and TIME are the newest that an earlier command left; what reads results comes after what makes them
- RUN of `slm-export padded` is the newest whose layers differ; what an export wrote is gone before the next one

All of them start in one temporary folder, as somebody would who tries them one after the other. A line for each: ok and
seconds, or the last line of the error. Exit status 1 if one failed. The tutorial's are in test_tutorial.py.
"""

from __future__ import annotations

import argparse
import functools
import gc
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from unittest import mock

import torch
import yaml
from conftest import Outcome, run_slm
from hydra.core.override_parser.overrides_parser import OverridesParser
from model_folders import save
from own_tasks import write as write_lm_eval_tasks
from shown_commands import COMMANDS, REPOSITORY
from small_pipeline import write_data
from task_rows import TASK_ROWS
from test_documents import write_files
from transformers import AutoModelForCausalLM

from slm_pipeline.assets import texts
from slm_pipeline.errors import UserError
from slm_pipeline.export import exported
from slm_pipeline.models.architectures import PRUNED

LIMIT_S = 600  # of one command

LEFT_OUT = {
    r"hydra/launcher=slurm": "needs a Slurm cluster",
    r"hydra/launcher=ray": "needs Ray",
    r"^slm-export hub (?!.*--dry-run)": "uploads to a model hub",
    **({} if torch.cuda.is_available() else {r"model\.device=balanced": "needs GPUs"}),
}
PADDED = "padded"
READ_RESULTS = ("slm-report", "slm-study", "slm-export", "slm-store")

RANDOM_MODEL = [
    *("model.source=random", "model.repo=null", "model.architecture=llama", "model.num_layers=10"),
    *("model.hidden_size=64", "model.intermediate_size=128", "model.num_heads=4", "model.num_kv_heads=2"),
    *("model.vocab_size=300", "model.seed=1234"),
]
# Options that are there whatever is chosen; of several that are given the last counts.
LITTLE = [
    *("calibration.num_samples=8", "calibration.seq_len=32"),
    *("repair.calibration.num_samples=8", "repair.calibration.seq_len=32"),
    *("recovery.num_examples=8", "recovery.validation_size=2", "recovery.max_steps=1", "recovery.eval_steps=1"),
    *("recovery.batch_size=2", "recovery.micro_batch_size=1", "recovery.cutoff_len=1024"),  # bytes are many tokens
    *("evaluation.data=FOLDER", "evaluation.limit=2", "evaluation.batch_size=2"),
    *("evaluation.perplexity.window=128", "evaluation.perplexity.max_tokens=512"),
    *("evaluation.fidelity.window=128", "evaluation.fidelity.max_tokens=512"),
    *("evaluation.efficiency.num_runs=2", "evaluation.efficiency.num_warmup=0", "evaluation.efficiency.output_len=2"),
    *("evaluation.efficiency.grid=[2x4+2]", "pictures=false", "tracker=jsonl"),
]
# A word of the command, or of the option that it chooses -> what takes its place, or comes in addition.
IN_PLACE = {
    r"calibration=(bookcorpus|c4|slimpajama|wikitext2)": ["calibration=text_file", "calibration.path=book.txt"],
    r"experiment=lora_alpaca": ["experiment=lora_alpaca", "recovery.source=file", "recovery.path=alpaca.json"],
    r"evaluation\.lm_eval\.tasks=.*": [
        *("evaluation.lm_eval.tasks=[both,sums]", "evaluation.lm_eval.include_path=lm_eval_tasks"),
    ],
    r"evaluation\.lm_eval\.num_fewshot=\d+": ["evaluation.lm_eval.num_fewshot=1"],
    r"(evaluation\.efficiency|pruning_ratio)\.mode=graph": [] if not torch.cuda.is_available() else [r"\g<0>"],
    r"recovery\.num_processes=\d+": ["recovery.num_processes=2"],
    r"(method|sweeps)=joint": [r"\g<0>", "method.transfers=2", "method.swaps=1"],
    r"sweeps=search": ["sweeps=search", "hydra.sweeper.n_trials=2"],
    r"hydra\.sweeper\.n_jobs=\d+": ["hydra.sweeper.n_jobs=2"],
    r"hydra\.launcher\.n_jobs=\d+": ["hydra.launcher.n_jobs=2"],
}


def small(command: str) -> tuple[str, list[str]]:
    """The program, and its words at a small size."""
    program, *words = shlex.split(command)
    if program == "slm-export" and words[0] == "padded":
        words = [newest_custom() if word == "RUN" else word for word in words]
    if program in READ_RESULTS:
        return program, [found(word) for word in words]
    if program == "slm-fetch" or any(word.startswith("--") for word in words):
        return program, words
    study = "-m" in words
    if study:
        words = [*of_sweeps(words), *map(first_and_last, words)]
    words = [changed for word in words for changed in replaced(word)]
    if not torch.cuda.is_available():
        words.append("evaluation.efficiency.mode=eager")
    if words[0] == "similarity":
        words.append("analysis.minibatch=4")
    if "model=local" not in words:
        words += RANDOM_MODEL
    return program, [*words, *LITTLE]


def replaced(word: str) -> list[str]:
    for pattern, others in IN_PLACE.items():
        if match := re.fullmatch(pattern, word):
            return [match.expand(other) for other in others]
    return [word]


def first_and_last(word: str) -> str:
    """``key=a,b,c`` as ``key=a,c``; any other word as it is."""
    if "=" not in word:
        return word
    item = OverridesParser.create().parse_override(word)
    if not item.is_choice_sweep():
        return word
    values = list(item.sweep_string_iterator())
    return f"{item.get_key_element()}={','.join(dict.fromkeys([values[0], values[-1]]))}"


def of_sweeps(words: list[str]) -> list[str]:
    """The parameters of the study that is named, cut; those that the command sets itself are left out."""
    files = [REPOSITORY / f"sweeps/{word.removeprefix('sweeps=')}.yaml" for word in words if word.startswith("sweeps=")]
    swept = [yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"] for file in files]
    own = {word.partition("=")[0] for word in words}
    cut = [first_and_last(f"{key}={' '.join(str(value).split())}") for params in swept for key, value in params.items()]
    return [word for word in cut if word.partition("=")[0] not in own and "(" not in word]  # ( : a search's own


def found(word: str) -> str:
    """A word with the newest folder in the place of a name that stands for one."""
    if word == "RUN":
        return runs_with_a_model()[-1]
    if word == "DIR":
        return newest("outputs/sweeps/*/*")
    if word == "FOLDER":  # --out FOLDER
        return PADDED
    if word.endswith("/TIME"):
        return newest(word.replace("TIME", "*")) or newest(re.sub(r"\w+/TIME", "*/*", word))
    return word


def newest(pattern: str) -> str:
    return next(reversed(by_time(pattern)), "")


def by_time(pattern: str) -> list[str]:
    """Those that fit, the newest last."""
    return [str(path) for path in sorted(Path().glob(pattern), key=lambda path: path.stat().st_mtime)]


def runs_with_a_model() -> list[str]:
    """Their folders, the newest last."""
    return [card.removesuffix("/model_card.md") for card in by_time("outputs/runs/slm/*/model_card.md")]


def newest_custom() -> str:
    """The newest run whose model is of no stock class."""
    for run in reversed(runs_with_a_model()):
        with suppress(UserError):  # its model may be gone
            if str(exported.find(Path(run)).description["model_type"]).startswith(PRUNED):
                return run
    return "RUN"


def remove_exports() -> None:
    """What an earlier `slm-export` wrote, for it overwrites nothing."""
    for file in Path().glob("*.gguf"):
        file.unlink()
    shutil.rmtree(PADDED, ignore_errors=True)


def write_all(folder: Path) -> None:
    """What the commands name: texts, rows, a package, model folders; and runs and a study, for what reads them."""
    write_files(folder)
    data = write_data(folder / "data")
    text = (data / "text.txt").read_text(encoding="utf-8") * 5
    for name in ("book.txt", "notes.txt", "WIKITEXT2"):
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("FOLDER", "llama2_7b"):
        save(folder / name, "llama", num_hidden_layers=10, intermediate_size=64)
        stored = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16)
        stored.save_pretrained(folder / name)  # as models of the hub are, and conf/model/local.yaml expects
    for task, row in TASK_ROWS.items():
        first = next(iter(row))
        rows = [json.dumps({**row, first: f"{row[first]} {number}"}) for number in range(6)]
        (folder / "FOLDER" / f"{task}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    write_lm_eval_tasks(folder / "lm_eval_tasks")
    for command in (
        "slm method=flap method.export=custom recovery=none evaluation=perplexity",  # the newest of `slm` is the next
        "slm recovery=none evaluation=perplexity",
        "slm -m recovery=none pruning_ratio=r10,r20",
    ):
        outcome = run(*small(command))
        assert outcome.status == 0, outcome.err
    shutil.copyfile(Path(newest("outputs/runs/slm/*")) / "plan.json", "plan.json")


class TooLong(BaseException):
    pass


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(program: str, words: list[str]) -> Outcome:
    """Run it in this process."""
    if program == "slm":
        return run_slm(*words)
    out, err, status = io.StringIO(), io.StringIO(), 0
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with mock.patch.object(sys, "argv", [program, *words]), redirect_stdout(out), redirect_stderr(err):
            import_module(f"slm_pipeline.commands.{program.removeprefix('slm-')}").main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return Outcome(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        problem: what went wrong, in a line; None if nothing did.
    """

    seconds: float
    problem: str | None


def ended(command: str) -> Ended:
    started = time.monotonic()
    try:
        with within(LIMIT_S):
            remove_exports()
            outcome = run(*small(command))
    except (Exception, TooLong) as error:
        last = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        return Ended(time.monotonic() - started, last)
    if outcome.status in (130, 143):  # Ctrl-C, SIGTERM: they answer these themselves
        sys.exit(outcome.status)
    problem = None
    said = outcome.out + outcome.err
    if outcome.status != 0:
        problem = next((line for line in reversed(said.splitlines()) if line.strip()), f"status {outcome.status}")
    elif not command.startswith(READ_RESULTS) and (bad := re.search(r".*(would fail|FAILED).*", said)):
        problem = bad[0]
    elif not outcome.out and command != "slm-fetch":
        problem = "it said nothing"
    return Ended(time.monotonic() - started, problem)


def alone_on_the_console(folder: Path) -> Callable[[str], None]:
    """Prints a line; what processes of the commands say goes to a file of the folder instead."""
    console = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with (folder / "said.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
    return lambda line: print(line, file=console, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="commands that have this in them")
    parser.add_argument("--keep", action="store_true", help="keep the folder with what they left")
    options = parser.parse_args()
    commands = [command for command in COMMANDS if options.only in command]
    commands.sort(key=lambda command: command.startswith(READ_RESULTS))
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # of processes that they start
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="slm_documents_"))
    os.chdir(folder)
    say = alone_on_the_console(folder)
    left_out: dict[str, list[str]] = {}
    failed, ran = 0, 0
    try:
        texts.read_requests = functools.cache(texts.read_requests)  # read again by every stage that shows its text
        write_all(folder)
        gc.collect()
        gc.freeze()  # what has been imported: stages collect garbage, for the models that they held
        for command in commands:
            if reason := next((reason for pattern, reason in LEFT_OUT.items() if re.search(pattern, command)), None):
                left_out.setdefault(reason, []).append(command)
                continue
            end = ended(command)
            ran += 1
            failed += end.problem is not None
            say(f"{'ok    ' if end.problem is None else 'FAILED'} {end.seconds:6.1f} s  {command}")
            if end.problem is not None:
                say(f"       {end.problem}")
    finally:
        os.chdir(REPOSITORY)
        if options.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"{ran} ran, {failed} failed, {sum(map(len, left_out.values()))} left out")
    for reason, those in left_out.items():
        say("\n    ".join([f"{reason}:", *those]))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
