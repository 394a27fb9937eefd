"""A model spread over the processes that train it (FSDP): each holds a part of every weight, gradient and moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from slm_pipeline.errors import UserError
from slm_pipeline.recovery import collective


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], prepare: Callable[[nn.Module], Any], dtype: torch.dtype
) -> None:
    """Leave each process its part of every parameter, in place, one block after the other.

    Blocks may lie anywhere, in mapped files for instance: at a time one of them is whole where it trains, so that a
    device holds the parts and a block, never the model. Later a block's weights are put together while it runs, those
    outside all blocks (embedding, head) for a whole forward or backward pass. Whoever keeps a reference to an old
    parameter keeps it in memory.

    Args:
        prepare: called with each block, and with the model when its blocks are spread, where it trains and whole.
        dtype: in which weights are put together and computed with; gradients are summed in float32. Autocast alone
            would keep a copy of every weight in it, whole, until the backward pass.
    """
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        prepare(block.to(device))
        fully_shard(block, mesh=mesh, mp_policy=policy)
    prepare(model.to(device))
    # without the last argument the rest would be whole when it is saved
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all processes, which all must ask for it; as it is if it is not spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if ``like`` is spread."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Each process writes its part of the optimizer's state, as safetensors: a pickle runs what it holds when read."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": _part(value).detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _file(), metadata={"param_groups": json.dumps(state["param_groups"])})
    collective.wait()  # the checkpoint is whole when all have written


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what `save_optimizer` wrote, with as many processes.

    Raises:
        UserError: there is no such file: another version, or another number of processes, wrote the checkpoint.
    """
    if not (folder / _file()).is_file():
        raise UserError(
            f"{folder} has no {_file()}: another version began this training, or another number of processes than these"
            f" {collective.count()}; start as many as then, or delete {folder.parent}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(folder / _file(), framework="pt") as file:
        groups = json.loads(file.metadata()["param_groups"])
        for key in file.keys():  # noqa: SIM118  # no mapping
            index, _, name = key.partition(".")
            values = state.setdefault(int(index), {})
            values[name] = _put_together(file.get_tensor(key), parameters[int(index)])
    for group in groups:
        group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _file() -> str:
    return f"optimizer_{collective.rank()}_of_{collective.count()}.safetensors"


def _part(value: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def _put_together(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor, spread as ``parameter`` is, of which ``part`` is this process's; a step count is the same in all."""
    if not isinstance(parameter, DTensor) or part.ndim != parameter.ndim:
        return part
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
