"""Depth and width of a pruned model as one thing, and how good a model of some shape is after a refit.

A shape says how many key-value groups and neurons each dense layer keeps. `Fitting` turns one into blocks: from the
lowest layer up some units go (`Fitting.units` says which neurons), and the projections that are left get new weights by
least squares, so that a shape is judged by what it can do once it is repaired.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
        shape: of the model.
        blocks: of the model, input side first; none if they were not to be kept.
        kept: (layer, sublayer) -> [kept] int64 units that stay, ascending, where some went.
        score: what it is judged by, lower is better.
        kl: mean KL divergence from the dense model on the text that chooses, in nats.
        same: share of its tokens whose most likely next one is the dense model's.
    """

    shape: Shape
    blocks: list[Block]
    kept: dict[tuple[int, str], Tensor]
    score: float
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
        whole: those of shapes that have all sublayers; None: ``how``.
        ridge: of the choice of units, relative to the mean diagonal of the Gram matrix.
        units: which neurons go: obs, those that the others can best make up for, towards the target | leverage, those
            whose values are most nearly combinations of the others', whatever the target (`least_squares`).
        fixed: layer -> [neurons] bool of those that stay as long as the network does.
        objective: kl_divergence | next_token_loss: what a shape is judged by, on ``choose``.
        refitted: whether what stays gets new weights; else a shape is judged as it is before repair.
    """

    view: ModelView
    fit: Tensor
    choose: Tensor
    sizes: Sequence[LayerSize]
    how: Refit = field(default_factory=Refit)
    ridge: float = 0.01
    units: str = "obs"
    fixed: Mapping[int, Tensor] = field(default_factory=dict)
    objective: str = "kl_divergence"
    refitted: bool = True
    whole: Refit | None = None

    def fill(self, shape: Shape, num_samples: int, *, keep: bool = True) -> Fitted:
        """A model of this shape, fitted to the first samples of ``fit``; its blocks, in main memory, if they are to be
        kept."""
        fit, choose = Streams(self.view, self.fit[:num_samples]), Streams(self.view, self.choose)
        groups, how = originals(shape), self.how_of(shape)
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
                if left[sublayer] == whole[sublayer] and how.target == "own_output":
                    continue  # it writes what it is to write
                sums = how.sums(
                    fit, block, sublayer, plain=self._by_leverage(sublayer) and left[sublayer] < whole[sublayer]
                )
                if left[sublayer] < whole[sublayer]:
                    order = self._order(fit, block, sublayer, sums, whole[sublayer], whole[sublayer] - left[sublayer])
                    stay = _stay(order, whole[sublayer])
                    kept[layer, sublayer] = stay
                    block, sums = self._narrowed(block, sublayer, stay, whole[sublayer], sums)
                if self.refitted:
                    block, _ = how.writing(fit, choose, block, sublayer, sums)
            for streams in (fit, choose):
                streams.pass_through(block)
            if keep:
                blocks.append(replace(block, replaced={name: value.cpu() for name, value in block.replaced.items()}))
        kl, same = choose.divergence()
        score = kl if self.objective == "kl_divergence" else choose.loss(self.choose)
        return Fitted(shape, blocks, kept, score, kl, same)

    def how_of(self, shape: Shape) -> Refit:
        """The least squares with which a shape is filled."""
        return self.whole if self.whole is not None and all(map(all, shape)) else self.how

    def how_beside(self, base: Fitted | None) -> Refit:
        """That of ``base``, or of shapes that have all sublayers."""
        return self.how_of(base.shape) if base else self.whole or self.how

    def judge(self, fitted: Fitted, input_ids: Tensor) -> tuple[float, float]:
        """KL divergence and agreement, as in `Fitted`, on any other text."""
        return pass_all(Streams(self.view, input_ids), fitted.blocks, originals(fitted.shape)).divergence()

    def damages(
        self,
        places: Collection[tuple[int, str]],
        levels: Mapping[str, Sequence[int]],
        input_ids: Tensor,
        base: Fitted | None = None,
    ) -> Iterator[tuple[tuple[int, str], dict[int, float]]]:
        """What it costs to narrow one sublayer alone, refitted, if at all, to put out what it did, with tokens weighted
        as where a shape like the base's is filled.

        Args:
            places: the sublayers, as (layer, attention | mlp); of ``base`` those that it has.
            levels: sublayer -> numbers of units that stay; 0: it is gone. Of them those that are fewer than there are.
            input_ids: [N, length] int64 tokens on which the objective is measured.
            base: the model whose sublayers are narrowed; None: the dense one.

        Yields:
            Of each place, from the input up: units that stay -> by how much the objective grows, at least.
        """
        from slm_pipeline.show.progress import ProgressBar

        dense = [Block(layer) for layer in range(self.view.num_layers)]
        blocks, kept = (dense, {}) if base is None else (base.blocks, base.kept)
        sensitivity = Sensitivity(self.view, input_ids, None if base is None else blocks, self.objective)
        streams = Streams(self.view, self.fit)
        before = sensitivity.damage()
        own = replace(self.how_beside(base), target="as_it_is")
        last = max((layer for layer, _ in places), default=-1)
        groups = [[block.body] for block in blocks]
        ends = spans(groups, self.view.num_layers)
        for block, span in zip(ProgressBar(blocks, desc="sensitivity"), ends, strict=True):
            if block.body > last:
                return
            block = block.on(self.view.device_of(block.body))
            streams.look_ahead(*span)
            for sublayer in (part for part in SUBLAYERS if (block.body, part) in places):
                here = kept.get((block.body, sublayer), torch.arange(self._whole(block.body, sublayer)))
                sums = own.sums(streams, block, sublayer, plain=self._by_leverage(sublayer))
                order = self._order(streams, block, sublayer, sums, len(here), len(here) - 1, here)
                sums = replace(sums, plain=None)  # an n x n matrix less while there are variants
                fewer = [number for number in levels[sublayer] if number < len(here)]
                found = {number: float("inf") for number in fewer}
                for refitted in self._ways(streams, block, sublayer) if fewer else ():
                    variants = (
                        self._variant(
                            streams, block, sublayer, _stay(order[: len(here) - left], len(here)), here, sums, refitted
                        )
                        if left
                        else block.lacking(sublayer)
                        for left in fewer
                    )
                    damages = sensitivity.damages(block.body, variants)
                    found = {n: min(found[n], of - before) for n, of in zip(fewer, damages, strict=True)}
                yield (block.body, sublayer), found
            streams.pass_through(block)

    def _ways(self, streams: Streams, block: Block, sublayer: str) -> list[bool]:
        """Whether a narrowed sublayer is measured with new weights; in front of a norm, whose divisor a fit takes to
        stay what it is, also without."""
        return [True, False] if self.refitted and streams.output_norm(block, sublayer) else [self.refitted]

    def _variant(
        self,
        streams: Streams,
        block: Block,
        sublayer: str,
        stay: Tensor,
        here: Tensor,
        sums: Sums,
        refitted: bool,
    ) -> Block:
        """The block with some of the units that its sublayer has: ``stay`` of ``here``, which are the dense one's."""
        narrow = self._resized(streams.undone(block, sublayer), sublayer, here[stay])
        norm = streams.output_norm(block, sublayer)
        gains = {name: of for name, of in block.replaced.items() if norm is not None and name == f"{norm[0]}.weight"}
        narrow = replace(narrow, replaced={**narrow.replaced, **gains})  # they were fitted, too
        columns = self._columns(block, sublayer, stay, len(here), len(sums.gram))
        prior = streams.weight(block, sublayer)[:, columns.to(sums.gram.device)]
        if not refitted:
            return streams.put(narrow, sublayer, prior)
        of_stay = sums.of(columns)
        penalty = least_squares.penalty(of_stay.gram, self.ridge)
        weight = least_squares.solve(of_stay.gram, of_stay.moment, prior=prior, penalty=penalty)
        return streams.put(narrow, sublayer, weight)

    def _order(
        self,
        streams: Streams,
        block: Block,
        sublayer: str,
        sums: Sums,
        number: int,
        remove: int,
        here: Tensor | None = None,
    ) -> Tensor:
        """Of ``number`` units those that go, in that order, by leverage where ``sums`` have a plain Gram matrix, by the
        optimal brain surgeon around the best weights for the target elsewhere; ``here``: which of the dense model's
        they are, None: all."""
        fixed = self.fixed.get(block.body) if sublayer == "mlp" else None
        fixed = fixed if fixed is None or here is None else fixed[here]
        if (gram := sums.plain) is not None:
            scores = least_squares.leverage_scores(gram, penalty=least_squares.penalty(gram, self.ridge)).cpu()
            order = scores.argsort(stable=True)
            return (order if fixed is None else torch.cat([order[~fixed[order]], order[fixed[order]]]))[:remove]
        penalty = least_squares.penalty(sums.gram, self.ridge)
        prior = streams.weight(block, sublayer)
        weight = least_squares.solve(sums.gram, sums.moment, prior=prior, penalty=penalty)
        columns = sums.gram.shape[0] - (streams.bias(block, sublayer) is not None)  # a bias stays
        last = torch.arange(0) if fixed is None else fixed.nonzero().flatten()  # where all else is gone
        order = least_squares.removal_order(
            weight[:, :columns],
            sums.gram[:columns, :columns],
            min(remove, number - len(last)),
            size=columns // number,
            penalty=penalty,
            at_a_time=_AT_A_TIME if sublayer == "mlp" else 1,
            fixed=fixed,
        )
        return torch.cat([order, last])[:remove]

    def _by_leverage(self, sublayer: str) -> bool:
        return sublayer == "mlp" and self.units == "leverage"

    def _narrowed(self, block: Block, sublayer: str, stay: Tensor, number: int, sums: Sums) -> tuple[Block, Sums]:
        """The block with these units of a sublayer alone, and the sums of what enters its last projection then."""
        columns = self._columns(block, sublayer, stay, number, len(sums.gram))
        return self._resized(block, sublayer, stay), sums.of(columns)

    def _columns(self, block: Block, sublayer: str, stay: Tensor, number: int, num_inputs: int) -> Tensor:
        """[kept] int64: of the inputs of a last projection those of some of its ``number`` units, and a bias's."""
        columns = block.parameter(self.view, f"{self.view.output_name(sublayer)}.weight").shape[1]
        found = torch.arange(columns).view(number, -1)[stay].flatten()
        return torch.cat([found, torch.arange(columns, num_inputs)])

    def _resized(self, block: Block, sublayer: str, stay: Tensor) -> Block:
        heads, neurons = (stay, None) if sublayer == "attention" else (None, stay)
        return resize(self.view, block, heads=heads, neurons=neurons, biases={})

    def _whole(self, layer: int, sublayer: str) -> int:
        return _whole(self.sizes[layer], sublayer)


