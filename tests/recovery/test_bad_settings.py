"""What a user can get wrong about a recovery is said in one line, before any stage runs or any model is loaded."""

from __future__ import annotations

import json

import pytest
from conftest import run_slm

GOOD = [
    *("model=random", "model.architecture=llama", "model.num_layers=6", "model.hidden_size=32", "model.num_heads=4"),
    *("model.num_kv_heads=2", "model.intermediate_size=48", "model.vocab_size=300", "method=reverse"),
    *("pruning_ratio=layers", "pruning_ratio.num_layers=4", "calibration=text_file", "calibration.path=text.txt"),
    *("evaluation=none", "tracker=jsonl", "recovery.source=file", "recovery.validation_size=2"),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The river runs past the mill and the tree.\n" * 90)
    rows = [{"instruction": f"Say {letter}.", "input": "", "output": letter} for letter in "abcdef"]
    (tmp_path / "good.json").write_text(json.dumps(rows))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "silent.json").write_text(json.dumps([{**row, "output": " "} for row in rows]))
    (tmp_path / "folder").mkdir()

    def never(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("slm_pipeline.models.loading._random_model", never)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recovery.target_modules=[q_proj,w1]"], "the blocks of a llama model have no linear layer 'w1'"),
        (
            ["recovery=partial_layers", "recovery.num_layers=5"],
            "recovery.num_layers=5 is more than the 4 layers of the pruned model",
        ),
        (["recovery.path=empty.json"], "none of the 0 examples"),
        (["recovery.path=silent.json"], "none of the 6 examples"),
        (["recovery.path=folder"], "folder has no .json"),
        (["recovery.path=nowhere.json"], "recovery.path='nowhere.json'"),
        (["recovery.cutoff_len=100"], "recovery.cutoff_len=100 leaves no output in any of the 4 examples"),
        (["recovery.validation_size=6"], "recovery.validation_size=6 leaves nothing to train on"),
        (["recovery.packing=true", "model.architecture=opt"], "recovery.packing=true: a opt model"),
        (
            ["recovery=partial_layers", "recovery.head=true", "model.architecture=gemma2"],
            "recovery.head=true: the output head of random is its embedding",
        ),
        (
            [
                *("recovery=partial_layers", "recovery.num_layers=0", "recovery.final_norm=false"),
                "model.architecture=gemma2",
            ],
            "recovery.num_layers=0 and recovery.final_norm=false train nothing: the output head of random is its",
        ),
        (["recovery.num_processes=2", "model.device=cuda:1"], "recovery.num_processes=2"),
        (["model.device=cuda:1"], "let CUDA_VISIBLE_DEVICES show that one alone"),
        (["recovery=distill", "recovery.sharding=true", "recovery.num_processes=2"], "recovery.sharding=true"),
        (["recovery.source=bundled"], "recovery.path=good.json needs recovery.source=file, not bundled"),
        (["recovery.revision=v2"], "recovery.revision=v2 needs recovery.source=hub, not file"),
        (["recovery=distill", "recovery.early_stopping=2"], "recovery=distill keeps the last weights"),
        (["recovery=block_mse", "recovery.early_stopping=2"], "recovery=block_mse keeps the last weights"),
        (
            ["recovery=block_mse", "recovery.objective=language_model", "recovery.loss=kl"],
            "recovery.loss=kl needs recovery.objective=states, not language_model",
        ),
    ],
)
def test_found_before_anything_runs(overrides, message, files, monkeypatch):
    if "model.device=cuda:1" in overrides:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    outcome = run_slm(*GOOD, "recovery.path=good.json", *overrides)
    assert outcome.status == 2
    assert outcome.err.count("error:") == 1
    assert message in outcome.err, outcome.err
    assert not list(files.glob("outputs/store/*/*"))


def test_the_same_command_with_good_settings_is_not_refused(files):
    """So that the errors above are about what they say."""
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        run_slm(*GOOD, "recovery.path=good.json")
