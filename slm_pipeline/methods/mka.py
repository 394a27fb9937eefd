"""MKA: merge adjacent layers whose states lie on similar manifolds, by a weighted sum of all their parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import Count, Range
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.methods.target import Layers
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.sizes import Sizes

PAIRS = ("similar", "last")


@dataclass(kw_only=True)
class Mka(LayerRemoval):
    """Manifold-based knowledge alignment and layer merging (MKA), arXiv 2406.16330, EMNLP 2024.

    The output states of a layer on the calibration text are a cloud of points; a diffusion map gives each point two
    coordinates, which are replaced by their ranks. Two layers are similar by the normalised pairwise information
    bottleneck (NPIB): I(i; j) / sqrt(H_i H_j), the mutual information of their coordinates over the entropies, both
    estimated from nearest neighbours (`slm_pipeline.engine.manifold`). The most similar pair of adjacent layers is
    merged, again and again. With S_l the mean similarity of layer l to all layers, itself included, the lower of a
    pair gets the share sigmoid(sharpness * S_l / (S_l + S_m)), the upper the rest: at sharpness 1 always about 0.62.

    This is a reading: the abstract and the released code were at hand, the paper's body was not. What the code does
    not say is ours: that pairs are chosen by similarity; that similarities are never taken again; that a merged layer
    is as similar to its neighbour as the two original layers that face each other, and its S is the mean over its
    originals.

    Departures from the published code, which merges nothing: it writes the sums into a temporary dictionary, always
    for the two last layers, and so drops the last layers (``official=True``; exactly `reverse`):
        - the sums are written, all parameters included: norms, biases (by share), q/k norms;
        - the states are a layer's true output, before the final norm, not its input; the points are tokens at even
          distances, not padded questions; one pass over the text, not one for each layer and sample;
        - the kernel's scale is the median distance in the cloud, not 8. SmolLM2's medians rise from about 50 to 830
          with the layer; with 8 the leading coordinate of half of its layers tells a single token from all others;
        - an estimate of the information below 0 counts as 0.
    The published text is test questions of MMLU, so its MMLU scores are not clean; any calibration text does here.

    Scores in the plan, unless official: similarity[l] of layers l and l + 1; mean_similarity[l], which is S_l; merges,
    each with the layers, the similarity of the two that face each other, and the shares of the lower and upper part.
    """

    pairs: str = "similar"  # similar | last (always the two last layers, as the re-implementation in CoMe's code)
    official: bool = False  # drop the last layers; of the other options only the protected layers count
    sharpness: Annotated[float, Range(at_least=0, at_most=1000)] = 1.0  # beta in the shares; 0 shares equally
    # Tokens in a cloud, if the calibration text has as many; time and memory grow with its square.
    num_points: Annotated[int, Range(at_least=3, at_most=2**16)] = 512
    num_neighbors: Count = 5  # in the estimate of the mutual information
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(64, 256))

    name: ClassVar[str] = "mka"

    @property
    def mixes_layers(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs not in PAIRS:
            raise UserError(f"method.pairs={self.pairs!r} is not one of {', '.join(PAIRS)}")
        if self.num_points < self.num_neighbors + 2:
            raise UserError(f"method.num_points={self.num_points} must be at least {self.num_neighbors + 2}")
        if self.official:
            self.refuse_unused(
                "with method.official=true, which looks at no similarity",
                "pairs", "sharpness", "num_points", "num_neighbors",
            )  # fmt: skip
        if self.pairs == "last" and self.sharpness == 0:
            self.refuse_unused(
                "with method.pairs=last and method.sharpness=0, which ask for no similarity",
                "num_points", "num_neighbors",
            )  # fmt: skip

    @property
    def reads_calibration(self) -> bool:
        return not self.official

    def memory(self, sizes: Sizes) -> int:
        """States behind all layers; on a processor the clouds too."""
        return 0 if self.official else sizes.passing(2048) + sizes.running(sizes.batch_tokens(2048))

    def plan(self, problem: PruningProblem[Layers]) -> Plan:
        candidates = self.candidates(problem.view.num_layers)
        if self.official:
            return self.removal_plan(problem, candidates[::-1][: problem.target.remove], scores={})
        similarity = self._similarity(problem)
        adjacent, means = similarity.diagonal(1).tolist(), similarity.mean(dim=1).tolist()
        groups = [[layer] for layer in range(problem.view.num_layers)]
        merges: list[dict[str, Any]] = []
        for layer in self._boundaries(candidates, adjacent)[: problem.target.remove]:
            position = next(index for index, group in enumerate(groups) if group[-1] == layer)
            pair = groups[position : position + 2]
            lower, upper = (sum(means[member] for member in group) / len(group) for group in pair)
            share = 1 / (1 + math.exp(-self.sharpness * lower / (lower + upper)))
            groups[position : position + 2] = [pair[0] + pair[1]]
            merges.append({"layers": pair[0] + pair[1], "similarity": adjacent[layer], "shares": [share, 1 - share]})
        return self.new_plan(
            problem,
            ops=[Merge(tuple(merge["layers"]), "weighted", shares=tuple(merge["shares"])) for merge in merges],
            scores={"similarity": adjacent, "mean_similarity": means, "merges": merges},
        )

    def _boundaries(self, candidates: list[int], adjacent: list[float]) -> list[int]:
        """Layers l between which and l + 1 there may be a merge, the one to merge first first.

        Similarities of what faces each other never change, so the whole order is known beforehand; ties by index.
        """
        lower = candidates[:-1]
        return lower[::-1] if self.pairs == "last" else sorted(lower, key=lambda layer: -adjacent[layer])

    def _similarity(self, problem: PruningProblem) -> Tensor:
        """NPIB of each two layers: [layers, layers] float64, at least 0."""
        from slm_pipeline.engine.manifold import diffusion_map, output_clouds, ranks, similarities

        num_tokens = problem.input_ids.numel()
        if num_tokens < self.num_neighbors + 2:
            raise UserError(
                f"method.num_neighbors={self.num_neighbors} needs at least {self.num_neighbors + 2} calibration tokens;"
                f" there are {num_tokens}"
            )
        clouds = output_clouds(problem.view, problem.input_ids, min(self.num_points, num_tokens))
        for layer, cloud in enumerate(clouds):
            if not cloud.isfinite().all():
                raise UserError(
                    f"method={self.name}: the states after layer {layer} are not finite; try model.dtype=float32"
                )
        embeddings = [ranks(diffusion_map(cloud.to(problem.view.device))) for cloud in clouds]
        return similarities(embeddings, self.num_neighbors)
