"""A plan.json that is good, and what `Plan.read` makes of it with some of it changed."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

GOOD = {
    "format": 1,
    "model": {"name": "m", "fingerprint": "f", "num_layers": 6},
    "method": "slm",
    "options": {},
    "calibration": {},
    "layer_groups": [[0], [1], [2, 3, 4], [5]],
    "dropped": [],
    "ops": [{"op": "merge", "layers": [2, 3, 4], "rule": "official"}],
    "scores": {},
    "threshold": 0.8,
}


def read(tmp_path, **changes):
    (tmp_path / "plan.json").write_text(json.dumps({**GOOD, **changes}))
    return Plan.read(tmp_path / "plan.json")


def read_with(tmp_path, tensors, **changes):
    save_file({name: np.asarray(value) for name, value in tensors.items()}, tmp_path / "plan.safetensors")
    return read(tmp_path, **changes)


def narrowing(kept, *others, biases=None, num_layers=6):
    """A plan by which the layers keep these key-value groups and neurons; ``others`` come first."""
    tensors, ops = {}, list(others)
    for layer, (heads, neurons) in kept.items():
        name = f"resize.{layer}"
        for unit, units in (("heads", heads), ("neurons", neurons)):
            if units is not None:
                tensors[f"{name}.{unit}"] = np.array(units)
        numbers = (None if units is None else len(units) for units in (heads, neurons))
        constants = (biases or {}).get(layer, {})
        tensors |= {f"{name}.{sublayer}_bias": constant for sublayer, constant in constants.items()}
        ops.append(Resize((layer,), name, *numbers, biases=tuple(constants) or None))
    plan = Plan({"name": "m", "fingerprint": "f", "num_layers": num_layers}, "test", {}, None, ops, tensors=tensors)
    plan.check("the plan")
    return plan
