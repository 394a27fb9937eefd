"""Depth and width of a pruned model as one thing, and how good a model of some shape is after a refit.

A shape says how many key-value groups and neurons each dense layer keeps. `Fitting` turns one into blocks: from the
lowest layer up, the units that the others can best make up for go (optimal brain surgeon), and the projections that are
left get new weights by least squares, so that a shape is judged by what it can do once it is repaired.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slm_pipeline.engine import least_squares
from slm_pipeline.engine.allocation import lower_hull
from slm_pipeline.engine.refit import Refit
from slm_pipeline.engine.sensitivity import Sensitivity
from slm_pipeline.engine.streams import Streams, Sums, pass_all, spans
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops import LayerSize
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.resize import resize

Shape = tuple[tuple[int, int], ...]  # of each dense layer: key-value groups and neurons that stay; (0, 0): it is gone
_AT_A_TIME = 16  # neurons that go in a round, between two exact updates


def parameters(shape: Shape, sizes: Sequence[LayerSize]) -> int:
    """Of the layers of a model of this shape."""
    total = 0
    for (heads, neurons), size in zip(shape, sizes, strict=True):
        if heads or neurons:
            total += size.other
            total += size.attention - (size.heads - heads) * size.per_head if heads else 0
            total += size.mlp - (size.neurons - neurons) * size.per_neuron if neurons else 0
    return total


def originals(shape: Shape) -> list[list[int]]:
    """The layers that stay, each as the list of the dense ones that it is made of."""
    return [[layer] for layer, (heads, neurons) in enumerate(shape) if heads or neurons]


@dataclass(frozen=True)
class Fitted:
    """A shape filled with weights.

    Attributes:
        blocks: of the model, input side first.
        kept: (layer, sublayer) -> [kept] int64 units that stay, ascending, where some went.
        kl: mean KL divergence from the dense model on the text that chooses, in nats.
        same: share of its tokens whose most likely next one is the dense model's.
    """

    blocks: list[Block]
    kept: dict[tuple[int, str], Tensor]
    kl: float
    same: float


@dataclass(frozen=True)
class Fitting:
    """How shapes are filled.

    Attributes:
        view: the dense model; never changed.
        fit, choose: [N, length] int64 tokens that weights are fitted to, and that choose ridges and shapes.
        sizes: of the dense layers.
        how: the least squares.
        ridge: of the choice of units, relative to the mean diagonal of the Gram matrix.
        fixed: layer -> [neurons] bool of those that stay as long as the network does.
    """

    view: ModelView
    fit: Tensor
    choose: Tensor
    sizes: Sequence[LayerSize]
    how: Refit = field(default_factory=Refit)
    ridge: float = 0.01
    fixed: Mapping[int, Tensor] = field(default_factory=dict)

    def fill(self, shape: Shape, num_samples: int) -> Fitted:
        """A model of this shape, fitted to the first samples of ``fit``."""
        fit, choose = Streams(self.view, self.fit[:num_samples]), Streams(self.view, self.choose)
        groups = originals(shape)
        blocks: list[Block] = []
        kept: dict[tuple[int, str], Tensor] = {}
        for (layer, *_), span in zip(groups, spans(groups, self.view.num_layers), strict=True):
            for streams in (fit, choose):
                streams.look_ahead(*span)
            block = Block(layer)
            left = dict(zip(SUBLAYERS, shape[layer], strict=True))
            for sublayer, number in left.items():
                block = block if number else block.lacking(sublayer)
            whole = {"attention": self.sizes[layer].heads, "mlp": self.sizes[layer].neurons}
            as_dense = fit.pruned is fit.dense and left == whole and span == (layer, layer + 1)
            for sublayer in (part for part, number in left.items() if number and not as_dense):
                sums = self.how.sums(fit, block, sublayer)
                if left[sublayer] < whole[sublayer]:
                    order = self._order(fit, block, sublayer, sums, whole[sublayer] - left[sublayer])
                    stay = _stay(order, whole[sublayer])
                    kept[layer, sublayer] = stay
                    block, sums = self._narrowed(block, sublayer, stay, whole[sublayer], sums)
                    if self.view.output_norm(layer, sublayer) is not None:  # targets go by what is put out
                        sums = self.how.sums(fit, block, sublayer)
                block, _ = self.how.projection(fit, block, sublayer, sums, self.how.sums(choose, block, sublayer))
            blocks.append(block)
            for streams in (fit, choose):
                streams.pass_through(block)
        return Fitted(blocks, kept, *choose.divergence())

    def judge(self, shape: Shape, fitted: Fitted, input_ids: Tensor) -> tuple[float, float]:
        """KL divergence and agreement, as in `Fitted`, on any other text."""
        return pass_all(Streams(self.view, input_ids), fitted.blocks, originals(shape)).divergence()

    def damages(
        self, places: Collection[tuple[int, str]], levels: Mapping[str, Sequence[int]], input_ids: Tensor
    ) -> Iterator[tuple[tuple[int, str], dict[int, float]]]:
        """What it costs to narrow one sublayer of the dense model alone, refitted to put out what it did.

        Args:
            places: the sublayers, as (layer, attention | mlp).
            levels: sublayer -> numbers of units that stay; 0: it is gone.
            input_ids: [N, length] int64 tokens on which the KL divergence, in nats, is measured.

        Yields:
            Of each place, from the input up: units that stay -> KL divergence.
        """
        from tqdm import tqdm

        sensitivity, streams = Sensitivity(self.view, input_ids), Streams(self.view, self.fit)
        own = Refit(ridges=self.how.ridges, weighting=self.how.weighting, target="own_output")
        for layer in tqdm(range(max(layer for layer, _ in places) + 1), desc="sensitivity", disable=None):
            streams.look_ahead(layer, layer + 1)
            for sublayer in (part for part in SUBLAYERS if (layer, part) in places):
                block = Block(layer)
                number = self.sizes[layer].heads if sublayer == "attention" else self.sizes[layer].neurons
                sums = own.sums(streams, block, sublayer)
                order = self._order(streams, block, sublayer, sums, number - 1)
                variants = [
                    self._variant(streams, block, sublayer, _stay(order[: number - left], number), number, sums)
                    if left
                    else block.lacking(sublayer)
                    for left in levels[sublayer]
                ]
                yield (layer, sublayer), dict(zip(levels[sublayer], sensitivity.damages(variants), strict=True))
            streams.pass_through(Block(layer))

    def _variant(self, streams: Streams, block: Block, sublayer: str, stay: Tensor, number: int, sums: Sums) -> Block:
        block, sums = self._narrowed(block, sublayer, stay, number, sums)
        penalty = least_squares.penalty(sums.gram, self.ridge)
        prior = streams.weight(block, sublayer)
        return streams.put(block, sublayer, least_squares.solve(sums.gram, sums.moment, prior=prior, penalty=penalty))

    def _order(self, streams: Streams, block: Block, sublayer: str, sums: Sums, remove: int) -> Tensor:
        """Units in the order in which they go, by the optimal brain surgeon around the best weights for the target."""
        number = self.sizes[block.body].heads if sublayer == "attention" else self.sizes[block.body].neurons
        penalty = least_squares.penalty(sums.gram, self.ridge)
        prior = streams.weight(block, sublayer)
        weight = least_squares.solve(sums.gram, sums.moment, prior=prior, penalty=penalty)
        columns = sums.gram.shape[0] - (streams.bias(block, sublayer) is not None)  # a bias stays
        fixed = self.fixed.get(block.body) if sublayer == "mlp" else None
        free = number if fixed is None else number - int(fixed.sum())
        if remove > free:  # then what was to stay goes too, last
            fixed = None
        return least_squares.removal_order(
            weight[:, :columns],
            sums.gram[:columns, :columns],
            remove,
            size=columns // number,
            penalty=penalty,
            at_a_time=_AT_A_TIME if sublayer == "mlp" else 1,
            fixed=fixed,
        )

    def _narrowed(self, block: Block, sublayer: str, stay: Tensor, number: int, sums: Sums) -> tuple[Block, Sums]:
        """The block with these units of a sublayer alone, and the sums of what enters its last projection then."""
        if len(stay) == number:
            return block, sums
        is_attention = sublayer == "attention"
        name = f"{self.view.output_name(sublayer)}.weight"
        columns = block.parameter(self.view, name).shape[1]
        found = torch.arange(columns).view(number, -1)[stay].flatten()
        if len(sums.gram) > columns:  # the bias
            found = torch.cat([found, torch.tensor([columns])])
        block = resize(
            self.view, block, heads=stay if is_attention else None, neurons=None if is_attention else stay, biases={}
        )
        return block, sums.of(found)


def _stay(order: Tensor, number: int) -> Tensor:
    """[kept] int64, ascending: of ``number`` units those that are not in ``order``."""
    stays = torch.ones(number, dtype=torch.bool)
    stays[order] = False
    return stays.nonzero().flatten()


def allocate(
    damages: Mapping[tuple[int, str], Mapping[int, float]], sizes: Sequence[LayerSize], remove: int, multiple_of: int
) -> Shape | None:
    """The shape with the least sum of damages that lacks at least ``remove`` parameters; None if there is none.

    Along the lower convex hull of each sublayer's damage over its parameters a Lagrange multiplier finds the optimum:
    stretches of all hulls go by their damage per parameter, the lowest first. The last, of neurons, goes in part.

    Args:
        damages: (layer, sublayer) -> units that stay -> damage when it alone is so narrow.
    """
    left = {place: _whole(sizes[place[0]], place[1]) for place in damages}
    stretches = []
    for place, found in damages.items():
        points = ((_gain(sizes[place[0]], place[1], number), number, damage) for number, damage in found.items())
        stretches += [(slope, place, high, low) for slope, high, low in lower_hull(points, left[place])]
    shape = {(layer, part): _whole(size, part) for layer, size in enumerate(sizes) for part in SUBLAYERS}
    missing = remove
    for _, place, high, low in sorted(stretches, key=lambda stretch: stretch[0]):
        size, part = sizes[place[0]], place[1]
        step = multiple_of if part == "mlp" else 1
        enough = (n for n in range(high, low, -1) if n % step == 0 and _gained(size, part, high, n) >= missing)
        shape[place] = next(enough, low)
        missing -= _gained(size, part, high, shape[place])
        if missing <= 0:
            return tuple((shape[layer, "attention"], shape[layer, "mlp"]) for layer in range(len(sizes)))
    return None


def _gained(size: LayerSize, sublayer: str, high: int, low: int) -> int:
    return _gain(size, sublayer, low) - _gain(size, sublayer, high)


def _whole(size: LayerSize, sublayer: str) -> int:
    return size.heads if sublayer == "attention" else size.neurons


def _gain(size: LayerSize, sublayer: str, left: int) -> int:
    """Parameters less when so many units of a sublayer are left."""
    all_of_it = size.attention if sublayer == "attention" else size.mlp
    per_unit = size.per_head if sublayer == "attention" else size.per_neuron
    return (_whole(size, sublayer) - left) * per_unit if left else all_of_it
