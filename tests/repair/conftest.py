"""What a repair is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slm_pipeline.models.view import ModelView
from slm_pipeline.repair.base import RepairProblem
from slm_pipeline.store import unfinished
from slm_pipeline.surgery.plan import Plan


@pytest.fixture
def make_problem(tmp_path: Path) -> Any:
    """A function of a model and a plan: what a repair is to do; pieces are kept in ``out``."""

    def make(model: Any, plan: Plan, *, num_samples: int = 20, out: Path = tmp_path) -> RepairProblem:
        out.mkdir(exist_ok=True)
        ids = torch.randint(0, 256, (num_samples, 12), generator=torch.Generator().manual_seed(2))
        return RepairProblem(ModelView(model), plan, ids, out, lambda *names: unfinished.note_complete(out, *names))

    return make
