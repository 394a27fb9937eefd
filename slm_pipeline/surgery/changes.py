"""What a plan does beside merging and dropping whole layers, in numbers, words and marks.

JSON in the merge's result and in summary.json, so that reports need neither the plan nor the code of its operations. No
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slm_pipeline.show.marks import Mark
from slm_pipeline.surgery.ops import LayerSize, Op, walk
from slm_pipeline.surgery.ops.drop_sublayer import sublayer_lines, sublayer_marks, zeroed_parameters
from slm_pipeline.surgery.plan import Plan


@dataclass(frozen=True)
class Changes:
    """See the module.

    Attributes:
        lines: for people.
        marks: for pictures.
        idle_parameters: that the checkpoint holds and that do nothing.
        facts: entries of summary.json that operations of one kind make themselves.
    """

    lines: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    idle_parameters: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Changes:
        """Those in a merge's result or in a summary; both of before had ``sublayers`` and nothing else."""
        if "changes" in found:
            changes = found["changes"]
            return cls(**{**changes, "marks": [Mark(**mark) for mark in changes["marks"]]})
        if not (sublayers := found.get("sublayers")):
            return cls()
        lines = sublayer_lines(sublayers) if "export" in sublayers else []
        return cls(lines, sublayer_marks(sublayers), zeroed_parameters(sublayers), {"sublayers": sublayers})

    def to_json(self, *, with_facts: bool = True) -> dict[str, Any]:
        values = asdict(self)
        return values if with_facts else {name: value for name, value in values.items() if name != "facts"}


def measure_changes(plan: Plan, dense: Sequence[LayerSize]) -> tuple[list[LayerSize], Changes]:
    """Sizes of the pruned model's layers, and what its operations changed.

    Args:
        dense: sizes of the dense model's layers.
    """
    kept = {layer for group in plan.layer_groups for layer in group}
    taken: dict[str, int] = {}  # parameters that do no work any more, by kind of operation

    def is_told(op: Op) -> bool:  # not what was done within a layer that went later
        return op.takes_whole or kept.issuperset(op.layers)

    def step(op: Op, members: list[LayerSize]) -> LayerSize | None:
        left = op.count(members)
        lost = sum(member.at_work for member in members) - (left.at_work if left else 0)
        taken[op.name] = taken.get(op.name, 0) + (lost if is_told(op) else 0)
        return left

    sizes = walk(plan.ops, dense, step)
    changes = Changes(idle_parameters=sum(size.idle for size in sizes))
    for kind, every in plan.ops_by_kind():
        if not (ops := [op for op in every if is_told(op)]):
            continue
        changes.lines.extend(kind.lines(ops, taken[kind.name]))
        changes.marks.extend(kind.marks(ops))
        changes.facts.update(kind.facts(ops, taken[kind.name]))
    return sizes, changes