def _stay(order: Tensor, number: int) -> Tensor:
    """[kept] int64, ascending: of ``number`` units those that are not in ``order``."""
    stays = torch.ones(number, dtype=torch.bool)
    stays[order] = False
    return stays.nonzero().flatten()


def allocate(
    damages: Mapping[tuple[int, str], Mapping[int, float]],
    sizes: Sequence[LayerSize],
    remove: int,
    multiple_of: int,
    start: Shape | None = None,
) -> Shape | None:
    """The shape with the least sum of damages that lacks at least ``remove`` parameters and has a layer left; None if
    there is none.

    Along the lower convex hull of each sublayer's damage over its parameters a Lagrange multiplier finds the optimum:
    stretches of all hulls go by their damage per parameter, the lowest first. The last, of neurons, goes in part; where
    it is of heads, the networks narrowed last get back what is too much.

    Args:
        damages: (layer, sublayer) -> units that stay -> damage when it alone is so narrow.
        remove: parameters of the dense model.
        start: the shape that is narrowed; None: the dense one.
    """
    whole = tuple((size.heads, size.neurons) for size in sizes)
    shape = {(layer, part): n for layer, of in enumerate(start or whole) for part, n in zip(SUBLAYERS, of, strict=True)}
    stretches = []
    for place, found in damages.items():
        size, part = sizes[place[0]], place[1]
        points = ((_gain(size, part, number), number, damage) for number, damage in found.items())
        hull = lower_hull(points, (_gain(size, part, shape[place]), shape[place]))
        stretches += [(slope, place, high, low) for slope, high, low in hull]

    def as_shape() -> Shape:
        return tuple((shape[layer, "attention"], shape[layer, "mlp"]) for layer in range(len(sizes)))

    def to_go() -> int:
        """Parameters that are still to go; a layer's last sublayer takes along what is in neither."""
        return remove - parameters(whole, sizes) + parameters(as_shape(), sizes)

    missing = to_go()
    taken = []
    for _, place, high, low in sorted(stretches, key=lambda stretch: stretch[0]):
        if missing <= 0:
            break
        size, part = sizes[place[0]], place[1]
        step = multiple_of if part == "mlp" else 1
        enough = (n for n in range(high, low, -1) if n % step == 0 and _gained(size, part, high, n) >= missing)
        shape[place] = next(enough, low)
        missing = to_go()
        taken.append((place, high))
    for place, high in reversed(taken):  # what an attention has lost too much of, networks get back
        size, here = sizes[place[0]], shape[place]
        if place[1] == "mlp" and here:
            back = (
                n
                for n in range(high, here, -1)
                if n % multiple_of == 0 and missing + _gained(size, "mlp", n, here) <= 0
            )
            shape[place] = next(back, here)
            missing += _gained(size, "mlp", shape[place], here)
    end = as_shape()
    return end if missing <= 0 and any(map(any, end)) else None


