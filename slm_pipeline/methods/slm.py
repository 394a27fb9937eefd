"""SLM: slide a window from the top of the stack down and merge what the model does not miss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from slm_pipeline.config.ranges import NumLayersOrZero, Range
from slm_pipeline.methods.base import CalibrationSize
from slm_pipeline.methods.threshold import Search, Similarity, ThresholdMerging, Window
from slm_pipeline.surgery.plan import groups_of_windows


@dataclass(kw_only=True)
class SlidingLayerMerging(ThresholdMerging):
    """Sliding Layer Merging (SLM, later Sliding-Window Merging), arXiv 2502.19159, figure 2 and released code.

    The window starts at the two highest unprotected layers and grows downwards while the merged model's final states
    stay at least ``threshold`` similar to the dense model's. When they do not, the window that still passed is
    merged into one layer and the next window starts at the layer that failed. One pass, no backtracking; the
    threshold is a floor on the similarity of the whole model, so an early window eats the slack of later ones.

    Departures from the published code, none of which changes a decision unless said:
        - no model is ever copied, no window evaluated twice (`slm_pipeline.engine.windows`);
        - a window still open when the pass ends is merged; the published code loses it and may return the dense
          model for a small threshold (changes the outcome there);
        - `>=` as in the paper's figure, not `>`; cosine per sample and in float32, not float16 and over the batch;
        - the first layer is protected too (``protect_first=0`` for the published behaviour);
        - biases, q/k norms and the layer type follow their projections.

    The merge rule `official` and the similarity `final_hidden` are what the authors released.

    Scores in the plan: those of `slm_pipeline.methods.threshold.ThresholdMerging`.
    """

    protect_first: NumLayersOrZero = 1  # layers at the input side that are never merged
    protect_last: NumLayersOrZero = 1  # layers at the output side that are never merged
    # Most layers merged into one; None: no limit; 2 makes `official` and `base_difference` the same rule.
    max_window: Annotated[int, Range(at_least=2, at_most=10_000)] | None = None
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))

    name: ClassVar[str] = "slm"
    streams: ClassVar[bool] = True
    shares_samples: ClassVar[bool] = True

    @property
    def num_protected(self) -> int:
        return self.protect_first + self.protect_last

    def fewest_left(self, num_layers: int) -> tuple[int, str]:
        fewest, why = super().fewest_left(num_layers)
        if self.max_window is None:
            return fewest, why
        windows = math.ceil((num_layers - self.num_protected) / self.max_window)
        why = f"{self.num_protected} protected; at most method.max_window={self.max_window} layers become one"
        return max(fewest, self.num_protected + windows), why

    def one_pass(self, similarity: Similarity, num_layers: int) -> SlidingWindow:
        return SlidingWindow(similarity, num_layers, self.protect_first, self.protect_last, self.max_window)


@dataclass
class SlidingWindow:
    """The pass over a stack of ``num_layers``."""

    similarity: Similarity
    num_layers: int
    protect_first: int = 1
    protect_last: int = 1
    max_window: int | None = None

    @property
    def length(self) -> int:
        """Most windows that a pass looks at: each look moves the lower end down by one layer."""
        return max(0, self.num_layers - 1 - self.protect_last - self.protect_first)

    def __call__(self, search: Search, num_remove: int | None) -> None:
        high = self.num_layers - 1 - self.protect_last
        low = high - 1
        while low >= self.protect_first:
            # [low + 1 .. high] is the window that passed so far; a single layer when nothing has.
            fits = self.max_window is None or high - low < self.max_window
            if fits and search.look((low, high), self.similarity(self._stack(search.windows, (low, high)))):
                low -= 1
                if search.num_removed + high - (low + 1) == num_remove:
                    break
            else:
                if low + 1 < high:
                    search.commit((low + 1, high))
                high = low if low + 1 < high else high - 1
                low = high - 1
        if low + 1 < high:
            search.commit((low + 1, high))

    def _stack(self, merged: list[Window], window: Window) -> tuple[int | tuple[int, ...], ...]:
        """The layers from the open window to the output, each window as one group."""
        groups = groups_of_windows([window, *merged], self.num_layers, first=window[0])
        return tuple(group[0] if len(group) == 1 else tuple(group) for group in groups)
