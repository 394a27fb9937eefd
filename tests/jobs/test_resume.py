"""What is done is never done again, and a job killed in any stage ends as if nobody had touched it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_pipeline
import torch
from conftest import run_slm
from filelock import FileLock
from safetensors.torch import load_file
from speeds import measured_speed

from slm_pipeline.evaluation.efficiency import Efficiency

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TARGETS = ("dense", "pruned", "recovered")
STAGES = ["calibrate", "merge", "recover"]
STAGES += [f"evaluate_{target}/{part}" for target in TARGETS for part in ("perplexity/text.txt", "piqa", "boolq")]


def scored(*targets: str, part: str = "perplexity/text.txt") -> list[str]:
    return [f"evaluate_{target}/{part}" for target in targets]


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a whole pipeline on random weights: LoRA on 30 examples, two tasks and a text to score."""
    data = small_pipeline.write_data(tmp_path_factory.mktemp("data"))
    return small_pipeline.overrides(data, seq_len=256, max_steps=6, save_steps=2)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    summary: dict[str, Any]

    def reused(self) -> dict[str, bool]:
        return {name: stage["reused"] for name, stage in self.summary["stages"].items()}

    def paths(self) -> dict[str, str]:
        return {name: stage["path"] for name, stage in self.summary["stages"].items()}

    def perplexities(self) -> dict[str, float]:
        metrics = self.summary["metrics"]
        return {target: found["perplexity"]["text.txt"]["perplexity"] for target, found in metrics.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(Path(self.summary["checkpoint"]) / "model.safetensors")

    def findings(self) -> dict[str, Any]:
        """What does not depend on when and where it ran."""
        names = ("metrics", "layer_groups", "dropped", "threshold", "num_layers", "parameters", "calibration")
        numbers = {key: said for key, said in self.summary["numbers"].items() if not said.get("cost")}
        return {**{name: self.summary[name] for name in names}, "numbers": numbers}


def job_folder(job: list[str]) -> str:
    return next(override.removeprefix("data_dir=") for override in job if override.startswith("data_dir="))


def without_recovery(job: list[str]) -> list[str]:
    return [override for override in job if not override.startswith("recovery.")] + ["recovery=none"]


def run(output_dir: Path, *overrides: str) -> Run:
    before = set((output_dir / "runs" / "slm").glob("*"))
    outcome = run_slm(*overrides, f"output_dir={output_dir}")
    assert outcome.status == 0, outcome.err
    (folder,) = set((output_dir / "runs" / "slm").glob("*")) - before
    return Run(folder, json.loads((folder / "summary.json").read_text()))


@pytest.fixture(scope="module")
def undisturbed(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("undisturbed"), *job)


@pytest.fixture(scope="module")
def output_dir(undisturbed: Run) -> Path:
    return undisturbed.folder.parent.parent.parent


def test_run_from_nothing(undisturbed):
    assert undisturbed.reused() == dict.fromkeys(STAGES, False)
    assert undisturbed.summary["num_layers"] == {"dense": 6, "pruned": 5}
    assert undisturbed.summary["warnings"][0] == (
        "perplexity/text.txt: the calibration samples come from the same text, which favours the pruned model"
    )
    perplexities = undisturbed.perplexities()
    assert perplexities["recovered"] < perplexities["pruned"]
    for name in STAGES:
        link = undisturbed.folder / name.replace("perplexity/", "perplexity_")
        assert link.resolve() == Path(undisturbed.paths()[name])


def kill_when(appears: str, store: Path, command: list[str], naming: str = "") -> None:
    """Start ``command`` and kill it as soon as a file matching ``appears`` is in the store and has this text in it."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with open(store.parent / "stderr", "w+") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        deadline = time.monotonic() + 120
        while not any(path.is_dir() or naming in path.read_text(errors="replace") for path in store.glob(appears)):
            assert process.poll() is None, f"ended before {appears} was there: {Path(stderr.name).read_text()}"
            assert time.monotonic() < deadline, f"{appears} never came"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_killed_in_every_stage_it_ends_as_if_undisturbed(job, undisturbed, tmp_path):
    """The same command again and again, killed each time one stage further."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "slm_pipeline", *job, f"output_dir={tmp_path}"]
    finished: list[str] = []
    for stage, appears, naming in (
        ("calibrate", "*.partial/samples.safetensors", ""),
        ("merge", "*.partial/plan.json", ""),
        ("recover", "*.partial/checkpoints/checkpoint-4", ""),
        ("evaluate", "*[0-9a-f]/stage.json", ""),  # of a finished one: .partial has one for a moment
    ):
        kill_when(f"{stage}/{appears}", store, command, naming)
        done = sorted(str(path.parent.relative_to(store)) for path in store.glob("*/*/stage.json"))
        if stage != "evaluate":
            (unfinished,) = (store / stage).glob("*.partial")
            assert not unfinished.with_suffix("").exists()
            assert done == sorted(finished)
            finished.append(f"{stage}/{unfinished.stem}")
    before = {path.parent: path.stat() for path in (store / "evaluate").glob("*[0-9a-f]/stage.json")}
    assert 0 < len(before) < 9

    continued = sorted((tmp_path / "runs" / "slm").iterdir())[3]  # it was killed while it evaluated
    rows = [json.loads(line) for line in (continued / "metrics.jsonl").read_text().splitlines()]
    losses = [{**row, "time": 0, "stage": 0} for row in rows if row["stage"] == "recover" and "step" in row]
    curve = json.loads((Path(undisturbed.paths()["recover"]) / "curve.json").read_text())
    assert sorted(map(str, losses)) == sorted(str({"time": 0, "stage": 0, **row}) for row in curve)  # of both attempts

    resumed = run(tmp_path, *job)
    assert resumed.reused() == {
        name: Path(path) in before or "evaluate" not in name for name, path in resumed.paths().items()
    }
    assert list(resumed.reused()) == STAGES
    assert resumed.findings() == undisturbed.findings()
    assert resumed.summary["recovery"]["eval_loss"] == undisturbed.summary["recovery"]["eval_loss"]
    expected = undisturbed.weights()
    assert resumed.weights().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.weights().items())
    for folder, state in before.items():  # what was finished is not scored again
        kept = (folder / "stage.json").stat()
        assert (kept.st_ino, kept.st_mtime_ns) == (state.st_ino, state.st_mtime_ns)
    assert not list(store.glob("*/*.partial"))


