"""A machine on which a token takes a known time."""

from __future__ import annotations

from typing import Any

from slm_pipeline.evaluation.block_times import NEW
from slm_pipeline.models.view import ModelView

REST, PER_LAYER, PER_GROUP, PER_NEURON = 5.0, 0.25, 1.0, 0.125
SLIDES = 0.5  # more for a layer that attends to all than for one that slides


def of_model(model: Any) -> float:
    """Seconds of one token."""
    view = ModelView(model)
    layers = range(view.num_layers)
    sees_all = sum(window is None for window in view.attention_windows())
    groups, neurons = sum(map(view.kv_heads_of, layers)), sum(map(view.neurons_of, layers))
    return REST + PER_LAYER * len(layers) + SLIDES * sees_all + PER_GROUP * groups + PER_NEURON * neurons


def pretended(runs: dict[str, Any], **_: Any) -> dict[str, list[float]]:
    """In place of `alternate`: reading takes 3 s; the second of three rounds is 10 s slower for all."""
    seconds = {}
    for name, run in runs.items():
        took = 3.0 + ((NEW - 1) * of_model(run.__self__.model) if name.endswith("whole") else 0.0)
        seconds[name] = [took, took + 10.0, took]
    return seconds
