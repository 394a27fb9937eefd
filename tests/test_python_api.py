"""The Python API: every block of docs/python.md runs, and does what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plans import narrowing

import slm_pipeline
from slm_pipeline.models.loading import load_dense
from slm_pipeline.store.run_folder import RUNNING

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which all blocks ran in order, and the names that they left, ``printed`` among them."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "text.txt").write_text("the mill stands by the river and the old tree " * 500)
    printed: list[str] = []
    names: dict[str, Any] = {"print": lambda *values: printed.append(" ".join(map(str, values))), "printed": printed}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            exec(compile(block, "docs/python.md", "exec"), names)
    return folder, names


def test_the_blocks_print_what_their_comments_say(ran):
    folder, names = ran
    samples, stages, place, layers, checkpoint, row, plan, depth, error = names["printed"]
    assert samples == "64"
    assert [line.split()[:2] for line in stages.splitlines()] == [["calibrate", "run"], ["merge", "run"]]
    assert Path(place).parent == folder / "outputs/runs/slm"
    assert layers == "{'dense': 8, 'pruned': 6}"
    assert transformers.AutoConfig.from_pretrained(checkpoint).num_hidden_layers == 6
    assert row == f"slm/{Path(place).name} done shortgpt"
    assert plan.startswith("slm [[0], ")
    assert depth == "6"
    assert error.startswith("pruning_ratio.num_layers=0 ")


def test_a_run_is_the_one_that_the_command_leaves(ran, monkeypatch):
    folder, names = ran
    run = names["finished"]
    monkeypatch.chdir(folder)
    assert json.loads((run.path / "summary.json").read_text())["command"] == f"slm {' '.join(run.overrides)}"
    assert {RUNNING, ".hydra", "config.yaml", "metrics.jsonl", "plan.json", "summary.md", "calibrate"} <= {
        path.name for path in run.path.iterdir()
    }
    again = slm_pipeline.run(names["composed"])
    assert [stage["reused"] for stage in again.summary["stages"].values()] == [True, True]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def test_a_plan_applied_to_a_model_in_memory_gives_the_pipelines_checkpoint(ran, monkeypatch):
    folder, names = ran
    monkeypatch.chdir(folder)
    dense, _ = load_dense(names["composed"].job.source)
    pruned = slm_pipeline.apply_plan(slm_pipeline.Plan.read(names["finished"].path / "plan.json"), dense)
    assert pruned is dense
    of_the_run = transformers.AutoModelForCausalLM.from_pretrained(names["finished"].summary["checkpoint"])
    torch.testing.assert_close(logits(pruned), logits(of_the_run))


def test_a_model_with_layers_that_differ_is_loaded_without_its_code(ran, tmp_path):
    """By its folder; by that of its run in docs/python.md."""
    _, names = ran
    model, tokenizer = slm_pipeline.load(names["finished"].path)
    pruned = slm_pipeline.apply_plan(narrowing({1: ([0], [2, 5])}, num_layers=6), model)
    plan = narrowing({1: ([0], [2, 5])}, num_layers=6)
    expected = logits(slm_pipeline.save_model(pruned, tokenizer, tmp_path / "unequal", plan=plan))
    (tmp_path / "unequal/modeling_pruned.py").write_text("raise SystemExit('this must not run')")
    again, _ = slm_pipeline.load(tmp_path / "unequal")
    assert type(again).__name__ == "PrunedLlamaForCausalLM"
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    with pytest.raises(slm_pipeline.UserError, match="is neither a run's folder"):
        slm_pipeline.load(tmp_path)


def test_what_is_saved_is_the_pruned_model_with_its_plan_and_its_card(ran):
    folder, names = ran
    torch.testing.assert_close(logits(names["again"]), logits(names["pruned"]))
    assert slm_pipeline.Plan.read(folder / "pruned_model/plan/plan.json") == names["plan"]
    assert "random, 6 layers (slm)" in (folder / "pruned_model/README.md").read_text()
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(("call", "message"), [
    (lambda names, place: slm_pipeline.compose(["method=slm,laco"]), "asks for several jobs"),
    (lambda names, place: slm_pipeline.compose(["methd=slm"]), "Could not override 'methd'"),
    (lambda names, place: slm_pipeline.compose(config_dir="nowhere"), "--config-dir=nowhere is not a folder"),
    (lambda names, place: slm_pipeline.run(slm_pipeline.compose([*names["small"], "dry_run=true"])), "runs nothing"),
    (lambda names, place: slm_pipeline.apply_plan(names["plan"], names["again"]), "8 layers; this model has 6"),
    (lambda names, place: slm_pipeline.save_model(names["again"], None, place, plan=names["plan"]), "is there already"),
    (lambda names, place: slm_pipeline.load_results("pruned_model"), "no runs in pruned_model"),
])  # fmt: skip
def test_mistakes_are_users_errors(call, message, ran, monkeypatch):
    folder, names = ran
    monkeypatch.chdir(folder)
    with pytest.raises(slm_pipeline.UserError, match=re.escape(message)):
        call(names, "pruned_model")
    assert (folder / "pruned_model/model.safetensors").is_file()


def test_what_ends_a_run_reaches_the_caller_and_is_kept_with_it(ran, monkeypatch):
    folder, names = ran
    monkeypatch.chdir(folder)

    def out_of_reach(*_):
        raise slm_pipeline.UserError("no threshold removes 5 of 8 layers")

    monkeypatch.setattr("slm_pipeline.methods.slm.SlidingLayerMerging.plan", out_of_reach)
    composed = slm_pipeline.compose(
        [*names["small"], "method=slm", "pruning_ratio=r35", "recovery=none", "tracker=jsonl", "name=fails"]
    )
    with pytest.raises(slm_pipeline.UserError, match="no threshold removes 5 of 8 layers"):
        slm_pipeline.run(composed)
    (failed,) = slm_pipeline.load_results("outputs/runs/fails")
    assert failed.status == "FAILED"
    assert failed.reason.startswith("no threshold removes 5 of 8 layers")


def test_importing_the_package_imports_nothing_else():
    program = (
        "import sys, slm_pipeline as s; s.__version__; assert set(s.__all__) <= set(dir(s))\n"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'slm_pipeline.api') if m in sys.modules])\n"
        "s.compose; print([m for m in ('torch', 'hydra', 'slm_pipeline.api') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert found.stdout.splitlines() == ["[]", "['hydra', 'slm_pipeline.api']"]


def test_the_document_names_all_that_there_is():
    text = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
    assert {name for name in slm_pipeline.__all__ if f"`{name}`" in text} == set(slm_pipeline.__all__)
    assert all(hasattr(slm_pipeline, name) for name in slm_pipeline.__all__)
