"""Blocks run compiled decide as they do otherwise, and the model is what it was."""

from __future__ import annotations

import pytest
import torch
from conftest import context_of, random_source
from problems import problem_of

from slm_pipeline.engine import compiled
from slm_pipeline.errors import UserError
from slm_pipeline.methods.sleb import Sleb
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.models.loading import load_dense


@pytest.mark.parametrize(
    ("method", "asked", "num_graphs"),
    # Blocks as they are, and with norms put in the place of their own. Candidates that walk together: one to six.
    [(SlidingLayerMerging, {"threshold": 0.9}, 2), (Sleb, {"num_remove": 2}, 6)],
)
def test_all_blocks_share_what_is_compiled(method, asked, num_graphs, input_ids, monkeypatch):
    source = random_source(num_layers=8)
    model, _ = load_dense(source)
    problem = problem_of(model, source, input_ids, **asked)
    graphs = []
    monkeypatch.setattr(compiled, "_BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()
    expected, plan = method().plan(problem), method(compile=True).plan(problem)
    assert (plan.content(), plan.scores) == (expected.content(), expected.scores)
    assert len(graphs) == num_graphs
    assert not any("forward" in vars(block) for block in problem.view.layers)


def test_what_cannot_be_compiled_is_said(input_ids, monkeypatch):
    source = random_source(num_layers=4)
    model, _ = load_dense(source)
    problem = problem_of(model, source, input_ids, num_remove=1)

    def fails(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "_BACKEND", fails)
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"method.compile=true: torch cannot compile the blocks here \(.*no compiler"):
        Sleb(compile=True).plan(problem)


@pytest.mark.parametrize("device", ["cpu", "balanced", "stream"])
def test_blocks_that_do_not_lie_on_one_gpu_are_not_compiled(device):
    context = context_of(random_source())
    context.config.model.device = device
    with pytest.raises(UserError, match=rf"method.compile=true .* model.device={device}"):
        Sleb(compile=True).check(context)
