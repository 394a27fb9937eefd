"""``slm`` as a user types it: what it refuses and how, what a dry run leaves, where it can be started from."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import run_slm

from slm_pipeline import cli, config
from slm_pipeline.engine.windows import originals
from slm_pipeline.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

REPOSITORY = Path(__file__).resolve().parent.parent
RANDOM = ["model=random", "model.num_layers=6", "model.hidden_size=32", "model.intermediate_size=48"]


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """Overrides of a small job that needs no download and writes to ``tmp_path/out``."""
    (tmp_path / "text.txt").write_text("The river runs past the mill and the tree.\n" * 20)
    return [
        *RANDOM, "calibration=text_file", f"calibration.path={tmp_path}/text.txt", "calibration.num_samples=2",
        "calibration.seq_len=16", "recovery=none", "evaluation=none", "tracker=jsonl", f"output_dir={tmp_path}/out",
    ]  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **extra}


REFUSED = {
    "unknown option": (["method=foo"], ["method=foo: no option of that name", "from_plan", "slm"]),
    "unknown key": (["oops=1"], ["oops", "not in 'Config'"]),
    "unknown key of a group": (["calibration.oops=1"], ["oops", "CalibrationConfig"]),
    "unknown key of a method": (["method.oops=1"], ["method.oops"]),
    "wrong type": (["seed=x"], ["seed=x", "Integer"]),
    "wrong type in a method": (["method.protect_first=x"], ["method.protect_first", "'x'", "Integer"]),
    "a switch for a number": (["seed=true"], ["seed=true", "Integer"]),
    "a fraction for a whole number": (["seed=1.5"], ["seed=1.5", "Integer"]),
    "a float for a whole number": (["evaluation.limit=1e3"], ["evaluation.limit: ", "1000.0", "Integer"]),
    "a list for a number": (["seed=[1]"], ["seed=[1]", "Integer"]),
    "a mapping for a number": (["seed={a:1}"], ["seed={a:1}", "Integer"]),
    "null for what must be": (["seed=null"], ["seed=null", "not Optional"]),
    "a seed that no generator takes": (["seed=-1"], ["seed=-1 must be at least 0 and below 4294967296"]),
    "no number": (["pruning_ratio.ratio=nan"], ["pruning_ratio.ratio=nan must lie in (0, 1)"]),
    "an infinite number": (["pruning_ratio.ratio=1e400"], ["pruning_ratio.ratio=inf must lie in (0, 1)"]),
    "an infinite number in a recovery": (
        ["recovery=lora", "recovery.learning_rate=inf"], ["learning_rate=inf must be a finite number above 0"]),
    "a number of 400 digits": ([f"seed={10**400}"], ["seed=about 10**400 is too large a number"]),
    "a mapping a thousand deep": (
        [f"model.published_thresholds={'{a:' * 1000}1{'}' * 1000}"], ["cannot read", "maximum recursion depth"]),
    "a list in a list": (["stages=[[merge]]"], ["stages=['merge'] is not one value"]),
    "a list hundreds deep": ([f"tracker.tags={'[' * 250}{']' * 250}"], ["tracker.tags", "recursion"]),
    "a number of 5000 digits": ([f"seed={'9' * 5000}"], ["cannot read seed=999", "5000 digits"]),
    "400 digits in a list": ([f"tracker.tags=[{10**400}]"], ["tracker.tags='1000", "has 401 bytes"]),
    "400 digits for a fraction, in a mapping": (
        [f"pruning_ratio={{ratio:{10**400}}}"], ["pruning_ratio is a group, choose one of its options"]),
    "more layers than any model has": (["model.num_layers=1000000000"], ["model.num_layers=1000000000", "10000"]),
    "a model larger than memory": (
        ["model.num_layers=10000", "model.hidden_size=65536"], ["GB and this machine has", "hidden_size smaller"]),
    "a name too long": ([f"name={'n' * 300}"], ["has 300 bytes; at most 200 are allowed"]),
    "a name that a shell takes for a flag": (['name="-n"'], ["name='-n' must be a folder name"]),
    "a control character": (['calibration.path="a\x1b"'], ["control character '\\x1b'"]),
    "a stage twice": (["stages=[merge,merge]"], ["stages=['merge', 'merge'] has 'merge' twice"]),
    "values in a circle": (["name=${digest:name}"], ["name", "recursion"]),
    "no method": (["method=null"], ["method is a group, choose one of its options", "slm"]),
    "a method that is none": (
        ["method._target_=slm_pipeline.methods.base.PruningProblem"], ["is not the class of a method"]),
    "the sizes of another model": (["model=smollm2_135m"], ["model.num_layers=6 needs model=random, not bundled"]),
    "the text of another calibration": (["calibration=bundled"], ["calibration.path=", "needs calibration=text_file"]),
    "a key of other methods": (
        ["method=shortgpt", "method.merge_rule=mean"],
        ["method.merge_rule does not exist for method=shortgpt, only for method=laco, slm"]),
    "a key of another recovery": (
        ["recovery=distill", "recovery.rank=3"],
        ["recovery.rank does not exist for recovery=distill, only for recovery=lora"]),
    "a key nearly right": (["method.merge_rul=mean"], ["method.merge_rul", "did you mean merge_rule?"]),
    "a key of no recovery": (
        ["recovery.max_step=3"],
        ["recovery.max_step does not exist in any option of recovery; did you mean max_steps"]),
    "a path that asks for several jobs": (
        ["calibration.path=a, b"], ["add -m", "as one text it is written 'calibration.path=\"a, b\"'"]),
    "a path that Hydra cannot read": (
        ["calibration.path=/a=b (c)"], ["cannot read", "as one text it is written 'calibration.path=\"/a=b (c)\"'"]),
    "a path with a blank at its end": (["calibration.path=a "], ["are lost", "'calibration.path=\"a \"'"]),
    "a name that is read as a number": (["name=1.10"], ["name=1.10 is read as 1.1", "'name=\"1.10\"'"]),
    "ratio above 1": (["pruning_ratio.ratio=1.2"], ["pruning_ratio.ratio=1.2", "(0, 1)"]),
    "ratio that leaves no layer": (
        ["pruning_ratio.ratio=0.9"], ["0.9 of 6 layers leaves 1", "at least 3 must be left"]),
    "more layers kept than there are": (
        ["pruning_ratio=layers", "pruning_ratio.num_layers=6"], ["pruning_ratio.num_layers=6", "6 layers"]),
    "threshold above 1": (
        ["threshold=fixed", "threshold.value=1.5", "pruning_ratio=none"], ["threshold.value=1.5", "[0, 1]"]),
    "fixed without a value": (["threshold=fixed", "pruning_ratio=none"], ["needs a value", "threshold.value=0.8"]),
    "a value without fixed": (["threshold.value=0.8"], ["threshold.value=0.8", "threshold=fixed"]),
    "no target": (["pruning_ratio=none"], ["method=slm needs a target", "pruning_ratio"]),
    "published with none known": (["threshold=published"], ["model=random", "r20", "none is known"]),
    "ratio for no pruning": (
        ["method=none", "pruning_ratio=r20"], ["method=none takes no pruning ratio", "pruning_ratio=none"]),
    "threshold for no pruning": (
        ["method=none", "threshold=fixed", "threshold.value=0.8"], ["method=none has no threshold", "threshold=auto"]),
    "missing file": (["calibration.path=nowhere.txt"], ["calibration.path='nowhere.txt'", "does not exist"]),
    "text too short": (["calibration.num_samples=1000"], ["bytes", "calibration.num_samples=1000", "needs 16000"]),
    "no next token": (
        ["method=sleb", "calibration.seq_len=1"], ["calibration.seq_len=1", "at least 2", "method=sleb"]),
    "a map that cannot be folded": (
        ["method=replaceme", "model.architecture=gemma3_text"], ["method=replaceme", "a norm follows"]),
    "unknown target module": (
        ["recovery=lora", "recovery.target_modules=[w1]"], ["recovery.target_modules", "'w1'", "down_proj"]),
    "unknown architecture": (["model.architecture=rwkv"], ["'rwkv'", "supported", "llama"]),
    "impossible sizes": (["model.num_kv_heads=3"], ["model.num_kv_heads=3", "model.num_heads=4"]),
    "negative learning rate": (
        ["recovery=lora", "recovery.learning_rate=-1"], ["recovery.learning_rate=-1", "above 0"]),
    "added at the top": (["+oops=1"], ["oops"]),
    "added to a typed group": (["+model.oops=1"], ["model.oops"]),
    "added to a plug-in group": (["+method.oops=1"], ["method.oops", "merge_rule"]),
    "added to an overlay": (["+sweeps.oops=1"], ["sweeps"]),
    "several methods at once": (["method=[slm,none]"], ["method=[slm,none]", "slm -m method=slm,none"]),
    "a study by its number": (["sweeps=3"], ["sweeps=3", "choose one of its options", "seeds"]),
    "several studies at once": (["sweeps=[seeds,methods]"], ["sweeps=[seeds,methods]", "choose one"]),
    "a sweep without -m": (["seed=1,2"], ["seed=1,2", "slm -m seed=1,2"]),
    "a study without -m": (["sweeps=seeds"], ["a value for method, seed", "slm -m sweeps=seeds"]),
    "unknown stage": (["stages=[prune]"], ["'prune'", "calibrate, merge, repair, recover, evaluate"]),
    "unknown stage to force": (["force=[prune]"], ["'prune'", "calibrate, merge, repair, recover, evaluate"]),
    "a stage without what it reads": (
        ["stages=[evaluate]", "evaluation=efficiency"], ["evaluate_pruned/efficiency needs the result of merge"]),
    "missing data_dir": (["data_dir=nowhere"], ["data_dir='nowhere'", "not a folder"]),
    "unknown evaluation target": (["evaluation.of=[x]"], ["'x'", "dense, pruned, repaired, recovered"]),
    "task folder without files": (
        ["evaluation=zero_shot", "evaluation.data=."], ["evaluation.data=.", "boolq.jsonl"]),
    "unknown task": (["evaluation=zero_shot", "evaluation.tasks=[mmlu]"], ["'mmlu'", "boolq"]),
    "perplexity window": (
        ["evaluation=perplexity", "evaluation.perplexity.window=1"], ["evaluation.perplexity.window=1", "at least 2"]),
    "efficiency runs": (["evaluation.efficiency.num_runs=3"], ["num_warmup=10", "num_runs=3"]),
    "missing plan": (["method=from_plan", "method.path=nowhere.json"], ["nowhere.json"]),
    "no plan given": (["method=from_plan"], ["method.path"]),
    "name with a slash": (["name=a/b"], ["name='a/b'"]),
    "keep": (["keep=all"], ["keep='all'", "model, plan"]),
    "output_dir below a file": (["output_dir=text.txt/out"], ["text.txt", "not a folder"]),
    "output_dir where nothing can be made": (["output_dir=/proc/out"], ["output_dir='/proc/out'", "output_dir="]),
    "--config-dir": (["--config-dir=nowhere"], ["--config-dir=nowhere", "not a folder"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_is_left(case, base, tmp_path, monkeypatch):
    overrides, words = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    outcome = run_slm(*base, *overrides)
    assert outcome.status == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("error: ")
    for word in words:
        assert word in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        (["recovery.max_steps=30", "recovery.rank=4"], "recovery=none does not use recovery.max_steps, recovery.rank"),
        (["method=none", "pruning_ratio=none", "method.merge_rule=mean"], "method=none does not use method.merge_rule"),
        (
            ["method=shortgpt", "threshold.exhaustive=true"],
            "threshold=auto with method=shortgpt does not use threshold.exhaustive",
        ),
    ],
)
def test_what_the_option_has_no_use_for_is_shown_and_changes_nothing(given, idle, base):
    *plan, warning = run_slm(*base, *given, "dry_run=true").out.splitlines()
    assert warning == f"warning: {idle}"
    chosen = [override for override in given if override.partition("=")[0] in ("method", "pruning_ratio")]
    assert run_slm(*base, *chosen, "dry_run=true").out.splitlines() == plan


@pytest.mark.parametrize("experiment", ["two_cores", "lora_alpaca"])
def test_an_experiment_without_its_recovery(experiment, base):
    outcome = run_slm(*base, f"experiment={experiment}", "dry_run=true")
    assert outcome.status == 0, outcome.err
    *stages, warning = outcome.out.splitlines()
    assert [line.split()[0] for line in stages] == ["calibrate", "merge"]
    assert warning.startswith("warning: recovery=none does not use recovery.")


def test_a_key_that_some_options_of_a_study_lack_fails_their_jobs_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Say a.", "output": letter} for letter in "abc"]))
    data = ["recovery.source=file", f"recovery.path={tmp_path}/alpaca.json", "recovery.validation_size=1"]
    outcome = run_slm("-m", *base, *data, "recovery=none,lora,distill", "recovery.rank=4", "dry_run=true")
    jobs = outcome.out.split("\n#")
    assert "recovery=none does not use recovery.source, recovery.path" in jobs[0]
    assert "\nrecover " in jobs[1]
    assert "would fail: recovery.rank does not exist for recovery=distill, only for recovery=lora" in jobs[2]
    assert outcome.err == "error: 1 of 3 jobs would fail, see above\n"

    run_slm("-m", *base, "method=reverse,slm", "method.merge_rule=mean", "recovery.max_steps=30")
    (sweep,) = (tmp_path / "out" / "sweeps" / "slm").iterdir()
    assert "2 jobs, 1 done, 1 FAILED" in (sweep / "summary.md").read_text()
    reason = json.loads((sweep / "0" / "failure.json").read_text())["error"]
    assert reason.startswith("method.merge_rule does not exist for method=reverse, only for method=laco, slm")
    warnings = json.loads((sweep / "1" / "summary.json").read_text())["warnings"]
    assert warnings == ["recovery=none does not use recovery.max_steps"]


def test_fixed_threshold_with_a_ratio_gives_a_command_that_works(base, tmp_path):
    outcome = run_slm(*base, "pruning_ratio=r35", "threshold=fixed", "threshold.value=0.8")
    assert outcome.status == 2
    corrected = shlex.split(outcome.err.partition("so it takes no ratio: slm ")[2])
    assert corrected == [*base, "threshold=fixed", "threshold.value=0.8", "pruning_ratio=none"]
    assert run_slm(*corrected, "dry_run=true").status == 0


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Make ``folder`` a file system of one megabyte; where mounting is not allowed, let saving weights fail alike."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    print("mounting is not allowed here: ENOSPC is injected where weights are saved")
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("transformers.PreTrainedModel.save_pretrained", side_effect=error):
        yield


def test_no_space_left_keeps_what_is_finished_and_the_same_job_goes_on(base, tmp_path, monkeypatch):
    """The model's weights are 2 MB: calibration fits, the pruned model does not."""
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    small, store = tmp_path / "small", tmp_path / "out" / "store"
    with full_disk(small):
        outcome = run_slm(*base, "model.hidden_size=128", f"output_dir={small}/out")
        shutil.copytree(small / "out" / "store", store)
    assert outcome.status == 2
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "no space left" in message
    assert "while running merge" in message
    assert "Traceback" not in outcome.err
    assert len([path for path in (store / "calibrate").iterdir() if path.is_dir() and not path.suffix]) == 1
    assert [path.suffix for path in (store / "merge").iterdir() if path.is_dir()] == [".partial"]

    outcome = run_slm(*base, "model.hidden_size=128")
    assert outcome.status == 0, outcome.err
    (summary,) = (tmp_path / "out" / "runs").glob("*/*/summary.json")
    summary = json.loads(summary.read_text())
    assert summary["num_layers"] == {"dense": 6, "pruned": 5}
    assert {name: stage["reused"] for name, stage in summary["stages"].items()} == {"calibrate": True, "merge": False}


