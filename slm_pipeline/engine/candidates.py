"""Shapes that a search tries: the number of each, measured once, and how the best is found among few."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slm_pipeline.engine.refit import WEIGHTINGS, own_output
from slm_pipeline.engine.shapes import Fitting, Shape, parameters
from slm_pipeline.engine.window_memo import WindowMemo
from slm_pipeline.errors import UserError
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.surgery.ops import LayerSize

log = logging.getLogger(__name__)

OBJECTIVES = {"kl_divergence": "kl", "next_token_loss": "loss"}  # and what the trace calls them


@dataclass(frozen=True)
class Candidates:
    """Shapes, filled and judged.

    Attributes:
        fitting: how they are filled, and by what they are judged.
        memo: what is known of them.
        trace: of each that was judged what it is and its number, in the order of their first mention.
    """

    fitting: Fitting
    memo: WindowMemo
    trace: list[dict[str, Any]] = field(default_factory=list)

    def filled_best(self, alike: Shape | None, shares: Sequence[float]) -> Candidates:
        """These, filled in the ways that are best for the shape whose layers are all there and ``alike``: towards the
        dense stream with tokens weighted or not, then to ``shares`` of what is missing to it; shapes that have all
        sublayers also towards their own output, as refit tries it."""
        if alike is None or not self.fitting.refitted:
            return self
        number, fitting = self.num_samples(1), self.fitting

        def best(fittings: list[Fitting]) -> Candidates:
            return min((replace(self, fitting=one) for one in fittings), key=lambda way: way.score(alike, number))

        stream = best([replace(fitting, how=replace(fitting.how, weighting=one)) for one in WEIGHTINGS]).fitting
        stream = best([stream, *(replace(stream, how=replace(stream.how, share=share)) for share in shares)]).fitting
        return best([stream, *(replace(stream, whole=how) for how in own_output())])

    def num_samples(self, divisor: int) -> int:
        """A part of the text that is fitted to, in samples."""
        return max(1, len(self.fitting.fit) // divisor)

    def score(self, shape: Shape, num_samples: int) -> float:
        """What a shape is judged by, lower is better, fitted to so many samples."""
        how, objective = self.fitting.how_of(shape), OBJECTIVES[self.fitting.objective]
        key = (how.target, how.weighting, how.share, *how.ridges, shape, num_samples)
        if key not in self.memo:
            try:
                score = self.fitting.fill(shape, num_samples, keep=False).score
            except UserError as error:  # it overflows, or cannot be fitted: others may
                log.warning("joint: %s", error)
                score = math.inf
            self.memo.add(key, score if math.isfinite(score) else 1e9)
        heads, neurons = ([kept[i] for kept in shape if kept[i]] or [0] for i in range(2))
        row = {
            "gone": [layer for layer, kept in enumerate(shape) if kept == (0, 0)],
            "heads": [min(heads), max(heads)],
            "neurons": [min(neurons), max(neurons)],
            "shape": shape_in_words(shape),
            "parameters": parameters(shape, self.fitting.sizes),
            "target": how.target,
            "weighting": how.weighting,
            "share": how.share,
            "ridges": list(how.ridges),
            "num_tokens": num_samples * self.fitting.fit.shape[1],
            objective: self.memo[key],
        }
        if row not in self.trace:
            log.info("joint: %s", _in_words(row, objective))
            self.trace.append(row)
        return self.memo[key]

    def ranked(self, shapes: Sequence[Shape], divisor: int) -> list[Shape]:
        """Without doubles, the best first, fitted to a part of the text."""
        number, different = self.num_samples(divisor), list(dict.fromkeys(shapes))
        scores = {shape: self.score(shape, number) for shape in ProgressBar(different, desc="candidates")}
        return sorted(different, key=scores.__getitem__)

    def halved(self, shapes: Sequence[Shape]) -> Shape:
        """The best: half of them survive each time that the text is doubled."""
        left = self.ranked(shapes, 4)
        for divisor in (2, 1):
            left = self.ranked(left[: max(1, -(-len(left) // 2))], divisor)
        return left[0]

    def swapped(
        self, best: Shape, layers: Collection[int], swaps: int, prices: Sequence[LayerSize] | None = None
    ) -> Shape:
        """The shape, or a better one in which a layer that went has changed places with a neighbour among ``layers``;
        at most ``swaps`` are tried, of those that cost no more by ``prices``, None: the dense layers' parameters."""
        tried, number = {best}, self.num_samples(1)
        least = self.score(best, number)
        prices = prices or self.fitting.sizes
        most = parameters(best, prices)
        while swaps > 0:
            left = (shape for shape in exchanges(best, layers) if shape not in tried)
            shape = next((shape for shape in left if parameters(shape, prices) <= most), None)
            if shape is None:
                break
            swaps -= 1
            tried.add(shape)
            if (score := self.score(shape, number)) < least:
                best, least = shape, score
        return best


def shape_in_words(shape: Shape) -> str:
    """Groups of heads x neurons of each dense layer."""
    return " ".join(f"{heads}x{neurons}" for heads, neurons in shape)


def exchanges(shape: Shape, layers: Collection[int]) -> Iterator[Shape]:
    """Shapes in which a layer that went has changed places with a neighbour, one of ``layers``, that stayed."""
    for (layer, kept), step in itertools.product(enumerate(shape), (-1, 1)):
        other = layer + step
        if kept == (0, 0) and other in layers and shape[other] != (0, 0):
            changed = list(shape)
            changed[layer], changed[other] = shape[other], kept
            yield tuple(changed)


def _in_words(row: dict[str, Any], objective: str) -> str:
    """A candidate of the trace, for people who wait."""
    gone = f"layers {', '.join(map(str, row['gone']))} gone" if row["gone"] else "all layers"
    widths = [
        f"{least} {what}" if least == most else f"{least} to {most} {what}"
        for what, (least, most) in (("groups of heads", row["heads"]), ("neurons", row["neurons"]))
    ]
    fits = f"fitted to {row['num_tokens']:,} tokens"
    own = [f"own output, ridge {', '.join(map('{:g}'.format, row['ridges']))}"] if row["target"] == "own_output" else []
    share = [f"{row['share']:.0%} of what is missing"] if row["share"] < 1 else []
    if ways := [*own, *share, *(["all tokens alike"] if row["weighting"] == "none" else [])]:
        fits += f" ({', '.join(ways)})"
    return f"{gone}, {', '.join(widths)}: {objective} {row[objective]:.4f}, {fits}"