def transferred(
    shape: Shape,
    sizes: Sequence[LayerSize],
    giver: tuple[int, str],
    taker: tuple[int, str],
    *,
    most: int,
    share: int,
    multiple_of: int,
) -> Shape | None:
    """The shape in which one sublayer, (layer, attention | mlp), has given units to another, and no more than are used.

    Args:
        most: parameters that the layers may have.
        share: the giver gives a ``share``-th of its dense neurons, or one group of heads; where the taker can take
            nothing for that, as often as it takes.
        multiple_of: of neurons that stay.

    Returns:
        None where the giver has too little, the taker is whole, or more than one unit of neurons would be left over.
    """

    def units(place: tuple[int, str]) -> int:
        return shape[place[0]][SUBLAYERS.index(place[1])]

    def step(place: tuple[int, str]) -> int:
        return multiple_of if place[1] == "mlp" else 1

    def changed(gives: int, takes: int) -> Shape:
        new = [dict(zip(SUBLAYERS, of, strict=True)) for of in shape]
        new[giver[0]][giver[1]], new[taker[0]][taker[1]] = gives, takes
        return tuple((of["attention"], of["mlp"]) for of in new)

    def grown(place: tuple[int, str], least: int, greatest: int, other: int) -> int:
        """The most units of a sublayer, beside so many of the other one, that the parameters allow."""
        for number in range(greatest, least, -1):
            pair = (number, other) if place == giver else (other, number)
            if (number == greatest or number % step(place) == 0) and parameters(changed(*pair), sizes) <= most:
                return number
        return least

    given, taken = units(giver), units(taker)
    portion = max(1, sizes[giver[0]].neurons // share // multiple_of) * multiple_of if giver[1] == "mlp" else 1
    while given > 0 and taken == units(taker):
        given = max(0, given - portion)
        taken = grown(taker, units(taker), _whole(sizes[taker[0]], taker[1]), given)
    if taken == units(taker):
        return None
    new = changed(grown(giver, given, units(giver), taken), taken)
    unit = max(size.per_neuron for size in sizes) * multiple_of
    return new if parameters(new, sizes) > parameters(shape, sizes) - unit else None


def _gained(size: LayerSize, sublayer: str, high: int, low: int) -> int:
    return _gain(size, sublayer, low) - _gain(size, sublayer, high)


def _whole(size: LayerSize, sublayer: str) -> int:
    return size.heads if sublayer == "attention" else size.neurons


def _gain(size: LayerSize, sublayer: str, left: int) -> int:
    """Parameters less when so many units of a sublayer are left."""
    all_of_it = size.attention if sublayer == "attention" else size.mlp
    per_unit = size.per_head if sublayer == "attention" else size.per_neuron
    return (_whole(size, sublayer) - left) * per_unit if left else all_of_it