def test_read_only_output_dir(base, tmp_path):
    folder = tmp_path / "fixed"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:  # not root: permissions say the same
        folder.chmod(0o500)
    try:
        outcome = run_slm(*base, f"output_dir={folder}/out")
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    assert "is read-only; choose another output_dir=" in outcome.err


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_dry_run_says_what_would_run_and_leaves_nothing(multirun, base, tmp_path):
    swept = ["seed=1,2"] if multirun else ["seed=1"]
    outcome = run_slm(
        *multirun, *base, "dry_run=true", "recovery=lora", "evaluation.of=[dense,pruned,recovered]",
        f"evaluation.perplexity.corpora=[{tmp_path}/text.txt]", "evaluation.perplexity.window=16", *swept,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    first, *others = outcome.out.removeprefix("#0 seed=1\n").split("#1 seed=2\n")
    dense, *scored = [f"evaluate_{target}/perplexity/text.txt" for target in ("dense", "pruned", "recovered")]
    lines = [line.split() for line in first.splitlines()]
    assert [line[:2] for line in lines] == [[s, "run"] for s in ("calibrate", "merge", "recover", dense, *scored)]
    assert len(others) == len(multirun)
    for other in others:  # another seed, other samples; what both have is said once
        shared, *lines = other.splitlines()
        assert shared == f"as #0: {dense}"
        assert [line.split()[:2] for line in lines] == [[s, "run"] for s in ("calibrate", "merge", "recover", *scored)]
        assert lines[0].split()[2] != first.split()[2]
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_failing_job_of_a_sweep_is_a_failed_row_and_the_others_finish(base, tmp_path, monkeypatch):
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    outcome = run_slm("-m", *base, "pruning_ratio.ratio=0.2,0.9,0.4")
    assert outcome.status == 2
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(
        "error: 1 of 3 jobs failed: job 1 (pruning_ratio.ratio=0.9): pruning_ratio.ratio=0.9 of 6"
    )
    assert outcome.err.endswith(f"{errors[0]}\n")
    jobs = [line.partition("  ")[2] for line in outcome.err.splitlines() if "  job " in line]
    assert [line.partition("; about")[0] for line in jobs] == [
        f"job {number} of 3: pruning_ratio.ratio={ratio}" for number, ratio in ((1, 0.2), (2, 0.9), (3, 0.4))
    ]
    assert ["; about" in line for line in jobs] == [False, True, True]
    assert "Launching" not in outcome.err
    last = outcome.out.rpartition("\nslm: 3 jobs, 2 done, 1 FAILED\n")[2]  # the study's own table, at the end
    assert "FAILED: pruning_ratio" in last or "FAILED: " in last
    (sweep,) = (tmp_path / "out" / "sweeps" / "slm").iterdir()
    table = (sweep / "summary.md").read_text()
    assert "3 jobs, 2 done, 1 FAILED" in table
    rows = [line for line in table.splitlines() if line.startswith("|") and line.split("|")[2].strip().startswith("0.")]
    assert [("FAILED" in row, "done" in row) for row in rows] == [(False, True), (True, False), (False, True)]
    assert "at least 3 must be left" in rows[1]
    layers = [json.loads((sweep / job / "summary.json").read_text())["num_layers"]["pruned"] for job in ("0", "2")]
    assert layers == [5, 4]
    assert not (sweep / "1" / "summary.json").exists()


def test_one_job_of_a_study_runs_by_itself(base):
    """The command that its summary names; the study itself needs -m, see above."""
    outcome = run_slm(*base, "sweeps=seeds", "method=slm", "seed=1", "dry_run=true")
    assert outcome.status == 0, outcome.err
    outcome = run_slm(*base, "sweeps=seeds", "method=slm", "dry_run=true")
    assert "sweeps=seeds is a study, of which one job needs a value for seed; for all of them add -m" in outcome.err


def test_dry_run_says_what_would_be_continued(base):
    calibrate = run_slm(*base, "dry_run=true").out.split()[2]
    Path(f"{calibrate}.partial").mkdir(parents=True)
    lines = run_slm(*base, "dry_run=true").out.splitlines()
    assert lines[0].startswith(f"calibrate            run    {calibrate} (continues an interrupted one)  ")


def test_target_out_of_reach_names_the_nearest_one_which_works(base, tmp_path, monkeypatch):
    """A model that is not itself any more without three of its layers."""

    def similarity(self, stack):
        return 1.0 if sum(len(originals(group)) - 1 for group in stack) < 3 else -1.0

    monkeypatch.setattr("slm_pipeline.engine.windows.StackSimilarity.__call__", similarity)
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    outcome = run_slm(*base, "pruning_ratio=r50")
    assert outcome.status == 2
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "no threshold removes 3 of 6 layers: the nearest removes 2 (" in message
    (run_dir,) = (tmp_path / "out" / "runs" / "slm").iterdir()
    failure = json.loads((run_dir / "failure.json").read_text())
    assert (f"error: {failure['error']}", failure["type"]) == (message, "UserError")
    assert not (run_dir / "summary.json").exists()
    advice = message.partition("(")[2].partition(")")[0].split()
    assert run_slm(*base, *advice).status == 0
    (summary,) = (tmp_path / "out" / "runs").glob("*/*/summary.json")
    assert json.loads(summary.read_text())["layer_groups"] == [[0], [1], [2, 3, 4], [5]]


def test_threshold_that_nothing_reaches_is_a_warning_and_the_dense_model(base, tmp_path, monkeypatch):
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    outcome = run_slm(*base, "threshold=fixed", "threshold.value=1", "pruning_ratio=none")
    assert outcome.status == 0, outcome.err
    (summary,) = (tmp_path / "out" / "runs").glob("*/*/summary.json")
    summary = json.loads(summary.read_text())
    assert summary["num_layers"] == {"dense": 6, "pruned": 6}
    assert summary["warnings"] == ["threshold 1.0: no merge is that similar, the pruned model is the dense one"]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
        (MemoryError(), 2, "calibrate ran out of memory: model.dtype=bfloat16 calibration.num_samples=1 takes least"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "calibrate ran out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            2,
            "calibrate ran out of GPU memory (141 GB in all): model.dtype=bfloat16 calibration.num_samples=1 takes",
        ),
    ],
)
def test_what_stops_a_job_is_said_in_one_line(error, status, words, base, monkeypatch):
    monkeypatch.setattr("slm_pipeline.jobs.stages.calibrate.Calibrate.run", mock.Mock(side_effect=error))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 141_000_000_000))
    outcome = run_slm(*base)
    assert outcome.status == status
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert words in message
    assert "Traceback" not in outcome.err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_signal_that_the_garbage_collector_swallows_ends_a_study_all_the_same(
    stage, number, status, base, monkeypatch
):
    """What a handler raises inside a finalizer goes nowhere."""
    freed = []

    class Garbage:
        def __del__(self):
            signal.raise_signal(number)

    def free():
        freed.append(1)
        if len(freed) == stage:
            Garbage()

    monkeypatch.setattr("slm_pipeline.machine.memory.free", free)
    found = signal.getsignal(number)
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL  # a background job ignores some
    signal.signal(number, before)
    assert run_slm("-m", *base, "pictures=false", "seed=1,2").status == status
    assert len(list(Path(base[-1].partition("=")[2]).glob("sweeps/*/*/0/.hydra"))) == 1
    assert not list(Path(base[-1].partition("=")[2]).glob("sweeps/*/*/*/summary.json"))
    assert signal.getsignal(number) == before
    signal.signal(number, found)


