"""CoMe: merge the most redundant run of layers by putting their most sensitive channels side by side, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import Range, UpToOne
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, ProtectsEnds, PruningProblem
from slm_pipeline.methods.target import Layers
from slm_pipeline.show.progress import ProgressBar
from slm_pipeline.surgery.concatenate import concatenate
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.progressive import ProgressiveStack
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.surgery.block import Block

REPEATS = ("forbid", "when_needed", "allow")


@dataclass(kw_only=True)
class Come(ProtectsEnds):
    """Layer as Puzzle Pieces (CoMe), arXiv 2510.15304, algorithm 1.

    Each step scores the current stack on the calibration text, picks the run of adjacent layers between whose two
    ends the residual stream turns least (SBI, mean of arccos(cos) / pi), and makes one layer of it: each layer gives
    its most sensitive key-value groups and neurons, in number proportional to the share that it has in the run's
    block influence. A channel's sensitivity is its mean |activation| times the column's L1 norm in the projection
    that reads it; a group's is the mean over its channels. Shapes stay, so the result is an ordinary model.

    Departures from the published code:
        - query heads are taken with their own key-value group (``official_gqa=True`` for the published selection,
          which scrambles every model with grouped-query attention);
        - SBI over all tokens, not each sample's last alone (``tokens=last``), and between the two ends of a run of
          any length, not always of two layers;
        - when every run contains a merged layer, ``repeat`` decides; the published code merges layers 0 and 1;
        - the last layer is scored on its true output, before the final norm;
        - after a merge only the layers above it are run again.

    Scores in the plan: steps, each with the run, its SBI, the shares, and how many groups and neurons each layer gave.
    """

    # Layers merged into one in a step; the last step may be shorter to land on the target.
    run_length: Annotated[int, Range(at_least=2, at_most=10_000)] = 2
    # forbid | when_needed | allow: may a merged layer be merged again. The published commands forbid it, which is an
    # error when nothing else is left.
    repeat: str = "forbid"
    power: Annotated[float, Range(at_least=0, at_most=100)] = 1.0  # of the influences in the shares; 0: equal ones
    min_largest_share: UpToOne = 0.0  # s: the largest share of n original layers is at least s ** (1 / (n - 1)); 0: off
    tokens: str = "all"  # all | last: those of each sample over which SBI is averaged
    official_gqa: bool = False  # pick query heads as the published code does (wrong for grouped-query attention)
    fold_norm: bool = False  # put each layer's RMS gain into its own rows, which is exact, instead of averaging (ours)
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(9, 2048))

    name: ClassVar[str] = "come"
    streams: ClassVar[bool] = True

    @property
    def mixes_layers(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeat not in REPEATS:
            raise UserError(f"method.repeat={self.repeat!r} is not one of {', '.join(REPEATS)}")
        if self.tokens not in ("all", "last"):
            raise UserError(f"method.tokens={self.tokens!r} is not one of all, last")

    def check(self, context: Context) -> None:
        super().check(context)
        source = context.source
        if self.official_gqa and source.architecture.fuses_queries:
            raise UserError(
                f"method.official_gqa=true: the published code cannot pick query heads in {source.name}, a"
                f" {source.model_type} model, whose queries, keys and values are one projection"
            )
        if self.fold_norm and not source.architecture.input_rms_norms:
            raise UserError(
                f"method.fold_norm=true needs RMS norms right before the projections; {source.name} is a"
                f" {source.model_type} model, which has none"
            )

    def fewest_left(self, num_layers: int) -> tuple[int, str]:
        fewest, why = super().fewest_left(num_layers)
        if self.repeat != "forbid":
            return fewest, why
        runs = math.ceil((num_layers - self.num_protected) / self.run_length)
        why = (
            f"{self.num_protected} protected; with method.repeat=forbid at most method.run_length={self.run_length}"
            " layers become one"
        )
        return max(fewest, self.num_protected + runs), why

    def memory(self, sizes: Sizes) -> int:
        """All dense states, a candidate's, and the layer that it is."""
        merged = sizes.item_bytes * sizes.block_parameters
        return sizes.states(sizes.tokens, sizes.layers + 2) + sizes.running(sizes.batch_tokens(4096)) + 2 * merged

    def plan(self, problem: PruningProblem[Layers]) -> Plan:
        from slm_pipeline.engine.progressive import ProgressiveStack

        stack = ProgressiveStack(problem.view, problem.input_ids)
        groups = [[layer] for layer in range(problem.view.num_layers)]
        ops: list[Merge] = []
        tensors: dict[str, Any] = {}
        steps: list[dict[str, Any]] = []
        with ProgressBar(total=problem.target.remove, desc=self.name, unit="layer") as progress:
            while (left := problem.target.remove - (problem.view.num_layers - len(groups))) > 0:
                length = min(self.run_length, left + 1)
                stack.renew()
                position, distance = self.least_turning_run(stack, groups, length)
                merged, shares, heads, neurons = self._merge(stack, groups, position, length)
                layers = [layer for group in groups[position : position + length] for layer in group]
                name = f"merge.{len(ops)}"
                ops.append(
                    Merge(
                        tuple(layers),
                        "concatenate",
                        shares=tuple(shares),
                        official_gqa=self.official_gqa,
                        fold_norm=self.fold_norm,
                        tensors=name,
                    )
                )
                for part in range(length):
                    tensors[f"{name}.heads.{part}"] = heads[part].numpy()
                    tensors[f"{name}.neurons.{part}"] = neurons[part].numpy()
                steps.append(
                    {
                        "layers": layers,
                        "distance": distance,
                        "shares": shares,
                        "heads": [len(part) for part in heads],
                        "neurons": [len(part) for part in neurons],
                    }
                )
                groups[position : position + length] = [layers]
                stack.merge(position, length, merged)
                progress.update(length - 1)
        return self.new_plan(
            problem,
            ops=ops,
            tensors=tensors,
            scores={"steps_taken": steps, "num_block_evaluations": stack.num_block_evaluations},
        )

    def least_turning_run(
        self, stack: ProgressiveStack, groups: Sequence[Sequence[int]], length: int
    ) -> tuple[int, float]:
        """Position and SBI of the run to merge."""
        runs = list(range(self.protect_first, len(groups) - self.protect_last - length + 1))
        fresh = [run for run in runs if all(len(group) == 1 for group in groups[run : run + length])]
        if self.repeat == "forbid" and not fresh:
            raise UserError(
                f"method={self.name}: no run of {length} unmerged layers is left at {len(groups)} layers;"
                " method.repeat=when_needed or allow merges merged layers again; or choose a smaller pruning_ratio"
            )
        allowed = fresh if self.repeat != "allow" and fresh else runs
        last = self.tokens == "last"
        distances = {run: stack.run_distance(run, length, last_token_only=last) for run in allowed}
        if not all(map(math.isfinite, distances.values())):
            raise UserError(f"method={self.name}: the states are not finite; try model.dtype=float32")
        best = min(allowed, key=lambda run: distances[run])
        return best, distances[best]

    def _merge(
        self, stack: ProgressiveStack, groups: Sequence[Sequence[int]], position: int, length: int
    ) -> tuple[Block, list[float], list[Tensor], list[Tensor]]:
        """The merged block, and shares, groups and neurons of each layer in the run."""
        scores = stack.scores[position : position + length]
        num_originals = sum(len(group) for group in groups[position : position + length])
        chosen = shares([score.influence for score in scores], self.power)
        chosen = raise_largest(chosen, self.min_largest_share, num_originals)
        merged, heads, neurons = self.concatenate(stack, position, length, chosen)
        return merged, chosen, heads, neurons

    def concatenate(
        self, stack: ProgressiveStack, position: int, length: int, chosen: Sequence[float]
    ) -> tuple[Block, list[Tensor], list[Tensor]]:
        view = stack.view
        head_counts, neuron_counts = split(view.num_kv_heads, chosen), split(view.num_neurons, chosen)
        heads, neurons = [], []
        for offset in range(length):
            by_head, by_neuron = sensitivities(stack, position + offset)
            heads.append(most_sensitive(by_head, head_counts[offset]))
            neurons.append(most_sensitive(by_neuron, neuron_counts[offset]))
        merged = concatenate(
            view,
            stack.blocks[position : position + length],
            heads=heads,
            neurons=neurons,
            shares=chosen,
            official_gqa=self.official_gqa,
            fold_norm=self.fold_norm,
        )
        return merged, heads, neurons