def test_a_job_scores_its_own_model_while_another_scores_the_dense_one(job, undisturbed, tmp_path):
    paths = {name: tmp_path / "store" / "evaluate" / Path(path).name for name, path in undisturbed.paths().items()}
    dense, pruned = (paths[name] for name in scored("dense", "pruned"))
    dense.parent.mkdir(parents=True)
    begun, seen = threading.Event(), []

    def other_job() -> None:
        with FileLock(dense.with_suffix(".lock")):
            begun.set()
            deadline = time.monotonic() + 120
            while not pruned.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.extend(path for path in (dense, pruned) if path.exists())

    thread = threading.Thread(target=other_job)
    thread.start()
    begun.wait()
    found = run(tmp_path, *without_recovery(job), "evaluation.of=[dense,pruned]")
    thread.join()
    assert seen == [pruned]
    assert list(found.reused().items()) == [(name, False) for name in STAGES if "recover" not in name]
    assert found.findings()["metrics"] == {
        target: undisturbed.findings()["metrics"][target] for target in ("dense", "pruned")
    }


def test_same_command_again_reuses_everything(job, undisturbed, output_dir):
    again = run(output_dir, *job)
    assert again.reused() == dict.fromkeys(STAGES, True)
    assert again.paths() == undisturbed.paths()
    assert again.findings() == undisturbed.findings()
    ignored = ("stages", "provenance", "warnings", "numbers")  # of the numbers, seconds differ
    assert {k: v for k, v in again.summary.items() if k not in ignored} == {
        k: v for k, v in undisturbed.summary.items() if k not in ignored
    }
    lines = run_slm(*job, f"output_dir={output_dir}", "dry_run=true").out.splitlines()
    assert [line.split() for line in lines] == [[name, "reuse", undisturbed.paths()[name]] for name in STAGES]


def test_another_limit_only_evaluates_again(job, undisturbed, output_dir):
    fewer = run(output_dir, *job, "evaluation.limit=2")
    assert fewer.reused() == {name: not name.endswith(("piqa", "boolq")) for name in STAGES}
    assert fewer.summary["details"]["evaluate_dense"]["zero_shot"]["piqa"]["num_examples"] == 2
    assert run(output_dir, *job).findings() == undisturbed.findings()


def test_part_of_the_stages(job, undisturbed, output_dir):
    first = run(output_dir, *job, "stages=[calibrate,merge]")
    assert first.reused() == {"calibrate": True, "merge": True}
    assert "metrics" not in first.summary
    last = run(output_dir, *job, "stages=[evaluate]", "evaluation.tasks=[]", "evaluation.of=[recovered]")
    assert last.reused() == dict.fromkeys(scored("recovered"), True)
    assert last.perplexities()["recovered"] == undisturbed.perplexities()["recovered"]


