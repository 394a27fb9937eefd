"""A plan.json that is good, and what `Plan.read` makes of it with some of it changed."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

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