@dataclass(kw_only=True)
class ComePosterior(Come):
    """CoMe-P, algorithm 2: as CoMe in pairs, but the shares are searched: of r = 0, 1/n, ..., 1 for the lower layer the
    one with the least language-model loss on the calibration text, the first on ties.

    Splits that give the same groups and neurons are measured once, and only blocks from the merged one up are run.
    ``power`` and ``min_largest_share``, which are about CoMe's shares, are refused.
    """

    granularity: Annotated[int, Range(at_least=1, at_most=10_000)] = 20  # n

    name: ClassVar[str] = "come_posterior"
    streams: ClassVar[bool] = False
    min_seq_len: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_length != 2:
            raise UserError(f"method.run_length={self.run_length}: come_posterior merges pairs")
        self.refuse_unused("in come_posterior, which searches the shares", "power", "min_largest_share")

    def _merge(
        self, stack: ProgressiveStack, groups: Sequence[Sequence[int]], position: int, length: int
    ) -> tuple[Block, list[float], list[Tensor], list[Tensor]]:
        tried: dict[tuple[int, int], tuple[float, Any]] = {}
        for step in range(self.granularity + 1):
            lower = step / self.granularity
            chosen = [lower, 1 - lower]
            key = split(stack.view.num_kv_heads, chosen)[0], split(stack.view.num_neurons, chosen)[0]
            if key not in tried:
                merged, heads, neurons = self.concatenate(stack, position, length, chosen)
                tried[key] = stack.loss(position, length, merged), (merged, chosen, heads, neurons)
        finite = [item for item in tried.values() if item[0] < float("inf")]
        if not finite:
            raise UserError("the loss is not finite for any split of the merged layers; try model.dtype=float32")
        return min(finite, key=lambda item: item[0])[1]


