"""What sets the trainings of one recovery apart, of which there may be several, one after the other. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Where one training stands among those of its recovery.

    Attributes:
        folder: where in ``problem.out`` its checkpoints go, and no other's.
        begin, end: between which shares of the steps that the options allow: 0.8 and 1 are the last fifth.
        minutes: its share of ``max_minutes``.
        steps_before: optimizer steps of the trainings before; its own are counted on from there.
        prefix: of the names of its losses.
        keep: the weights of the ``best`` validation loss, or the ``last``.
    """

    folder: str = "checkpoints"
    begin: float = 0.0
    end: float = 1.0
    minutes: float = 1.0
    steps_before: int = 0
    prefix: str = ""
    keep: str = "best"

    def row(self, logged: Mapping[str, float], step: int) -> dict[str, float]:
        """A row of the recovery's curve from what was logged at a step of this phase."""
        named = {self.prefix + name: logged[name] for name in ("loss", "eval_loss") if name in logged}
        if "learning_rate" in logged:
            named["learning_rate"] = logged["learning_rate"]
        return {"step": step + self.steps_before, **named}


WHOLE = Phase()  # the only training of its recovery