def test_a_defect_of_ours_shows_its_traceback(base, monkeypatch):
    monkeypatch.setattr(
        "slm_pipeline.jobs.stages.calibrate.Calibrate.run", mock.Mock(side_effect=RuntimeError("a defect"))
    )
    with pytest.raises(RuntimeError, match="a defect"):
        run_slm(*base)


def test_dry_run_imports_nothing_heavy(base):
    heavy = {"torch", "transformers", "peft", "lm_eval", "wandb", "matplotlib", "datasets"}
    program = f"import sys; from slm_pipeline.cli import main; main(); print(sorted({heavy} & set(sys.modules)))"
    overrides = [
        *base,
        "dry_run=true",
        "recovery=lora",
        "repair=refit",
        "repair.calibration.num_samples=2",
        "repair.calibration.seq_len=16",
        "evaluation=quick",
        "tracker=wandb_offline",
        "model=smollm2_135m",
    ]
    command = [sys.executable, "-c", program, *(word for word in overrides if not word.startswith("model."))]
    found = subprocess.run(command, capture_output=True, text=True, env=environment(WANDB_MODE="offline"), check=True)
    *stages, imported = found.stdout.splitlines()
    assert len(stages) == 4 + 4 * 8 + 3  # with what repairs; seven tasks, a text; fidelity but of the dense
    assert imported == "[]"


