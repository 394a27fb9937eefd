"""Diffusion maps and nearest-neighbour estimates against cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from slm_pipeline.engine import manifold
from slm_pipeline.engine.manifold import diffusion_map, entropy, max_norm_distances, mutual_information, ranks
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def information(first, second):
    return mutual_information(max_norm_distances(first), max_norm_distances(second), 5)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_information_of_correlated_gaussians(correlation):
    """Two pairs of coordinates, each with -log(1 - r ** 2) / 2 nats."""
    first, noise = normal(2, 1500, 2)
    second = correlation * first + math.sqrt(1 - correlation**2) * noise
    assert information(first, second) == pytest.approx(-math.log(1 - correlation**2), abs=0.05)


def test_information_survives_a_reflection_and_a_monotone_map_of_each_coordinate():
    """So the arbitrary signs of eigenvectors do not matter."""
    first, noise = normal(2, 400, 2)
    second = first + noise
    found = information(ranks(first), ranks(second))
    assert found > 0.5
    assert information(ranks(-first), ranks(second)) == pytest.approx(found, abs=1e-12)
    assert information(ranks(first), ranks(second.exp())) == found


@pytest.mark.parametrize("num_coordinates", [1, 2])
def test_entropy_of_the_uniform_distribution(num_coordinates):
    points = 7 * torch.rand(1500, num_coordinates, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = num_coordinates * math.log(7)
    assert entropy(max_norm_distances(points), num_coordinates, 5) == pytest.approx(expected, abs=0.05)


def test_ranks_by_hand():
    values = torch.tensor([[0.5, 3.0], [-2.0, 1.0], [9.0, 2.0]])
    assert ranks(values).tolist() == [[2, 3], [1, 1], [3, 2]]
    assert ranks(values).dtype == torch.float64


def test_first_coordinate_separates_two_clusters():
    cloud = normal(60, 10).float()
    cloud[::3] += 20
    first = diffusion_map(cloud)[:, 0]
    assert len(set(first[::3].sign().tolist())) == 1
    others = torch.cat([first[1::3], first[2::3]])
    assert set(others.sign().tolist()) == {-first[0].sign().item()}


def test_first_coordinate_runs_along_a_curve():
    place = torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cloud = torch.stack([3 * place, place.square()], dim=1)
    both = torch.stack([ranks(diffusion_map(cloud))[:, 0], ranks(place[:, None])[:, 0]])
    assert abs(float(torch.corrcoef(both)[0, 1])) > 0.95


def test_the_scale_of_the_states_does_not_matter():
    cloud = normal(50, 6)
    torch.testing.assert_close(diffusion_map(1000 * cloud).abs(), diffusion_map(cloud).abs())


@pytest.mark.parametrize("cloud", [torch.ones(20, 4), torch.full((20, 4), math.nan)])
def test_points_without_finite_distances(cloud):
    with pytest.raises(UserError, match="the median distance between the states of 20 tokens is"):
        diffusion_map(cloud)


def test_output_clouds(any_model, input_ids, monkeypatch):
    """Outputs of the layers themselves, at the middles of equal shares, whatever the batches."""
    view = ModelView(any_model)
    outputs = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in view.layers
    ]
    with torch.no_grad():
        any_model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    monkeypatch.setattr(manifold, "_MAX_BATCH_TOKENS", 24)
    found = manifold.output_clouds(view, input_ids, 9)
    assert found.shape == (6, 9, 32)
    expected = torch.stack([output.flatten(0, 1)[[2, 6, 10, 14, 18, 22, 26, 30, 34]] for output in outputs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert manifold.output_clouds(view, input_ids, 36).shape == (6, 36, 32)
