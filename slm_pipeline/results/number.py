"""A number with all that tables, plots, servers and searches have to know of it. It is born in a measure or a stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slm_pipeline.config import TARGETS
from slm_pipeline.show.numerals import count

PERCENT = "%"
FEW = 5  # so few right or wrong answers that a standard error misleads: 0 of 20 is no proof of 0


@dataclass(frozen=True)
class Number:
    """One result.

    Attributes:
        key: its name everywhere: in summary.json, at W&B, as a column and as the objective; parts by slashes, the
            model first where it is of one: ``pruned/perplexity/bundled``.
        value: finite.
        unit: ``%``, ``nats/token``, ``seconds``, ``GB``, ``parameters``, ...; empty for a pure number.
        stderr: one standard error, in the same unit; None if unknown.
        higher_is_better: None where neither is better.
        measured: how, as JSON: ``measure`` (the option that measured it), ``how`` (for people) and the settings.
        detail: whether it is left to CSV and HTML, so that the other tables fit a page.
        cost: whether it says what the experiment took, not what came of it: left out of a paper's table.
    """

    key: str
    value: float
    unit: str = ""
    stderr: float | None = None
    higher_is_better: bool | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    detail: bool = False
    cost: bool = False

    @property
    def target(self) -> str:
        """The model that it is of; empty if it is of no one model."""
        return parted(self.key)[0]

    @property
    def quantity(self) -> str:
        """What it is: the key without the model."""
        return parted(self.key)[1]

    @property
    def is_score(self) -> bool:
        """Whether it is a share in percent of which more is better."""
        return self.unit == PERCENT and bool(self.higher_is_better)

    @property
    def is_count(self) -> bool:
        return self.unit in _COUNTED

    @property
    def direction(self) -> str:
        """Which values are better: ``higher``, ``lower`` or nothing."""
        return "" if self.higher_is_better is None else "higher" if self.higher_is_better else "lower"

    def below(self, *prefix: str) -> Number:
        """The same with a longer key; what is empty adds nothing."""
        return replace(self, key="/".join(part for part in (*prefix, self.key) if part))

    def to_json(self) -> dict[str, Any]:
        """What summary.json holds under its key; flags that are not set are left out."""
        known = {name: getattr(self, name) for name in ("value", "unit", "stderr", "higher_is_better")}
        flags = {name: True for name in ("detail", "cost") if getattr(self, name)}
        return {**known, **flags, "measured": dict(self.measured)}

    @classmethod
    def from_json(cls, key: str, said: Mapping[str, Any]) -> Number:
        """What `to_json` wrote; other keys of a later version are left out."""
        names = ("value", "unit", "stderr", "higher_is_better", "measured", "detail", "cost")
        return cls(key, **{name: said[name] for name in names if name in said})

    @property
    def sample(self) -> int | None:
        """Of how many examples it is the share in percent; None if it is no such share."""
        examples = self.measured.get("num_examples")
        return int(examples) if self.is_score and isinstance(examples, int) and 0 <= self.value <= 100 else None

    def __str__(self) -> str:
        """As people read it, with its error if there is one."""
        text = self.shown(self.value)
        return f"{text} {self.spread}" if self.spread else text

    @property
    def spread(self) -> str:
        """``+-1.2``, one standard error; near 0 and 100 % Wilson's interval instead, ``0.0-4.8``; empty if unknown."""
        if self.stderr is None:
            return ""
        if self.sample is not None and min(self.value, 100 - self.value) * self.sample / 100 < FEW:
            low, high = wilson(self.value, self.sample, 1.0)
            return f"({self.shown(low)}-{self.shown(high)})"
        return f"+-{self.shown_error(self.stderr)}"

    def shown(self, value: float) -> str:
        """A value of this kind as people read it."""
        if self.unit in _COUNTED:
            counted = value == int(value)
            return count(round(value)) if self.unit != "layers" else f"{value:g}" if counted else f"{value:.1f}"
        if self.unit == PERCENT:
            return f"{value:.1f}"
        if self.unit == "perplexity":
            return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"
        if self.unit == "seconds" and self.cost:
            return f"{value:.1f}" if value < 100 else f"{value:.0f}"
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

    def shown_error(self, error: float) -> str:
        """A standard error or deviation of this kind."""
        return f"{error:.2g}" if error and self.unit == "perplexity" and error < 0.1 else self.shown(error)


_COUNTED = ("layers", "parameters", "tokens")


def wilson(percent: float, examples: int, errors: float) -> tuple[float, float]:
    """Wilson's score interval of a share, in percent (J. Am. Stat. Assoc. 22, 1927).

    Args:
        percent: the share, in 0..100.
        examples: of how many.
        errors: standard errors to either side: 1 for 68 %, 1.96 for 95 %.
    """
    share, squared = percent / 100, errors**2
    centre = (share + squared / (2 * examples)) / (1 + squared / examples)
    half = errors / (1 + squared / examples) * math.sqrt(share * (1 - share) / examples + squared / (4 * examples**2))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def change(counts: Mapping[str, int]) -> str:
    """``{"dense": 30, "pruned": 24}`` -> ``-20.0%``."""
    return f"{100 * (counts['pruned'] / counts['dense'] - 1):+.1f}%"


def parted(key: str) -> tuple[str, str]:
    """``pruned/perplexity/bundled`` -> (``pruned``, ``perplexity/bundled``); ("", key) if it is of no one model."""
    target, _, quantity = key.partition("/")
    return (target, quantity) if target in TARGETS and quantity else ("", key)


def by_key(numbers: Sequence[Number]) -> dict[str, Number]:
    """Key -> number, in their order.

    Raises:
        ValueError: two numbers have one key.
    """
    found: dict[str, Number] = {}
    for number in numbers:
        if number.key in found:
            raise ValueError(f"two numbers are called {number.key}")
        found[number.key] = number
    return found
