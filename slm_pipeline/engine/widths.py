"""Widths by layer: how much of each sublayer goes, found by what it costs to narrow it alone, again and again."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from slm_pipeline.engine.candidates import Candidates
from slm_pipeline.engine.shapes import Fitted, Shape, allocate, transferred
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.store.checksums import digest
from slm_pipeline.surgery.ops import LayerSize
from slm_pipeline.surgery.ops.base import SUBLAYERS

Place = tuple[int, str]  # layer, attention | mlp
Damages = dict[Place, dict[int, float]]  # of each sublayer: units that stay -> what it costs to narrow it alone
Tilts = tuple[float, float]  # how much more a damage counts towards the input, and how much more one of attention


@dataclass(frozen=True)
class Widths:
    """The search for a shape that lacks so many parameters, sublayers narrowed and gone.

    Attributes:
        candidates: where shapes are judged.
        prices: of the dense layers: parameters, or what else is to be saved.
        layers: that may be narrowed.
        remove: of what ``prices`` counts.
        multiple_of: neurons that stay are a multiple.
        search_tokens: that damages are measured on.
    """

    candidates: Candidates
    prices: Sequence[LayerSize]
    layers: Sequence[int]
    remove: int
    multiple_of: int
    search_tokens: int

    @property
    def places(self) -> list[Place]:
        return [(layer, part) for layer in self.layers for part in SUBLAYERS]

    @property
    def possible(self) -> bool:
        """Whether so much can go at all."""
        return allocate({place: {0: 0.0} for place in self.places}, self.prices, self.remove, 1) is not None

    def committed(self, share: float) -> list[Shape]:
        """The best shape, first, and others that were near it, as many neurons and heads going at a time as make up
        ``share`` of the layers: then damages are measured again. Of each time the best tilts are tried with widths
        between those that were measured, too. It must be `possible`; none where no damages lead to a shape that has a
        layer left."""
        shape: Shape = tuple((size.heads, size.neurons) for size in self.prices)
        step = max(1, round(share * sum(size.whole for size in self.prices)))
        base, point = None, (0.0, 0.0)
        tried: dict[Tilts, Shape] = {}
        for goal in [*range(step, self.remove, step), self.remove]:
            damages, base = self._damages(shape, base), None  # one model's blocks at a time
            point, tried = self._tilted(damages, shape, goal, point)
            if point not in tried:
                return []
            between = self._allocated(finer(damages, shape, self.multiple_of), point, shape, goal)
            shape = self.candidates.ranked([tried[point], *([between] if between else [])], divisor=4)[0]
            fitting, number = self.candidates.fitting, self.candidates.num_samples(4)
            base = fitting.fill(shape, number) if goal < self.remove else None
        return [shape, *(other for other in tried.values() if other != shape)]

    def transferred(self, best: Shape, transfers: int) -> Shape:
        """The shape, or a better one that transfers led to: of an eighth of a network's neurons first, then of less."""
        number = self.candidates.num_samples(2)
        most = sum(size.whole for size in self.prices) - self.remove
        least, draw = self.candidates.score(best, number), random.Random(0)
        for step in ProgressBar(range(transfers), desc="transfers"):
            how = {"most": most, "share": 8 << 3 * step // transfers, "multiple_of": self.multiple_of}
            pairs = (draw.sample(self.places, 2) for _ in range(100))
            drawn = (transferred(best, self.prices, giver, taker, **how) for giver, taker in pairs)
            shape = next((of for of in drawn if of is not None), None)
            if shape is not None and (score := self.candidates.score(shape, number)) < least:
                best, least = shape, score
        return best

    def _tilted(self, damages: Damages, shape: Shape, remove: int, best: Tilts) -> tuple[Tilts, dict[Tilts, Shape]]:
        """Uphill from ``best``: the tilts whose shape is best, and the shapes of all that were tried."""
        number = self.candidates.num_samples(4)
        tried: dict[Tilts, Shape] = {}

        def worth(point: Tilts) -> float:
            if point not in tried:
                found = self._allocated(damages, point, shape, remove)
                if found is None:  # nothing would be left
                    return math.inf
                tried[point] = found
            return self.candidates.score(tried[point], number)

        step = 1.0
        while step >= 0.5:
            around = [best, *((best[0] + a, best[1] + b) for a, b in ((-step, 0), (step, 0), (0, -step), (0, step)))]
            nearest = min(around, key=worth)
            best, step = (nearest, step) if nearest != best else (best, step / 2)
        return best, tried

    def _allocated(self, damages: Damages, point: Tilts, shape: Shape, remove: int) -> Shape | None:
        return allocate(tilted(damages, *point, len(self.prices)), self.prices, remove, self.multiple_of, shape)

    def _damages(self, shape: Shape, base: Fitted | None) -> Damages:
        """Of each sublayer of the model of this shape, what it costs to narrow it to some widths and to none."""
        fitting, memo, multiple_of = self.candidates.fitting, self.candidates.memo, self.multiple_of
        heads, neurons = self.prices[0].heads, self.prices[0].neurons
        levels = {
            "attention": list(range(heads)) if heads <= 8 else [heads * i // 4 for i in range(4)],
            "mlp": sorted({neurons * i // 8 // multiple_of * multiple_of for i in range(8)}),
        }
        how, of_shape = fitting.how_beside(base), digest(shape)[:12]

        def key(place: Place, number: int) -> tuple[str | float, ...]:
            beside: tuple[str | float, ...] = (how.target, how.share, *how.ridges) if base else ("dense",)
            return ("damage", *beside, how.weighting, of_shape, *place, number)

        widths = {(layer, part): shape[layer][SUBLAYERS.index(part)] for layer, part in self.places}
        known = {place: [n for n in levels[place[1]] if n < width] for place, width in widths.items() if width}
        unknown = [place for place, of in known.items() if any(key(place, n) not in memo for n in of)]
        rows = max(1, self.search_tokens // fitting.choose.shape[1])
        for place, found in fitting.damages(unknown, levels, fitting.choose[:rows], base) if unknown else ():
            for level, damage in found.items():
                memo.add(key(place, level), min(damage, 1e9))
        return {place: {n: memo[key(place, n)] for n in of} for place, of in known.items()}


def finer(damages: Damages, shape: Shape, multiple_of: int) -> Damages:
    """Damages of networks also at widths between those that were measured, by a quarter of the way: the root of the
    damage lies on a straight line there, as that of a small error's square does."""
    found = {}
    for (layer, part), levels in damages.items():
        found[layer, part] = dict(levels)
        if part == "mlp":
            known = [(shape[layer][1], 0.0), *sorted(levels.items(), reverse=True)]
            for (wide, least), (narrow, most) in pairwise(known):
                for quarter in (1, 2, 3):
                    number = (wide - quarter * (wide - narrow) // 4) // multiple_of * multiple_of
                    share = (wide - number) / (wide - narrow)
                    root = (1 - share) * math.sqrt(max(0.0, least)) + share * math.sqrt(max(0.0, most))
                    if narrow < number < wide:
                        found[layer, part][number] = root**2
    return found


def tilted(damages: Damages, tilt: float, attention: float, num_layers: int) -> Damages:
    """Damages, each times exp(tilt x height), with heights from 1/2 at the input to -1/2, and of attention times
    exp(attention)."""
    found = {}
    for (layer, part), levels in damages.items():
        factor = math.exp(tilt * (0.5 - layer / num_layers) + (attention if part == "attention" else 0.0))
        found[layer, part] = {number: factor * damage for number, damage in levels.items()}
    return found
