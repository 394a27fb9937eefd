"""Which original layers each layer of a pruned model stands for. Read from the plan alone; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from slm_pipeline.surgery.plan import Plan

GAPS = ("above", "below")


@dataclass(frozen=True)
class Span:
    """A layer of the pruned model and the run of original layers in whose place it is.

    Attributes:
        position: in the pruned model.
        first, last: the run's ends, both included. Its task: what enters ``first`` in, what leaves ``last`` out.
    """

    position: int
    first: int
    last: int


def spans(plan: Plan, gap: str = "above") -> list[Span]:
    """One for each layer of the pruned model; together they cover the dense model's layers, in order.

    Args:
        gap: whether dropped layers belong to the next kept layer ``above`` (towards the output) or ``below``. Where
            there is none, and where the layer below was folded with a map that replaces them, it is the other.
    """
    folded = {op["layers"][0] for op in plan.ops if op["op"] == "fold"}
    starts = [group[0] for group in plan.layer_groups]
    ends = [group[-1] for group in plan.layer_groups]
    for position in range(1, plan.num_layers):
        if gap == "below" or plan.layer_groups[position - 1][0] in folded:
            ends[position - 1] = starts[position] - 1
        else:
            starts[position] = ends[position - 1] + 1
    starts[0], ends[-1] = 0, plan.model["num_layers"] - 1
    return [Span(position, *run) for position, run in enumerate(zip(starts, ends, strict=True))]


def changed_spans(plan: Plan, gap: str = "above") -> list[Span]:
    """The spans whose layer is not the original one in its task: merged, next to a gap, or short of a sublayer."""
    short = {position for positions in plan.missing_positions().values() for position in positions}
    return [span for span in spans(plan, gap) if span.first < span.last or span.position in short]
