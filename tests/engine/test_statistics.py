"""The calibration pass against sums done by hand, for every architecture."""

from __future__ import annotations

import math

import pytest
import torch
from plans import narrowing
from safetensors.torch import save_file

from slm_pipeline.engine import statistics
from slm_pipeline.engine.blocks import BlockRunner
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply


def test_angles_and_cosines_token_by_token(any_model, input_ids):
    view = ModelView(any_model)
    found = statistics.collect(view, input_ids)
    states = BlockRunner(view, input_ids).states
    for i, j in ((0, 1), (2, 5), (3, 6), (4, 4)):
        cosines = torch.cosine_similarity(states[i].double(), states[j].double(), dim=-1).clamp(-1, 1)
        assert float(found.cosine[i, j]) == pytest.approx(float(cosines.mean()), abs=1e-5)
        angles = cosines.arccos() / math.pi
        # arccos is steep at 1: float32 cosines a rounding error below 1 are angles of 1e-4
        assert float(found.angle[i, j]) == pytest.approx(float(angles.mean()), abs=3e-4)
        assert float(found.angle_last[i, j]) == pytest.approx(float(angles[:, -1].mean()), abs=3e-4)


def test_channel_moments(any_model, input_ids, monkeypatch):
    """Two batches must give the moments of all tokens together."""
    view = ModelView(any_model)
    inputs = {"attention": [], "mlp": []}
    view.attention_output(2).register_forward_pre_hook(
        lambda _, args: inputs["attention"].append(args[0].flatten(0, -2))
    )
    view.mlp_output(2).register_forward_pre_hook(lambda _, args: inputs["mlp"].append(args[0].flatten(0, -2)))
    monkeypatch.setattr(statistics, "MAX_BATCH_TOKENS", 24)
    found = statistics.collect(view, input_ids)
    for part, rows in inputs.items():
        assert [len(row) for row in rows] == [24, 12]
        values = torch.cat(rows).detach().double()
        torch.testing.assert_close(getattr(found, f"{part}_mean")[2], values.mean(dim=0).float())
        torch.testing.assert_close(getattr(found, f"{part}_mean_abs")[2], values.abs().mean(dim=0).float())
        torch.testing.assert_close(getattr(found, f"{part}_variance")[2], values.var(dim=0, correction=0).float())


def test_saved_and_loaded(tiny_llama, input_ids, tmp_path):
    found = statistics.collect(ModelView(tiny_llama[0]), input_ids)
    found.save(tmp_path / "statistics.safetensors")
    again = statistics.Statistics.load(tmp_path / "statistics.safetensors")
    assert_equal(again, found)


def assert_equal(found, expected):
    for name, value in vars(expected).items():
        for one, other in zip(getattr(found, name), value, strict=True):  # of matrices row by row
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_layers_of_different_widths(tiny_llama, input_ids, tmp_path):
    model = apply(narrowing({1: ([0], None), 3: (None, [2, 5, 9])}), tiny_llama[0])
    found = statistics.collect(ModelView(model), input_ids)
    assert [len(layer) for layer in found.attention_mean] == [32, 16, 32, 32, 32, 32]
    assert [len(layer) for layer in found.mlp_variance] == [48, 48, 48, 3, 48, 48]
    found.save(tmp_path / "statistics.safetensors")
    assert_equal(statistics.Statistics.load(tmp_path / "statistics.safetensors"), found)


def test_a_file_of_before_is_read(tiny_llama, input_ids, tmp_path):
    """It had one tensor of all layers for each."""
    found = statistics.collect(ModelView(tiny_llama[0]), input_ids)
    tensors = {name: value if torch.is_tensor(value) else torch.stack(value) for name, value in vars(found).items()}
    save_file(tensors, tmp_path / "statistics.safetensors")
    assert_equal(statistics.Statistics.load(tmp_path / "statistics.safetensors"), found)
