"""A repair between merge and recovery: scored, trained on, replayed, killed and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_pipeline
import torch
from conftest import run_slm
from safetensors.torch import load_file

from slm_pipeline.commands import store
from slm_pipeline.engine import refit
from slm_pipeline.export import exported
from slm_pipeline.surgery.ops.replace import Replace
from slm_pipeline.surgery.plan import Plan

RANK = 4
OF_REPAIR = ["ridges=[0.1]", "reads=[0.1]", "calibration.num_samples=8", "calibration.seq_len=64"]
REFIT = ["repair=refit", *(f"repair.{option}" for option in OF_REPAIR)]
ALONE = ["recovery=none", "evaluation=none"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = small_pipeline.write_data(tmp_path_factory.mktemp("data"))
    overrides = small_pipeline.overrides(data, seq_len=64, max_steps=2, save_steps=2)
    measured = ["evaluation=perplexity", "evaluation.perplexity.corpora=[text.txt]", "evaluation.fidelity.corpora=[]"]
    return [*(word for word in overrides if not word.startswith("evaluation")), *measured, "pictures=false"]


def without(job: list[str], *groups: str) -> list[str]:
    return [word for word in job if not word.startswith(tuple(f"{group}" for group in groups))]


def run(output_dir: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """The run's folder and summary."""
    before = set((output_dir / "runs" / "slm").glob("*"))
    outcome = run_slm(*overrides, f"output_dir={output_dir}")
    assert outcome.status == 0, outcome.err
    (folder,) = set((output_dir / "runs" / "slm").glob("*")) - before
    return folder, json.loads((folder / "summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def model_of(summary: dict[str, Any], stage: str) -> Path:
    return Path(summary["stages"][stage]["path"]) / "model"


@pytest.fixture(scope="module")
def whole(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return run(tmp_path_factory.mktemp("whole"), *job, *REFIT, f"recovery.rank={RANK}")


def test_all_four_models_are_scored(whole):
    folder, summary = whole
    assert [name for name in summary["stages"] if "evaluate" not in name] == ["calibrate", "merge", "repair", "recover"]
    scored = {key: said["value"] for key, said in summary["numbers"].items() if key.endswith("/perplexity/text.txt")}
    assert [key.partition("/")[0] for key in scored] == ["dense", "pruned", "repaired", "recovered"]
    assert len(set(scored.values())) == 4
    assert summary["numbers"]["repair/kl_repaired"]["value"] < summary["numbers"]["repair/kl_pruned"]["value"]
    assert summary["repair"]["options"]["ridges"] == [0.1]
    shown = (folder / "summary.md").read_text()
    assert "## Repair\n\n- refit: " in shown
    assert "tokens, KL from the dense model" in shown
    assert "- new weights in the last projections of " in shown


def test_the_recovery_begins_with_the_repaired_model(whole):
    """LoRA adds a matrix of its rank to what it began with."""
    _, summary = whole
    pruned, repaired, recovered = (weights(model_of(summary, stage)) for stage in ("merge", "repair", "recover"))
    name = max(pruned, key=lambda name: float((repaired[name] - pruned[name]).abs().max()))
    of_repaired, of_pruned = (
        torch.linalg.svdvals((recovered[name] - start[name]).double()) for start in (repaired, pruned)
    )
    assert of_repaired[0] > 1e-3
    assert of_repaired[RANK] < 1e-4 * of_repaired[0]
    assert of_pruned[RANK] > 1e-2 * of_pruned[0]


def test_the_runs_plan_and_those_beside_its_models_are_the_repaired_one_and_replay_it(whole, job, tmp_path):
    folder, summary = whole
    plans = [folder / "plan.json", *(model_of(summary, stage) / "plan/plan.json" for stage in ("repair", "recover"))]
    contents = {Plan.read(file).content() for file in plans}
    assert len(contents) == 1
    plan = Plan.read(folder / "plan.json")
    assert any(isinstance(op, Replace) for op in plan.ops)
    words = [*without(job, "recovery", "evaluation"), *ALONE]
    _, again = run(tmp_path, *words, "method=from_plan", f"method.path={folder / 'plan.json'}", "pruning_ratio=none")
    assert "repair" not in again["stages"]
    expected, found = weights(model_of(summary, "repair")), weights(model_of(again, "merge"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_of_its_models_can_be_exported_and_says_what_it_is(whole):
    folder, summary = whole
    assert exported.find(folder).which == "recovered"
    repaired = exported.find(folder, "repaired")
    assert repaired.folder == model_of(summary, "repair")
    card = repaired.card("FOLDER")
    assert card.partition("\n# ")[2].startswith(f"random, {summary['num_layers']['pruned']} layers (slm, refit)\n")
    assert "; new weights in the last projections of " in card
    assert "new weights" not in exported.find(folder, "pruned").card("FOLDER")
    assert "(slm, refit, lora)" in exported.find(folder).card("FOLDER")


def test_the_store_says_who_made_it_and_what_it_won(whole, capsys, monkeypatch):
    folder, summary = whole
    monkeypatch.setattr("sys.argv", ["slm-store", "list", "--output-dir", str(folder.parent.parent.parent)])
    store.main()
    kl = {name: found["kl"] for name, found in summary["repair"]["divergence"].items()}
    said = f": KL from the dense model {kl['pruned']:.4g} -> {kl['repaired']:.4g} nats\n"
    (line,) = (line for line in capsys.readouterr().out.splitlines(True) if line.endswith(said))
    assert " refit after slm, " in line


def test_without_weights_on_disk_the_plan_rebuilds_them(whole, job, tmp_path):
    _, summary = whole
    words = [*without(job, "recovery"), "recovery=none", "evaluation.of=[repaired]", "keep=plan"]
    _, again = run(tmp_path, *words, *REFIT)
    assert not model_of(again, "repair").exists()
    key = "repaired/perplexity/text.txt"
    assert again["numbers"][key]["value"] == pytest.approx(summary["numbers"][key]["value"], rel=1e-6)


def test_the_same_command_again_repairs_nothing_and_another_option_does(whole, job):
    folder, summary = whole
    output_dir = folder.parent.parent.parent
    words = [*without(job, "recovery", "evaluation"), *ALONE, *REFIT]
    _, again = run(output_dir, *words)
    assert again["stages"]["repair"]["reused"]
    assert again["stages"]["repair"]["path"] == summary["stages"]["repair"]["path"]
    outcome = run_slm(*words, "repair.held_out=0.5", "dry_run=true", f"output_dir={output_dir}")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in ("merge", "repair")] == [
        ["merge", "reuse"], ["repair", "run"],
    ]  # fmt: skip
    _, rescaled = run(output_dir, *words[: -len(REFIT)], "repair=rescale", "repair.calibration.num_samples=8",
                      "repair.calibration.seq_len=64")  # fmt: skip
    assert rescaled["stages"]["merge"]["reused"]
    assert rescaled["repair"]["name"] == "rescale"


def test_where_nothing_was_pruned_nothing_is_repaired(job, tmp_path):
    words = [*without(job, "recovery", "evaluation"), *ALONE, "method=none", *REFIT]
    _, summary = run(tmp_path, *words)
    records = {
        stage: json.loads((Path(summary["stages"][stage]["path"]) / "stage.json").read_text())["result"]
        for stage in ("merge", "repair")
    }
    assert records["repair"]["checkpoint"] == records["merge"]["checkpoint"]
    assert Plan.read(Path(summary["stages"]["repair"]["path"]) / "plan.json").ops == []


def test_killed_between_layers_it_goes_on_and_ends_the_same(whole, job, tmp_path, monkeypatch):
    words = [*without(job, "recovery", "evaluation"), *ALONE, *REFIT, f"output_dir={tmp_path}"]
    layer, fitted = refit.Refit.layer, []

    def dying(self, streams, other, block):
        if len(fitted) == 2:
            raise MemoryError
        fitted.append(block.body)
        return layer(self, streams, other, block)

    monkeypatch.setattr(refit.Refit, "layer", dying)
    assert run_slm(*words).status != 0
    (partial,) = (tmp_path / "store" / "repair").glob("*.partial")
    assert len(list((partial / "layers").rglob("*.json"))) == 2

    def rest(self, streams, other, block):
        first = (self.reads, self.weighting, self.share) == (
            None,
            "inverse_square",
            1.0,
        )  # of the walks, over all layers
        assert not first or block.body not in fitted
        return layer(self, streams, other, block)

    monkeypatch.setattr(refit.Refit, "layer", rest)
    _, summary = run(tmp_path, *words[:-1])
    folder = model_of(summary, "repair")
    assert not (folder.parent / "layers").exists()
    assert "layers/" not in (folder.parent / "complete.json").read_text()
    expected, found = weights(model_of(whole[1], "repair")), weights(folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