def test_force_runs_a_stage_and_what_follows(job, undisturbed, output_dir):
    forced = run(output_dir, *without_recovery(job), "force=[merge]", "evaluation.tasks=[]")
    assert forced.reused() == {
        "calibrate": True, "merge": False, "evaluate_dense/perplexity/text.txt": True,
        "evaluate_pruned/perplexity/text.txt": False,
    }  # fmt: skip
    assert forced.summary["layer_groups"] == undisturbed.summary["layer_groups"]
    again = run(output_dir, *without_recovery(job), "force=[evaluate]", "evaluation.tasks=[]")
    assert list(again.reused().values()) == [True, True, False, False]


def test_thresholds_that_give_the_same_plan_share_all_that_follows(job, undisturbed, output_dir):
    threshold = undisturbed.summary["threshold"]
    fixed = [*job, "threshold=fixed", "pruning_ratio=none", "evaluation.tasks=[]"]
    first = run(output_dir, *fixed, f"threshold.value={threshold}")
    second = run(output_dir, *fixed, f"threshold.value={threshold - 1e-9}")
    assert second.summary["layer_groups"] == first.summary["layer_groups"]
    assert second.paths()["merge"] != first.paths()["merge"]
    assert second.reused() == {name: name != "merge" for name in [*STAGES[:3], *scored(*TARGETS)]}


def test_keep_plan_leaves_no_pruned_weights_and_scores_the_same(job, undisturbed, tmp_path):
    pruned = [*without_recovery(job), "evaluation.of=[pruned]"]
    lean = run(tmp_path, *pruned, "keep=plan")
    assert not list(Path(lean.paths()["merge"]).rglob("*.safetensors"))
    assert "checkpoint" not in lean.summary
    assert lean.summary["metrics"]["pruned"] == undisturbed.summary["metrics"]["pruned"]
    whole = run(tmp_path, *pruned)  # with keep=model the weights are there, made from the plan
    assert whole.paths() == lean.paths()
    assert whole.reused() == {name: name != "merge" for name in STAGES if "dense" not in name and "recover" not in name}
    assert (Path(whole.summary["checkpoint"]) / "model.safetensors").is_file()


def test_plan_is_replayed(job, undisturbed, output_dir):
    plan = undisturbed.folder / "plan.json"
    replayed = run(output_dir, *job, "method=from_plan", f"method.path={plan}", "evaluation.tasks=[]")
    assert replayed.summary["method"] == "from_plan"
    assert replayed.summary["layer_groups"] == undisturbed.summary["layer_groups"]
    assert replayed.paths()["recover"] == undisturbed.paths()["recover"]
    assert replayed.reused()["recover"]
    assert not replayed.reused()["merge"]
    assert Path(replayed.paths()["merge"], "model", "model.safetensors").read_bytes() == (
        Path(undisturbed.paths()["merge"], "model", "model.safetensors").read_bytes()
    )


def test_no_pruning_is_the_dense_model(job, undisturbed, output_dir):
    dense = run(output_dir, *without_recovery(job), "method=none", "evaluation.of=[dense,pruned]")
    assert dense.summary["num_layers"] == {"dense": 6, "pruned": 6}
    (of_dense,), (of_pruned,) = scored("dense"), scored("pruned")
    assert dense.paths()[of_pruned] == dense.paths()[of_dense] == undisturbed.paths()[of_dense]
    assert dense.reused()[of_pruned]
    weights = dense.weights()
    assert dense.summary["metrics"]["pruned"] == undisturbed.summary["metrics"]["dense"]
    assert len({name.split(".")[2] for name in weights if "layers" in name}) == 6


def test_two_texts_of_the_same_name_are_scored_apart(job, output_dir, tmp_path):
    (tmp_path / "text.txt").write_text("xyz " * 200)
    found = run(
        output_dir, *job, "stages=[evaluate]", "evaluation.of=[dense]", "evaluation.tasks=[]",
        f"evaluation.perplexity.corpora=[text.txt,{tmp_path}/text.txt]",
    )  # fmt: skip
    first, second = found.summary["metrics"]["dense"]["perplexity"].values()
    assert first["sha256"] != second["sha256"]
    assert first["num_tokens"] != second["num_tokens"]
    names = {name for name in found.summary["numbers"] if "perplexity" in name}
    assert names == {"dense/perplexity/text.txt", f"dense/perplexity/{tmp_path}/text.txt"}


