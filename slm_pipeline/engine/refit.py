"""New weights with which the layers of a pruned model write what those of the dense one have written.

Plain least squares, one projection after the other, from the input side up: each is fitted to what the layers below it,
repaired by then, hand up. No gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slm_pipeline.engine import least_squares
from slm_pipeline.engine.streams import Streams, Sums
from slm_pipeline.errors import UserError
from slm_pipeline.machine import ranks
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.correct import corrected

WEIGHTINGS = ("inverse_square", "none")
TARGETS = ("dense_stream", "own_output")
PRIORS = ("weights", "own_output")
OWN_RIDGE = 0.01  # of the fit that is the prior, which has nothing to be drawn to but what is left of the weights
OWN_RIDGES = (0.01, 0.1)  # of fits to the own output where they are tried beside others: they hold little that is noise
LEAST_GAIN = 1e-6  # of the relative error: less is the rounding of float32 sums


@dataclass(frozen=True)
class Fitted:
    """What became of one projection.

    Attributes:
        ridge: of the fit that was taken, the gains' if there is a norm and they were the last; None: nothing changed.
        before, after: relative squared error on the text that is held out.
        reads: it is about what the sublayer reads, not about its last projection.
        tensors: what is new: the last projection's weight by the sublayer's name, its bias as ``<name>_bias``, the
            weight of the norm behind it as ``<name>_norm``, the map in front of what reads as ``reads.<name>``.
    """

    sublayer: str
    ridge: float | None
    before: float
    after: float
    reads: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "tensors"}


@dataclass(frozen=True)
class Refit:
    """How projections are fitted.

    W' = (T D X' + lam W) (X D X' + lam I)^-1, lam = ridge x mean diagonal of X D X', D the weights of tokens. Of the
    ridges the one with the least error on text held out of the fit is taken, or none, if that is no less than with the
    weights as they are, `LEAST_GAIN` aside.

    Attributes:
        ridges: to be tried, each above 0.
        weighting: inverse_square: a token counts 1 / mean square of the dense state that its target leads to, since
            states are normed before they are read, and few tokens are very large | none.
        target: dense_stream: what is missing to the dense model's states | own_output: what the projection would
            write if its sublayer were as in the dense model: where neither widths nor weights changed, what it writes.
        share: of what is missing to the dense stream, 0 to 1; the rest of the target is the own output. Each layer then
            makes up for a part of what those below have missed, and the next ones for as much of what is left.
        prior: what the ridge draws to: weights, as they are | own_output: where a sublayer is narrower than the dense
            model's, the best weights for that target, which make up for the units that went.
        sublayers: whose last projections are fitted.
        reads: ridge with which what these sublayers read is fitted before, None: it is not. The map M that
            leads best from what a sublayer reads in the pruned model to what it reads in the dense one, drawn to the
            identity, goes into its first projections: W' = W M. With own_output it is fitted afterwards: that output is
            one without M, and a fit to it would undo M.
    """

    ridges: Sequence[float] = (0.01, 0.1, 1.0)
    weighting: str = "inverse_square"
    target: str = "dense_stream"
    share: float = 1.0
    prior: str = "weights"
    sublayers: Sequence[str] = SUBLAYERS
    reads: float | None = None

    def sums(self, streams: Streams, block: Block, sublayer: str, *, plain: bool = False) -> Sums:
        return streams.sums(
            block, sublayer, target=self.target, weighting=self.weighting, share=self.share, plain=plain
        )

    def layer(self, fitted: Streams, held_out: Streams, block: Block) -> tuple[Block, list[Fitted]]:
        """The block with new weights, both streams standing before it, and what became of each sublayer."""
        found = []
        for sublayer in SUBLAYERS:
            if sublayer in self.sublayers and not fitted.lacks(block, sublayer):
                both = [self.reading, self.writing] if self.reads is not None else [self.writing]
                for correct in both if self.target == "dense_stream" else both[::-1]:
                    block, what = correct(fitted, held_out, block, sublayer)
                    found.append(what)
        return block, found

    def writing(
        self, fitted: Streams, held_out: Streams, block: Block, sublayer: str, sums: Sums | None = None
    ) -> tuple[Block, Fitted]:
        """The block with a new last projection of one sublayer, if a fit does better on the text held out.

        A norm behind the projection makes every output as long as it likes, so that what can be predicted in part only
        is written too large. So its gains are fitted after the weights; and where the sublayer is not the dense
        model's, fits to its own output are tried beside those to what is missing in the stream.

        Args:
            sums: of ``fitted``, if they are known; of no use where there is a norm, which makes them the block's own.

        Raises:
            UserError: the inputs are linearly dependent, and no ridge is large enough; or what is to be written, on
                either text, is not finite.
        """
        if self.target == "own_output" and fitted.undone(block, sublayer) is block:
            return block, Fitted(sublayer, None, 0.0, 0.0)
        is_normed = fitted.output_norm(block, sublayer) is not None
        sums = None if is_normed else sums
        targets = [self.target]
        if is_normed and self.target == "dense_stream" and fitted.undone(block, sublayer) is not block:
            targets.append("own_output")
        prior = self._prior(fitted, block, sublayer)
        tried: list[tuple[float | None, Block]] = [(None, block)]
        for target in targets:
            if sums is None or target != self.target:
                sums = replace(self, target=target).sums(fitted, block, sublayer)
            tried += [(ridge, fitted.put(block, sublayer, weight)) for ridge, weight in self._solutions(prior, sums)]
        before, after, taken, best = self._best(held_out, tried, sublayer)
        if is_normed:
            gain = fitted.gain_sums(best, sublayer, target=self.target, weighting=self.weighting, share=self.share)
            gained = [(ridge, fitted.put_gains(best, sublayer, gain.solve(ridge))) for ridge in self.ridges]
            _, after, taken, best = self._best(held_out, [(taken, best), *gained], sublayer)
        if taken is None or before - after <= LEAST_GAIN:
            return block, Fitted(sublayer, None, before, before)
        return best, Fitted(sublayer, taken, before, after, tensors=fitted.new_tensors(block, best, sublayer))

    def reading(self, fitted: Streams, held_out: Streams, block: Block, sublayer: str) -> tuple[Block, Fitted]:
        """The block whose sublayer reads through the map that does better on the text held out, if there is one."""
        ridge = self.reads
        assert ridge is not None
        sums = fitted.reading_sums(block, sublayer)
        other = held_out.reading_sums(block, sublayer)
        identity = torch.eye(len(sums.gram), dtype=torch.float64, device=sums.gram.device)
        found = _solution(sums, identity, ridge)
        before, after = other.error(identity), other.error(found)
        if before - after <= LEAST_GAIN:
            return block, Fitted(sublayer, None, before, before, reads=True)
        what = Fitted(sublayer, ridge, before, after, reads=True, tensors={f"reads.{sublayer}": found})
        return corrected(fitted.view, block, sublayer, found), what

    def _prior(self, fitted: Streams, block: Block, sublayer: str) -> Tensor:
        """What the ridge draws to, [d, n] float64."""
        weight = fitted.weight(block, sublayer)
        if self.prior == "weights" or weight.shape == fitted.weight(Block(block.body), sublayer).shape:
            return weight
        sums = replace(self, target="own_output").sums(fitted, block, sublayer)
        return _solution(sums, weight, OWN_RIDGE)

    def _best(
        self, held_out: Streams, tried: Sequence[tuple[float | None, Block]], sublayer: str
    ) -> tuple[float, float, float | None, Block]:
        """The error of the first block on the text held out, that of the best one, its ridge and itself.

        Raises:
            UserError: the first is not finite.
        """
        blocks = [block for _, block in tried]
        errors = held_out.errors(blocks, sublayer, target=self.target, weighting=self.weighting, share=self.share)
        if not math.isfinite(errors[0]):
            raise UserError(
                f"what layer {blocks[0].body}'s {sublayer} writes, or is to write, on the text held out is not finite;"
                " try model.dtype=float32"
            )
        error, place = min((error, place) for place, error in enumerate(errors) if math.isfinite(error))
        return errors[0], error, *tried[place]

    def _solutions(self, weight: Tensor, sums: Sums) -> Iterator[tuple[float, Tensor]]:
        """Of each ridge that is large enough the best weights."""
        for ridge in self.ridges:
            try:
                yield ridge, _solution(sums, weight, ridge)
            except UserError:
                if ridge == max(self.ridges):
                    raise


def own_output(weightings: Sequence[str] = WEIGHTINGS, *, by_projection: bool = False, **options: Any) -> list[Refit]:
    """The ways towards the own output that are tried beside those to the stream, one walk each.

    Args:
        by_projection: a ridge is chosen for each projection; else there is a walk with each.
        options: of `Refit`.
    """
    by_ridge = [OWN_RIDGES] if by_projection else [[ridge] for ridge in OWN_RIDGES]
    return [Refit(ridges, weighting, "own_output", **options) for weighting in weightings for ridges in by_ridge]


def _solution(sums: Sums, prior: Tensor, ridge: float) -> Tensor:
    """The best weights with a ridge towards ``prior``.

    Raises:
        UserError: the ridge is too small, in this process or in another: a factor may fail on one kind of GPU alone,
            and whoever gave up alone would leave the others waiting for its sums.
    """
    found, failure = None, None
    try:
        penalty = least_squares.penalty(sums.gram, ridge)
        found = least_squares.solve(sums.gram, sums.moment, prior=prior, penalty=penalty)
    except UserError as error:
        failure = error
    failed_somewhere = ranks.of_any(failure is not None)
    if found is None or failed_somewhere:
        raise failure or UserError(f"another process cannot solve for new weights with a ridge of {ridge:g}")
    return found
