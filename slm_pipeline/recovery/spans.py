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
    layers = plan.layers()
    starts = [layer.originals[0] for layer in layers]
    ends = [layer.originals[-1] for layer in layers]
    for position in range(1, len(layers)):
        if gap == "below" or layers[position - 1].folded:
            ends[position - 1] = starts[position] - 1
        else:
            starts[position] = ends[position - 1] + 1
    starts[0], ends[-1] = 0, plan.model["num_layers"] - 1
    return [Span(position, *run) for position, run in enumerate(zip(starts, ends, strict=True))]


def changed_spans(plan: Plan, gap: str = "above") -> list[Span]:
    """The spans whose layer is not the original one in its task: merged, next to a gap, narrower, or short of a
    sublayer."""
    layers = plan.layers()
    changed = [bool(layer.missing or layer.resized) for layer in layers]
    return [span for span in spans(plan, gap) if span.first < span.last or changed[span.position]]
