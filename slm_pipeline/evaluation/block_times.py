"""How long the blocks of a model take for one generated token, on the device at hand, by their kind and width.

Ours. A kind is what layers share that take the same time: how far back they attend, and how wide they are. What a block
of a kind takes is what the whole model saves without those of that kind; what it saves with fewer key-value groups or
neurons, or without a sublayer, is measured on a few layers at a few widths. Both are medians of differences in rounds
in which the two took turns. Between measured widths the time is taken to be linear, and savings in attention and
feed-forward network to add up: widths for which a GPU is slow (not a multiple of 64, say) are worse than the table
says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from slm_pipeline.evaluation.alternated import alternate
from slm_pipeline.machine import memory
from slm_pipeline.surgery.ops.base import SUBLAYERS, LayerSize, Op
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_pipeline.models.view import ModelView
    from slm_pipeline.show.progress import ProgressBar

log = logging.getLogger(__name__)

_ROUNDS, _WARM_UP = 9, 2
NEW = 17  # tokens of a run: 16 are timed, the first comes with the prompt
NARROWED = 4  # layers that are narrowed at once
_SHARES = {"attention": (0.0, 0.25, 0.5, 0.75), "mlp": (0.0, 0.25, 0.5, 0.75, 0.875)}  # of the widths that are measured
_MULTIPLE = 64  # of which the measured numbers of neurons are, where there are enough


@dataclass(frozen=True)
class Kind:
    """Blocks that take the same time.

    Attributes:
        layers: of the dense model, ascending.
        widths: sublayer (attention, mlp) -> key-value groups or neurons.
        seconds: of one whole block.
        saved: sublayer -> pairs of a smaller width and the seconds that a block saves by it, from the widest on; 0 is
            without the sublayer.
    """

    layers: list[int]
    widths: Mapping[str, int]
    seconds: float
    saved: Mapping[str, Sequence[tuple[int, float]]]

    def block(self, widths: Mapping[str, int]) -> float:
        """Seconds of a block of these widths."""
        return max(0.0, self.seconds - sum(self._saved(part, widths[part]) for part in SUBLAYERS))

    def without(self, part: str) -> float:
        """Seconds that a block saves without a sublayer."""
        return self.saved[part][-1][1] if self.saved[part] else 0.0

    def per_unit(self, part: str) -> float:
        """Seconds that a key-value group or a neuron takes, the last of which the sublayer itself goes with."""
        narrow = [(width, seconds) for width, seconds in self.saved[part] if width] or list(self.saved[part])
        return narrow[-1][1] / (self.widths[part] - narrow[-1][0]) if narrow else 0.0

    def _saved(self, part: str, width: int) -> float:
        known = [(self.widths[part], 0.0), *self.saved[part]]
        for (wide, least), (narrow, most) in pairwise(known):
            if width >= narrow:
                return least + (most - least) * (wide - min(width, wide)) / (wide - narrow)
        return known[-1][1]


@dataclass(frozen=True)
class BlockTimes:
    """The table.

    Attributes:
        seconds: of one token in the whole dense model.
        kinds: every layer is of one.
        device: in words.
        settings: mode, batch_size and context.
    """

    seconds: float
    kinds: Sequence[Kind]
    device: str
    settings: Mapping[str, Any]

    @property
    def blocks(self) -> float:
        """Seconds in all blocks of the dense model."""
        return sum(len(kind.layers) * kind.seconds for kind in self.kinds)

    def of(self, plan: Plan, sizes: Sequence[LayerSize]) -> float:
        """Seconds of one token in the pruned model.

        Args:
            sizes: of its layers, as `measure_changes` gives them; what is idle is run all the same.
        """
        kinds = {layer: kind for kind in self.kinds for layer in kind.layers}
        blocks = sum(kinds[group[0]].block(_widths(size)) for group, size in zip(plan.layer_groups, sizes, strict=True))
        return max(0.0, self.seconds - self.blocks) + blocks

    def prices(self, dense: Sequence[LayerSize]) -> list[LayerSize]:
        """Of the dense model's layers, picoseconds in the place of parameters: a unit costs what it does on the way to
        the narrowest width that was measured."""
        kinds = {layer: kind for kind in self.kinds for layer in kind.layers}
        found = []
        for layer, size in enumerate(dense):
            kind = kinds[layer]
            whole = {part: round(1e12 * kind.without(part)) for part in SUBLAYERS}
            per_head, per_neuron = (max(1, round(1e12 * kind.per_unit(part))) for part in SUBLAYERS)
            other = max(0, round(1e12 * kind.seconds) - sum(whole.values()))
            found.append(
                replace(
                    size, attention=whole["attention"], mlp=whole["mlp"], other=other, per_head=per_head,
                    per_neuron=per_neuron,
                )
            )  # fmt: skip
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> BlockTimes:
        kinds = [
            Kind(**{**kind, "saved": {part: [(w, s) for w, s in pairs] for part, pairs in kind["saved"].items()}})
            for kind in said["kinds"]
        ]
        return cls(**{**said, "kinds": kinds})


def _widths(size: LayerSize) -> dict[str, int]:
    return {"attention": size.heads if size.attention else 0, "mlp": size.neurons if size.mlp else 0}


def measure(view: ModelView, *, mode: str, batch_size: int, context: int) -> BlockTimes:
    """The table of a dense model.

    Args:
        mode: eager | compile | graph, as of the efficiency measure.
        batch_size: texts that are generated at once.
        context: random tokens of each that were read before.
    """
    import torch

    from slm_pipeline.evaluation.efficiency import Setting, device_in_words, prompts
    from slm_pipeline.show.progress import ProgressBar
    from slm_pipeline.surgery.apply import layer_sizes

    sizes = layer_sizes(view)
    setting = Setting(batch_size, context, NEW)
    input_ids = prompts(view.model, None, setting, "")
    kinds: dict[Any, list[int]] = {}
    for layer, window in enumerate(view.attention_windows()):
        kinds.setdefault((window, *_widths(sizes[layer]).items()), []).append(layer)
    found, whole = [], 0.0
    pairs = [1 + sum(len(levels(*of)) for of in _widths(sizes[layers[0]]).items()) for layers in kinds.values()]
    with torch.no_grad(), ProgressBar(total=sum(pairs), desc="times of blocks") as progress:
        for layers in kinds.values():
            gone = layers if len(layers) < view.num_layers else layers[1:]
            dense, rest = _turns(view.model, _model(view, [Drop(tuple(gone))]), input_ids, mode)
            progress.update()
            whole = whole or median(dense)
            _warn_if_apart(dense, rest)
            widths, few = _widths(sizes[layers[0]]), layers[:NARROWED]
            saved = {part: _saved(view, few, part, widths[part], input_ids, mode, progress) for part in SUBLAYERS}
            found.append(Kind(layers, widths, _difference(dense, rest) / len(gone), saved))
    settings = {"mode": mode, "batch_size": batch_size, "context": context}
    return BlockTimes(whole, found, device_in_words(view.model), settings)


def _saved(
    view: ModelView, layers: list[int], part: str, width: int, input_ids: Tensor, mode: str, progress: ProgressBar
) -> list[tuple[int, float]]:
    """`Kind.saved` of a sublayer. Less is never slower: what seems so is noise, or a width that runs badly."""
    others = tuple(layer for layer in range(view.num_layers) if layer not in layers)
    alone: list[Op] = [Drop(others)] if others else []
    full, pairs, least = _model(view, alone), list[tuple[int, float]](), 0.0
    for narrow in levels(part, width):
        ops, tensors = [*alone], dict[str, Any]()
        for layer in layers:
            op, kept = _narrowing(layer, part, narrow)
            ops.append(op)
            tensors |= kept
        wide, slim = _turns(full, _model(view, ops, tensors), input_ids, mode)
        least = max(least, _difference(wide, slim) / len(layers))
        pairs.append((narrow, least))
        progress.update()
    return pairs


def levels(part: str, width: int) -> list[int]:
    """Smaller widths of a sublayer that are measured, descending to 0; none of one that is not there."""
    step = _MULTIPLE if part == "mlp" and width >= 8 * _MULTIPLE else 1
    return sorted({int(share * width) // step * step for share in _SHARES[part]} - {width}, reverse=True)


def _narrowing(layer: int, part: str, width: int) -> tuple[Op, dict[str, Any]]:
    import numpy as np

    if not width:
        return DropSublayer((layer,), part, "custom"), {}
    name, kept = f"resize.{layer}", np.arange(width)
    if part == "attention":
        return Resize((layer,), name, heads=width), {f"{name}.heads": kept}
    return Resize((layer,), name, neurons=width), {f"{name}.neurons": kept}


def _model(view: ModelView, ops: Sequence[Op], tensors: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The model that these operations leave, beside the dense one."""
    from slm_pipeline.surgery.apply import apply_beside

    about = {"name": "dense", "fingerprint": "", "num_layers": view.num_layers}
    plan = Plan(about, "block_times", {}, None, [*ops], tensors=dict(tensors or {}))
    model: PreTrainedModel = apply_beside(plan, view)
    return model


