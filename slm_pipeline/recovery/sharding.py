"""A model spread over the processes that train it (FSDP): each holds a part of every weight, gradient and moment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Leave each process its part of every parameter, in place.

    A block's weights are put together while it runs, those outside all blocks (embedding, head) for a whole forward
    or backward pass. Whoever keeps a reference to an old parameter keeps it in memory.
    """
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else the rest is whole when it is saved


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all processes, which all must ask for it; as it is if it is not spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if ``like`` is spread."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Each process writes its part of the optimizer's state."""
    checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what `save_optimizer` wrote."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
