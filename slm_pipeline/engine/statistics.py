"""One pass over the calibration text that serves every method which only looks at activations.

Everything is reduced while it streams: no states are kept, no tokens x tokens matrix is made. Similarities between
residual streams are taken per token from the [layers + 1, layers + 1] Gram matrix of that token's states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import batches, dense_passes
from slm_pipeline.errors import UserError
from slm_pipeline.machine.ranks import Share
from slm_pipeline.models.view import ModelView
from slm_pipeline.show.progress import ProgressBar

MAX_BATCH_TOKENS = 2048  # the states of all layers are in memory for one batch, in float32


@dataclass
class Statistics:
    """What one pass over N samples of T tokens says about a model of L blocks. All float32, on the CPU.

    Index 0 of a [L + 1, L + 1] matrix is the embedding output, index i the output of block i - 1; the last is taken
    before the final norm.

    Attributes:
        cosine: [L + 1, L + 1] cosine of residual states, mean over all tokens.
        angle: [L + 1, L + 1] arccos(cosine) / pi, mean over all tokens, in [0, 1].
        angle_last: the same over each sample's last token alone.
        attention_mean, attention_mean_abs, attention_variance: for each layer [heads x head_dim] of the input of the
            attention's output projection, over all tokens; [0] of a layer without attention.
        mlp_mean, mlp_mean_abs, mlp_variance: for each layer [intermediate size] of the input of the feed-forward's last
            projection; [0] of a layer without one.
    """

    cosine: Tensor
    angle: Tensor
    angle_last: Tensor
    attention_mean: list[Tensor]
    attention_mean_abs: list[Tensor]
    attention_variance: list[Tensor]
    mlp_mean: list[Tensor]
    mlp_mean_abs: list[Tensor]
    mlp_variance: list[Tensor]

    def save(self, path: Path) -> None:
        """Write a safetensors file; layers that are alike are one tensor [L, channels], others one each."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                tensors[name] = value.contiguous()
            elif len({layer.shape for layer in value}) == 1:
                tensors[name] = torch.stack(value)
            else:
                tensors |= {f"{name}.{layer}": of.contiguous() for layer, of in enumerate(value)}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        from safetensors.torch import load_file

        tensors = load_file(path)
        depth = len(tensors["cosine"]) - 1
        channels = {item.name for item in fields(cls)} - {"cosine", "angle", "angle_last"}
        found: dict[str, Any] = {
            name: [*tensors[name]] if name in tensors else [tensors[f"{name}.{layer}"] for layer in range(depth)]
            for name in channels
        }
        return cls(cosine=tensors["cosine"], angle=tensors["angle"], angle_last=tensors["angle_last"], **found)


class Observer(Protocol):
    """Somebody who looks on at the pass.

    Attributes:
        tokens_together: how many tokens, one after the other, it must be shown in one process.
    """

    tokens_together: int

    def observe(self, states: Sequence[Tensor]) -> None:
        """Take in the L + 1 states ([batch, T, d]) of a batch; called before the next one is run."""

    def gather(self, share: Share) -> None:
        """Add what the other processes have seen; called once, at the end."""


