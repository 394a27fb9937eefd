"""Nothing in the package runs code that a file holds: a pickle is read only of what this job itself has dumped."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import slm_pipeline
from slm_pipeline.errors import UserError
from slm_pipeline.recovery import sharding

FILES = sorted(Path(slm_pipeline.__file__).parent.rglob("*.py"))
UNSAFE = ("pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "torch.distributed.checkpoint")
ALLOWED = {  # none comes from a file
    ("errors.py", "pickle"),  # what it loads it has dumped itself, in memory
    ("together.py", "pickle"),  # calls of the job's first process, over a connection on which both know a secret
}


def test_every_torch_load_reads_weights_only_and_no_module_unpickles():
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                modules = []
            found |= {(file.name, module) for module in modules if module.startswith(UNSAFE)}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [ast.unparse(keyword) for keyword in node.keywords if keyword.arg == "weights_only"]
                assert safe == ["weights_only=True"], f"{file}:{node.lineno}"
    assert found == ALLOWED


def test_a_sharded_trainings_state_is_safetensors_and_comes_back(tmp_path):
    def trained():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))

    def step(model, optimizer):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = trained()
    step(model, optimizer)
    sharding.save_optimizer(optimizer, tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as content:
        assert "0.exp_avg" in content.keys()  # noqa: SIM118  # no mapping
    again, resumed = trained()
    again.load_state_dict(model.state_dict())
    resumed.param_groups[0]["lr"] = 5.0  # comes back with the rest
    sharding.load_optimizer(resumed, tmp_path)
    for pair in ((model, optimizer), (again, resumed)):
        step(*pair)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    file.unlink()
    with pytest.raises(UserError, match="has no optimizer_0_of_1.safetensors: another version began this training"):
        sharding.load_optimizer(resumed, tmp_path)