def _turns(
    first: PreTrainedModel, second: PreTrainedModel, input_ids: Tensor, mode: str
) -> tuple[list[float], list[float]]:
    """Seconds of one token of two models, round by round."""
    from slm_pipeline.evaluation.decoding import generation

    runs: dict[str, Any] = {}
    for name, model in (("first", first), ("second", second)):
        made = generation(mode, model, input_ids, NEW, pad_token_id=0)
        runs |= {f"{name} prompt": made.read, f"{name} whole": made.run}
    seconds = alternate(runs, rounds=_ROUNDS, warm_up=_WARM_UP)
    runs.clear()
    memory.free()
    found = [
        [(whole - read) / (NEW - 1) for whole, read in zip(seconds[f"{n} whole"], seconds[f"{n} prompt"], strict=True)]
        for n in ("first", "second")
    ]
    return found[0], found[1]


def _warn_if_apart(slow: Sequence[float], fast: Sequence[float]) -> None:
    """Say so where the middle half of the rounds lies further apart than a tenth of what they measure."""
    low, middle, high = (1000 * of for of in quantiles([a - b for a, b in zip(slow, fast, strict=True)], n=4))
    if high - low > 0.1 * abs(middle):
        log.warning(
            "time_blocks: of %d rounds the middle half found that blocks take %.3g to %.3g ms a token: a plan's speedup"
            " is predicted no better than that. Nothing else should run on this machine meanwhile",
            len(slow), low, high,
        )  # fmt: skip


def _difference(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over rounds, at least 0."""
    return max(0.0, median(one - other for one, other in zip(slow, fast, strict=True)))