@torch.no_grad()
def collect(view: ModelView, input_ids: Tensor, observer: Observer | None = None) -> Statistics:
    """Run the model once over ``input_ids`` ([N, T] int64) and reduce what it shows. Processes that work together
    share out the batches; sums are those of one process, up to the order in which float64 numbers are added.

    Args:
        observer: sees the states too.
    """
    depth = view.num_layers
    attention = [ChannelMoments() for _ in range(depth)]
    mlp = [ChannelMoments() for _ in range(depth)]
    hooks = []
    for layer in range(depth):
        if not view.lacks(layer, "attention"):
            hooks.append(view.attention_output(layer).register_forward_pre_hook(attention[layer].observe))
        if not view.lacks(layer, "mlp"):
            hooks.append(view.mlp_output(layer).register_forward_pre_hook(mlp[layer].observe))
    cosine, angle, angle_last = (torch.zeros(depth + 1, depth + 1, dtype=torch.float64) for _ in range(3))
    try:
        text, share = _text_of_process(input_ids, 1 if observer is None else observer.tokens_together)
        for runner in ProgressBar(dense_passes(view, text), total=len(text), desc="calibration pass"):
            states = runner.states
            check_finite(states)
            if observer is not None:
                observer.observe(states)
            cosines = token_cosines(states)
            angles = cosines.clamp(-1, 1).arccos() / torch.pi
            cosine += cosines.sum(dim=(0, 1), dtype=torch.float64).cpu()
            angle += angles.sum(dim=(0, 1), dtype=torch.float64).cpu()
            angle_last += angles[:, -1].sum(dim=0, dtype=torch.float64).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    cosine, angle, angle_last = (share.summed(values) for values in (cosine, angle, angle_last))
    for moments in (*attention, *mlp):
        moments.gather(share)
    if observer is not None:
        observer.gather(share)
    return Statistics(
        cosine=(cosine / input_ids.numel()).float(),
        angle=(angle / input_ids.numel()).float(),
        angle_last=(angle_last / len(input_ids)).float(),
        attention_mean=[moments.mean for moments in attention],
        attention_mean_abs=[moments.mean_abs for moments in attention],
        attention_variance=[moments.variance for moments in attention],
        mlp_mean=[moments.mean for moments in mlp],
        mlp_mean_abs=[moments.mean_abs for moments in mlp],
        mlp_variance=[moments.variance for moments in mlp],
    )


def _text_of_process(input_ids: Tensor, tokens_together: int) -> tuple[list[Tensor], Share]:
    """This process's batches, which follow one another, and what it shares: units of as many batches as have a
    multiple of ``tokens_together`` tokens; what is left at the end belongs to the last."""
    text = batches(input_ids, MAX_BATCH_TOKENS)
    unit = tokens_together // math.gcd(tokens_together, text[0].numel())
    number = max(1, input_ids.numel() // (unit * text[0].numel()))
    share = Share.of(number)
    first, end = share.numbers.start, share.numbers.stop
    return text[first * unit : None if end == number else end * unit], share


def check_finite(states: Sequence[Tensor], text: str = "the calibration text") -> None:
    """Raise `UserError` unless all of the L + 1 states are finite."""
    for layer, state in enumerate(states[1:]):
        if not bool(state.isfinite().all()):
            raise UserError(
                f"the states after layer {layer} are not finite on {text}: the weights are damaged, or the model"
                " overflows in its dtype; try model.dtype=bfloat16 or model.dtype=float32"
            )


def token_cosines(states: Sequence[Tensor]) -> Tensor:
    """L + 1 states [batch, length, d] -> [batch, length, L + 1, L + 1] float32 cosines, token by token."""
    device = states[0].device
    stacked = torch.stack([torch.nn.functional.normalize(s.to(device).float(), dim=-1) for s in states], dim=2)
    return stacked @ stacked.mT


class ChannelMoments:
    """Streaming mean, mean of absolute values and variance of a linear layer's input channels, over all tokens."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._sum_abs: Tensor
        self._sum_squares: Tensor

    def observe(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Take in one batch; a forward pre-hook. The input is [..., channels]."""
        rows = args[0].flatten(0, -2)
        added = [part.sum(dim=0, dtype=torch.float64) for part in (rows, rows.abs(), rows.float().square())]
        if self._sum is None:
            self._sum, self._sum_abs, self._sum_squares = added
        else:
            self._sum += added[0]
            self._sum_abs += added[1]
            self._sum_squares += added[2]
        self._count += len(rows)

    def gather(self, share: Share) -> None:
        """Add what the other processes have seen."""
        if self._sum is not None and share.divided:
            self._sum, self._sum_abs, self._sum_squares = map(
                share.summed, (self._sum, self._sum_abs, self._sum_squares)
            )
            self._count = int(share.summed(torch.tensor(self._count)))

    @property
    def mean(self) -> Tensor:
        if self._sum is None:
            return torch.empty(0)
        return (self._sum / self._count).float().cpu()

    @property
    def mean_abs(self) -> Tensor:
        if self._sum is None:
            return torch.empty(0)
        return (self._sum_abs / self._count).float().cpu()

    @property
    def variance(self) -> Tensor:
        """Population variance, at least 0."""
        if self._sum is None:
            return torch.empty(0)
        mean = self._sum / self._count
        return (self._sum_squares / self._count - mean.square()).clamp_min(0).float().cpu()
