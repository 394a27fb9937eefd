"""Where the BOS token stands before a text: as asked, else where the model needs it; and what is said of that."""

from __future__ import annotations

import pytest

from slm_pipeline.jobs.command_line import compose_job

TEXTS = ["calibration=text_file", "calibration.path=text.txt", "evaluation=perplexity", "repair=refit"]
TEXTS += [f"evaluation.{measure}.corpora=[text.txt]" for measure in ("perplexity", "fidelity")]
OPTIONS = ["calibration.bos", "evaluation.perplexity.bos", "evaluation.fidelity.bos"]


def job(architecture: str, *overrides: str):
    sizes = ["model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2", "model.num_layers=6"]
    return compose_job(
        ["slm"], ["model=random", f"model.architecture={architecture}", *sizes, *TEXTS, "recovery=none", *overrides]
    )


def bos_of(found) -> list[bool]:
    """Of the calibration, the repair's, perplexity and fidelity, as their keys have it."""
    keys = [
        found.calibration.identity(),
        found.identities["repair"]["calibration"],
        *found.evaluation.identity().values(),
    ]
    return [key.get("bos", False) for key in keys]


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The river runs past the mill.\n" * 4000)


@pytest.mark.parametrize(("architecture", "needed"), [("llama", False), ("qwen3", False), ("gemma3_text", True)])
def test_a_model_that_needs_bos_gets_it_before_every_text(architecture, needed):
    found = job(architecture)
    assert bos_of(found) == 4 * [needed]
    assert not [warning for warning in found.warnings if "BOS" in warning]


def test_a_model_that_is_kept_from_the_bos_that_it_needs_is_warned_about():
    found = job("gemma3_text", *(f"{option}=false" for option in OPTIONS))
    assert bos_of(found) == 4 * [False]  # the repair's text is as the calibration's
    said = "a gemma3_text model predicts a text without BOS far worse"
    assert [warning for warning in found.warnings if "BOS" in warning] == [
        f"{option}=false: {said}; {option}=null puts it there" for option in OPTIONS
    ]


def test_others_may_have_it_without_a_word():
    found = job("llama", *(f"{option}=true" for option in OPTIONS))
    assert bos_of(found) == 4 * [True]
    assert not [warning for warning in found.warnings if "BOS" in warning]
