"""Base of the width methods that prune one layer after the other, and give what is left new weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import Range
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.narrowed import Narrowed, Place
from slm_pipeline.methods.width_removal import WidthRemoval
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.base import SUBLAYERS

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.allocation import Units
    from slm_pipeline.models.sizes import Sizes


@dataclass(kw_only=True)
class LayerwiseRemoval(WidthRemoval):
    """How many units each sublayer loses is decided first. Then, from the lowest layer up, attention before the
    feed-forward network, it is decided which, by the inputs X of the sublayer's last projection W; and the projection
    gets new weights W' for the inputs that are left, with which it puts out what it did, as well as that can be:

        least |W X - W' X_S|^2 + lam |W_S - W'|^2,   lam = ridge x mean diagonal of X X'.

    With ``corrected_inputs`` X are what the layers below, as they are by then, hand up; else the dense model's.

    The plan holds the new weights. Memory: the states of the calibration text, once, and one layer's X X' [n, n] in
    float64 with a few matrices of that size.
    """

    allocation: str = "uniform"
    export: str = "stock"
    ridge: Annotated[float, Range(above=0, at_most=1e3)] = 0.01
    corrected_inputs: bool = True  # a layer is fitted to what the pruned ones below it put out; false: to dense inputs

    allocations: ClassVar[tuple[str, ...]] = ("uniform", "sensitivity")

    @abstractmethod
    def choices(self, weight: Tensor, gram: Tensor, penalty: float, units: Units, remove: int) -> list[Tensor]:
        """Orders in which units may go: the one that leaves the least error is taken.

        Args:
            weight: [d, n] float64, of the last projection.
            gram: [n, n] float64, X X'.
            penalty: lam.
            units: of the sublayer; ``fixed`` ones stay. Its scores say nothing.
            remove: how many go at most.

        Returns:
            [at least remove] int64 units each, on the CPU; whose first parts are the decisions for lower numbers.
        """

    def memory(self, sizes: Sizes) -> int:
        """One state of each token, and a Gram matrix three times."""
        return sizes.states(sizes.tokens) + sizes.running(8192) + 3 * 8 * max(sizes.neurons, sizes.queries) ** 2

    def scored(self, problem: PruningProblem, units: Mapping[Place, Units]) -> dict[Place, Units]:
        """As they are: which units go is decided later."""
        return dict(units)

    def narrow(
        self, problem: PruningProblem, units: Mapping[Place, Units], gone: Mapping[Place, int]
    ) -> tuple[dict[Place, Narrowed], dict[str, Any]]:
        walk = self._walk(problem, units, {place: [number] for place, number in gone.items()}, self.corrected_inputs)
        return {place: found[0] for place, found in walk}, {}

    def variants(
        self, problem: PruningProblem, units: Mapping[Place, Units], levels: Mapping[Place, Sequence[int]]
    ) -> Iterator[tuple[Place, list[Narrowed]]]:
        return self._walk(problem, units, levels, corrected=False)

    def _walk(
        self,
        problem: PruningProblem,
        units: Mapping[Place, Units],
        numbers: Mapping[Place, Sequence[int]],
        corrected: bool,
    ) -> Iterator[tuple[Place, list[Narrowed]]]:
        """For each of the places in ``numbers``, from the lowest up, what is left when so many units go.

        Args:
            corrected: what lies above is given the outputs of what is left by the first number; else the dense model's.
        """
        from slm_pipeline.engine.layerwise import Stream
        from slm_pipeline.show.progress import ProgressBar

        stream = Stream(problem.view, problem.input_ids)
        last = max((layer for layer, _ in numbers), default=-1)
        for layer in ProgressBar(range(last + 1), desc="layers"):
            block = Block(layer)
            for part in SUBLAYERS:
                if (layer, part) in numbers:
                    gram = stream.gram(block, part).matrix
                    found = self._fit(problem, gram, units[layer, part], (layer, part), numbers[layer, part])
                    yield (layer, part), found
                    block = found[0].put(problem.view, block, part) if corrected else block
            if layer < last:
                stream.pass_through(block)

    def _fit(
        self, problem: PruningProblem, gram: Tensor, units: Units, place: Place, numbers: Sequence[int]
    ) -> list[Narrowed]:
        import torch

        from slm_pipeline.engine import least_squares

        view, (layer, part) = problem.view, place
        weight = view.output(layer, part).weight.detach().to(gram)
        if not bool(weight.isfinite().all()):
            raise UserError(f"method={self.name}: the weights of layer {layer}'s {part} are not finite")
        penalty = least_squares.penalty(gram, self.ridge)
        orders = self.choices(weight, gram, penalty, units, max(numbers))
        columns = torch.arange(len(gram), device=gram.device).view(len(units.scores), -1)
        found = []
        for number in numbers:
            stay = [units.without(order[:number]) for order in orders]
            kept = [columns[of.to(gram.device)].flatten() for of in stay]
            best, new = least_squares.best_refit(weight, gram, kept, penalty=penalty)
            found.append(Narrowed(stay[best], weight=new.float().cpu()))  # as the plan has them
        return found