def test_python_m_from_another_directory(base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "slm_pipeline", *base, "calibration.path=../text.txt", "dry_run=true"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=tmp_path / "elsewhere", check=True
    )
    assert [line.split()[:2] for line in found.stdout.splitlines()] == [["calibrate", "run"], ["merge", "run"]]


def test_installed_wheel_carries_conf_and_sweeps(base, tmp_path):
    """What hatchling is told to put into a wheel is enough to run, and every file of conf/ and sweeps/ is in it."""
    target = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path / "site"
    for package in target["packages"]:
        shutil.copytree(REPOSITORY / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    for source, place in target["force-include"].items():
        shutil.copytree(REPOSITORY / source, site / place)
    program = "import slm_pipeline.config as c; print(c.CONF_DIR); import slm_pipeline.cli as m; m.main()"
    command = [sys.executable, "-c", program, "-m", *base, "sweeps=thresholds", "dry_run=true"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment(PYTHONPATH=str(site)), cwd=tmp_path, check=True
    )
    assert found.stdout.splitlines()[0] == str(site / "slm_pipeline" / "conf")
    assert sum(line.startswith("#") for line in found.stdout.splitlines()) == 8
    assert len(list((site / "slm_pipeline" / "conf").rglob("*.yaml"))) == len(list(config.CONF_DIR.rglob("*.yaml")))


def test_user_folder_sweeps_is_found_first(base, tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    content = "# @package _global_\nname: mine\nhydra:\n  sweeper:\n    params:\n      seed: 5,6\n"
    (tmp_path / "sweeps" / "thresholds.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    outcome = run_slm("-m", *base, "sweeps=thresholds", "dry_run=true")
    jobs = [line for line in outcome.out.splitlines() if line.startswith("#")]
    assert [job.split()[1] for job in jobs] == ["seed=5", "seed=6"]


def test_a_sweep_over_methods_may_set_what_only_they_have(base):
    """Only the methods of the sweep have the key; the default method does not."""
    outcome = run_slm("-m", "method=come,come_posterior", "method.repeat=when_needed", "dry_run=true", *base)
    assert outcome.status == 0, outcome.err
    assert "#1 method=come_posterior" in outcome.out


def test_a_dry_multirun_shows_every_job(base):
    outcome = run_slm("-m", "pruning_ratio=r20,layers,r50", "dry_run=true", *base)
    assert outcome.status == 2
    assert "would fail: method=slm needs a target" in outcome.out
    assert "#2 pruning_ratio=r50" in outcome.out
    assert outcome.err == "error: 1 of 3 jobs would fail, see above\n"


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_what_cannot_be_shown_does_not_undo_a_finished_job(multirun, base, tmp_path, monkeypatch):
    """Neither the table nor pictures, summary.md, W&B or the study's report can be written."""
    monkeypatch.setattr("builtins.print", mock.Mock(side_effect=BrokenPipeError("nobody reads")))
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw_similarity", mock.Mock(side_effect=RuntimeError("no font")))
    monkeypatch.setattr("slm_pipeline.jobs.summary.write_summary_md", mock.Mock(side_effect=OSError("disk full")))
    monkeypatch.setattr("slm_pipeline.report.write.write_study", mock.Mock(side_effect=OSError("disk full")))
    monkeypatch.setattr("slm_pipeline.jobs.stages.base.Stage.publish", mock.Mock(side_effect=OSError("disk full")))
    outcome = run_slm(*multirun, *base, "stages=[calibrate]")
    assert outcome.status == 0, outcome.err
    (file,) = (tmp_path / "out").glob("*/slm/*/**/summary.json")
    summary = json.loads(file.read_text())
    assert summary["pictures"] == []
    assert summary["warnings"] == [
        "no picture layer_similarity: RuntimeError: no font",
        "summary.md was not written: OSError: disk full",
        "the table was not printed: BrokenPipeError: nobody reads",
    ]
    assert not file.with_name("failure.json").exists()
    assert "calibrate" in summary["stages"]


def test_output_that_has_no_space_does_not_change_the_exit_status(base, tmp_path):
    """A process of its own: what Python does with its streams at its end counts too."""
    command = [sys.executable, "-m", "slm_pipeline", *base, "stages=[]"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert found.returncode == 0, found.stderr
    assert "the table was not printed: OSError: [Errno 28] No space left on device" in found.stderr
    assert len(list((tmp_path / "out").glob("runs/slm/*/summary.json"))) == 1


def test_output_that_has_no_space_is_named(base, monkeypatch):
    full = mock.Mock(write=mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    monkeypatch.setattr("conftest.redirect_stdout", lambda _: redirect_stdout(full))
    outcome = run_slm(*base, "dry_run=true")
    assert outcome.status == 2
    assert outcome.err.startswith("error: standard output: No space left on device")


def test_what_no_stream_can_show_is_spelt_out(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    cli.be_heard_or_not()
    print("b\N{LATIN SMALL LETTER O WITH DIAERESIS}", flush=True)
    assert sys.stdout.buffer.getvalue() == b"b\\xf6\n"
    with pytest.raises(SystemExit), cli.errors_in_one_line():
        raise UserError("two\nlines \x1b[31mred\u202e")
    assert sys.stderr.buffer.getvalue() == b"error: two lines \\x1b[31mred\\u202e\n"
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)  # as after `>&-`
    cli.be_heard_or_not()
    print("nobody hears")


@pytest.mark.parametrize(
    "words",
    [["-m", "seed=1,2", "dry_run=true"], ["seed=1,2", "-m", "dry_run=true"], ["seed=1,2", "dry_run=true", "-m"]],
)
def test_flags_may_stand_anywhere(words, base):
    outcome = run_slm(*base, *words)
    assert outcome.status == 0, outcome.err
    assert [line for line in outcome.out.splitlines() if line.startswith("#")] == ["#0 seed=1", "#1 seed=2"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("methd=slm", "Could not override 'methd' (did you mean method?)"),
        ("modl.num_layers=3", "Could not override 'modl.num_layers' (did you mean model.num_layers"),
        (
            "method=smlm",
            "error: method=smlm: no option of that name (did you mean slm?); method is one of angular, combined, ",
        ),
        ("method.protect_fist=1", "(did you mean protect_first"),
        ("evaluation.tasks=[piqaa]", "no zero-shot task 'piqaa' (did you mean piqa?)"),
        ("pruning_ratio=0.2", "; any other ratio: pruning_ratio.ratio=0.2\n"),
        ("pruning_ratio=r40", "pruning_ratio=r40: no option of that name (any other ratio: pruning_ratio.ratio=0.4)"),
        ("r20", "'r20': options are written KEY=VALUE (did you mean pruning_ratio=r20?)"),
        ("r40", "'r40': options are written KEY=VALUE; any other ratio: pruning_ratio.ratio=0.4"),
        ("--dry-run", "--dry-run is no flag of slm; options are written without dashes, such as dry_run=true;"),
        ("--method=flap", "without dashes, such as method=flap;"),
        ("--stages=[merge]", "without dashes, such as stages=[merge];"),
        ("--vresion", "--vresion is no flag of slm (did you mean --version"),
        (
            "pruning_ratio=24",
            "pruning_ratio.ratio=0.24; for 24 layers left pruning_ratio=layers pruning_ratio.num_layers=24",
        ),
    ],
)
def test_what_is_nearly_right_is_answered_with_what_is(word, said, base):
    outcome = run_slm(*base, word)
    assert outcome.status == 2
    assert said in outcome.err