def test_adding_a_text_measures_that_alone_and_a_copy_elsewhere_nothing(job, undisturbed, output_dir, tmp_path):
    (tmp_path / "more.txt").write_text("river mill " * 300)
    (tmp_path / "copy.txt").write_bytes((Path(job_folder(job)) / "text.txt").read_bytes())
    corpora = f"evaluation.perplexity.corpora=[text.txt,{tmp_path}/more.txt]"
    lines = run_slm(*job, corpora, f"output_dir={output_dir}", "dry_run=true").out.splitlines()
    added = [line.split()[0] for line in lines if line.split()[1] == "run"]
    assert added == scored(*TARGETS, part="perplexity/more.txt")
    both = run(output_dir, *job, corpora)
    assert {name for name, reused in both.reused().items() if not reused} == set(added)
    moved = run(output_dir, *job, f"evaluation.perplexity.corpora=[{tmp_path}/copy.txt]")
    assert set(moved.reused().values()) == {True}
    assert moved.summary["numbers"]["dense/perplexity/copy.txt"]["value"] == undisturbed.perplexities()["dense"]


def test_adding_speed_measures_that_alone(job, undisturbed, output_dir, monkeypatch):
    def timed(self, part, model, context):
        timed.calls += 1
        return measured_speed("d", tokens_per_second=2.0)

    timed.calls = 0
    monkeypatch.setattr(Efficiency, "run", timed)
    found = run(output_dir, *job, "evaluation.efficiency.enabled=true", "objective.metric=pruned/efficiency/weights_gb")
    assert {name for name, reused in found.reused().items() if not reused} == set(scored(*TARGETS, part="efficiency"))
    assert timed.calls == 3
    assert found.summary["numbers"]["recovered/efficiency/tokens_per_second"]["value"] == 2.0
    assert found.findings()["metrics"] == undisturbed.findings()["metrics"]


def test_weights_are_added_to_a_plan_without_searching_again(job, tmp_path, monkeypatch):
    common = [*without_recovery(job), f"output_dir={tmp_path}", "stages=[calibrate,merge]"]
    assert run_slm(*common, "keep=plan").status == 0

    def searched_again(*_):
        raise AssertionError("the search ran again")

    monkeypatch.setattr("slm_pipeline.methods.slm.SlidingLayerMerging.plan", searched_again)
    assert run_slm(*common, "keep=model").status == 0
    (weights,) = (tmp_path / "store" / "merge").glob("*/model/model.safetensors")
    assert "merge                reuse" in run_slm(*common, "keep=plan", "dry_run=true").out
    assert weights.is_file()


def test_a_removal_is_given_to_mergekit_and_taken_back(job, tmp_path):
    common = [*without_recovery(job), f"output_dir={tmp_path}", "stages=[calibrate,merge]"]
    assert run_slm(*common, "method=reverse", "method.protect_last=1", "pruning_ratio=r35").status == 0
    (document,) = (tmp_path / "store" / "merge").glob("*/mergekit.yml")
    outcome = run_slm(*common, "name=back", "method=from_plan", f"method.path={document}")
    assert outcome.status == 0, outcome.err
    (summary,) = (tmp_path / "runs" / "back").glob("*/summary.json")
    assert json.loads(summary.read_text())["dropped"] == [3, 4]


@pytest.mark.parametrize("export", ["stock", "custom"])
def test_missing_sublayers_stay_missing_through_the_whole_pipeline(export, job, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run a checkpoint's code"))
    overrides = [*job, "method=finercut", f"method.export={export}", "method.protect_first=1", "pruning_ratio=r30"]
    outcome = run_slm(*overrides, f"output_dir={tmp_path}")
    assert outcome.status == 0, outcome.err
    (file,) = tmp_path.glob("runs/slm/*/summary.json")
    summary = json.loads(file.read_text())
    missing = summary["sublayers"]
    assert missing["attention"] or missing["mlp"]
    assert {"dense", "pruned", "recovered"} == summary["metrics"].keys()
    assert not (Path(summary["stages"]["recover"]["path"]) / "checkpoints").exists()
    card = (Path(summary["checkpoint"]) / "README.md").read_text()
    weights = load_file(Path(summary["checkpoint"]) / "model.safetensors")
    position = {group[0]: index for index, group in enumerate(summary["layer_groups"])}
    names = [f"model.layers.{position[layer]}.self_attn.o_proj.weight" for layer in missing["attention"]]
    names += [f"model.layers.{position[layer]}.mlp.down_proj.weight" for layer in missing["mlp"]]
    if export == "stock":
        assert all(weights[name].count_nonzero() == 0 for name in names)
        assert "zeroed projections" in card
    else:
        assert not weights.keys() & set(names)
        assert "trust_remote_code=True" in card