def shares(influences: Sequence[float], power: float) -> list[float]:
    """Influence ** power, normalised to sum to 1; equal shares when nothing has any influence."""
    powers = [influence**power for influence in influences]
    total = sum(powers)
    return [value / total for value in powers] if total > 0 else [1 / len(powers)] * len(powers)


def raise_largest(values: Sequence[float], floor: float, num_originals: int) -> list[float]:
    """Raise the largest share to ``floor ** (1 / (num_originals - 1))`` if it is below, and shrink the others."""
    largest = max(values)
    wanted = floor ** (1 / (num_originals - 1))
    if wanted <= largest:
        return list(values)
    top = list(values).index(largest)
    return [wanted if index == top else value * (1 - wanted) / (1 - largest) for index, value in enumerate(values)]


def split(num_units: int, chosen: Sequence[float]) -> list[int]:
    """Whole numbers of units by share: rounded down, the largest share takes the remainder."""
    counts = [int(num_units * share) for share in chosen]
    counts[list(chosen).index(max(chosen))] += num_units - sum(counts)
    return counts


def most_sensitive(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, ascending."""
    return scores.topk(count).indices.sort().values


def sensitivities(stack: ProgressiveStack, position: int) -> tuple[Tensor, Tensor]:
    """Sensitivity of every key-value group and every neuron of a block of the current stack."""
    view, block, scores = stack.view, stack.blocks[position], stack.scores[position]
    by_channel = []
    for name, mean_abs in (
        (view.architecture.attention_output, scores.attention_mean_abs),
        (view.architecture.mlp_output, scores.mlp_mean_abs),
    ):
        by_channel.append(mean_abs * block.parameter(view, f"{name}.weight").float().abs().sum(dim=0).cpu())
    return by_channel[0].view(view.num_kv_heads, -1).mean(dim=1), by_channel[1]
