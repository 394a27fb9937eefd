"""LaCo: fold several layers into one wherever the model's output hardly changes, from the top down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import NumLayers, NumLayersOrZero, Range
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.threshold import Search, Similarity, ThresholdMerging

if TYPE_CHECKING:
    from slm_pipeline.models.context import Context


@dataclass(kw_only=True)
class Laco(ThresholdMerging):
    """LaCo, layer collapse, arXiv 2402.11187, algorithm 1.

    A fixed number of layers is folded into the lowest of them; where the output stays at least ``threshold`` similar
    to the dense model's, the fold is kept and the pass moves ``interval`` layers down, else one layer. Folded layers
    may be folded again.

    Departures from the published code: nothing is copied, states below a fold are cached; the KV cache indices are
    renumbered; with a pruning ratio the last fold is shortened so that it lands on the target. The published text is
    five English sentences of under 20 words. `official` is what the released code computes (its loop telescopes),
    `base_difference` the paper's formula.

    Scores in the plan: those of `slm_pipeline.methods.threshold.ThresholdMerging`.
    """

    num_merged: Annotated[int, Range(at_least=2, at_most=10_000)] = 4  # layers folded into one at a time (C)
    lowest: NumLayersOrZero = 0  # of the layers looked at (L)
    highest: NumLayers | None = None  # of the layers looked at (H); None: the last one
    interval: NumLayers = 1  # layers to move down after a fold (I)
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(5, 32))

    name: ClassVar[str] = "laco"
    streams: ClassVar[bool] = True
    shares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.highest is not None and self.highest <= self.lowest:
            raise UserError(f"method.highest={self.highest} must be above method.lowest={self.lowest}")

    def check(self, context: Context) -> None:
        super().check(context)
        source = context.source
        if source.num_layers is not None and self.highest is not None and self.highest >= source.num_layers:
            raise UserError(f"method.highest={self.highest} must be below the model's {source.num_layers} layers")

    def fewest_left(self, num_layers: int) -> tuple[int, str]:
        """After the pass that folds most, whatever it must not fold for that."""
        highest = num_layers - 1 if self.highest is None else self.highest
        start = highest - self.num_merged
        most = {start: 0}  # removed at most by the time that a layer is looked at
        for layer in range(start, self.lowest - 1, -1):
            folded = min(most[layer] + self.num_merged - 1, num_layers - 1 - layer)
            for below, removed in ((layer - 1, most[layer]), (layer - self.interval, folded)):
                most[below] = max(most.get(below, 0), removed)
        why = (
            f"with method.num_merged={self.num_merged} and method.interval={self.interval} a pass over layers"
            f" {self.lowest} to {highest} folds no more"
        )
        return num_layers - max(most.values()), why

    def one_pass(self, similarity: Similarity, num_layers: int) -> LayerCollapse:
        highest = num_layers - 1 if self.highest is None else self.highest
        return LayerCollapse(similarity, num_layers, self.num_merged, self.lowest, highest, self.interval)


@dataclass
class LayerCollapse:
    """The pass over a stack of ``num_layers``."""

    similarity: Similarity
    num_layers: int
    num_merged: int
    lowest: int
    highest: int
    interval: int

    @property
    def length(self) -> int:
        return max(0, self.highest - self.num_merged - self.lowest + 1)

    def __call__(self, search: Search, num_remove: int | None) -> None:
        stack: list[Any] = list(range(self.num_layers))  # below ``layer`` everything is still original
        layer = self.highest - self.num_merged
        while layer >= self.lowest:
            count = min(self.num_merged - 1, len(stack) - layer - 1)
            if num_remove is not None:
                count = min(count, num_remove - search.num_removed)
            folded = tuple(stack[layer : layer + count + 1])
            candidate = (folded, *stack[layer + count + 1 :])
            window = (layer, _top(folded))
            if search.look(window, self.similarity(candidate)):
                search.commit(window, num_removed=count)
                stack[layer:] = candidate
                if search.num_removed == num_remove:
                    return
                layer -= self.interval
                if layer >= len(stack):
                    layer = len(stack) - 1 - self.num_merged
            else:
                layer -= 1


def _top(group: Any) -> int:
    """The highest original layer of a group."""
    return group if isinstance(group, int) else _top(group[-1])
