"""FinerCut: remove attention and feed-forward networks one by one, each time the one that changes the output least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, ProtectsEnds, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.surgery.ops import Op
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import EXPORTS, DropSublayer
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.engine.walk import Removal
    from slm_pipeline.models.sizes import Sizes

OBJECTIVES = ("angular", "euclidean", "jensen_shannon")
COUNTS = ("parameters", "sublayers")


@dataclass(kw_only=True)
class FinerCut(ProtectsEnds):
    """FinerCut, arXiv 2405.18218: greedy over 2 x layers candidates, each an attention or a feed-forward network with
    its norm, by how much the model's output differs from the dense model's.

    A ratio or a number of layers means as many parameters as these layers have, so that rows of one ratio are of one
    size; with ``counts=sublayers``, as in the paper, twice as many sublayers. Parameters are those at work, with either
    export; zeroed ones do no work. A layer that loses both goes altogether. All candidates of a round walk up the stack
    together (`slm_pipeline.engine.walk`). There is no published code, and of the paper only the abstract could be read:
    sample size, default objective and search range are ours.

    The ends that are protected keep both sublayers.

    Scores in the plan: rounds, each with the sublayer removed, the distance then, and that of every candidate measured
    (null for one that was given up because it could not win any more).
    """

    # angular | euclidean | jensen_shannon, a mean over tokens: the angle between the final-normed states / pi, the
    # length of their difference, or the divergence of the next-token distributions in nats, which costs the head.
    objective: str = "angular"
    # stock | custom: what a checkpoint is. stock: the dense model's class, the last projections of missing sublayers
    # are zero; same function, nothing faster or smaller. custom: they are absent, which is faster and smaller; the
    # checkpoint brings a modelling file and loads with trust_remote_code=True.
    export: str = "stock"
    # parameters | sublayers: what a number of layers stands for: as many parameters as they have, or twice as many
    # sublayers, of which attention is the smaller one.
    counts: str = "parameters"
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(10, 128))

    name: ClassVar[str] = "finercut"
    streams: ClassVar[bool] = True
    shares_samples: ClassVar[bool] = True
    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, allowed in (("objective", OBJECTIVES), ("export", EXPORTS), ("counts", COUNTS)):
            if getattr(self, option) not in allowed:
                raise UserError(f"method.{option}={getattr(self, option)!r} is not one of {', '.join(allowed)}")

    def layers_left(self, num_layers: int, target: Layers) -> None:
        return None

    def memory(self, sizes: Sizes) -> int:
        return sizes.walking(2 * sizes.layers)

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.engine.walk import Removal, RemovalWalk
        from slm_pipeline.surgery.apply import layer_sizes

        target = problem.target
        if isinstance(target, Layers) and self.counts == "parameters":
            sizes = layer_sizes(problem.view)
            target = Parameters(target.remove * sum(size.at_work for size in sizes) // len(sizes))
        walk = RemovalWalk(problem.view, problem.input_ids, criterion=self.objective)
        layers = self.candidates(problem.view.num_layers)
        candidates = [
            Removal(layer, part) for layer in layers for part in SUBLAYERS if not problem.view.lacks(layer, part)
        ]
        most = len(candidates) if isinstance(target, Parameters) else 2 * target.remove
        removed: list[Removal] = []
        rounds: list[dict[str, Any]] = []
        num_parameters = 0
        for found in walk.greedily(candidates, most):
            removed.append(found.removed)
            rounds.append(found.as_scores("distance", "distances"))
            num_parameters += problem.view.sublayer_parameters(*found.removed)
            if isinstance(target, Parameters) and num_parameters >= target.remove:
                break
        return self._removal_plan(problem, removed, rounds, walk.num_block_evaluations)

    def _removal_plan(
        self, problem: PruningProblem, removed: Sequence[Removal], rounds: list[dict[str, Any]], evaluations: float
    ) -> Plan:
        lost = {layer: [part for at, part in removed if at == layer] for layer, _ in removed}
        gone = sorted(
            layer
            for layer, parts in lost.items()
            if all(part in parts or problem.view.lacks(layer, part) for part in SUBLAYERS)
        )
        ops: list[Op] = [Drop(tuple(gone))] if gone else []
        for layer, parts in sorted(lost.items()):
            if layer not in gone:
                ops.append(DropSublayer((layer,), parts[0], self.export))
        return self.new_plan(
            problem,
            ops=ops,
            scores={"rounds": rounds, "num_block_evaluations": evaluations},
        )
