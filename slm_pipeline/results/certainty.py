"""How sure a number is: what guessing would score, and whether two numbers differ by more than noise.

Examples count as drawn anew for each model. Models are scored on the same ones, so that less than what is called noise
here may tell two of them apart; more always does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from slm_pipeline.data.tasks import NUM_CHOICES
from slm_pipeline.results.number import Number, wilson

SURE = 1.96  # standard errors: 95 % of a normal distribution


def chance(number: Number | None) -> float | None:
    """What guessing evenly among the answers scores, in percent; None where nobody has said, or of no number.

    A measure says so with ``chance`` in what it gives as ``measured``; those of the seven tasks, and their average, are
    known.
    """
    measured = {} if number is None else number.measured
    if "chance" in measured:
        return float(measured["chance"])
    if measured.get("measure") != "zero_shot":
        return None
    tasks = measured.get("tasks") or [measured.get("part")]
    if not all(task in NUM_CHOICES for task in tasks):
        return None
    return sum(100 / NUM_CHOICES[task] for task in tasks) / len(tasks)


def bounds(number: Number, errors: float = SURE) -> tuple[float, float] | None:
    """Between what the true value lies, so many standard errors to either side; None if no error is known.

    Of a share of ``num_examples`` it is Wilson's interval, which holds near 0 and 100 % too.
    """
    if number.stderr is None:
        return None
    if (examples := number.sample) is not None:
        return wilson(number.value, examples, errors)
    return number.value - errors * number.stderr, number.value + errors * number.stderr


def within_noise(one: Number, other: Number) -> bool | None:
    """Whether two numbers may be the same at 95 %; None if an error is unknown.

    By the interval of their difference made of the two intervals (Newcombe, Stat. Med. 17, 1998, method 10), which for
    errors that are even to both sides is the usual one.
    """
    first, second = bounds(one), bounds(other)
    if first is None or second is None:
        return None
    difference = one.value - other.value
    low = difference - math.hypot(one.value - first[0], second[1] - other.value)
    high = difference + math.hypot(first[1] - one.value, other.value - second[0])
    return low <= 0 <= high


def is_chance(number: Number) -> bool:
    """Whether a score may be that of guessing, at 95 %."""
    level, around = chance(number), bounds(number)
    return level is not None and around is not None and around[0] <= level


def cautions(numbers: Mapping[str, Number]) -> list[str]:
    """What a run's scores do not show, in words; nothing where they can be taken as they are.

    Args:
        numbers: of one run, by key.
    """
    lines = []
    totals = [number for number in numbers.values() if number.is_score and number.target and not number.detail]
    for quantity in dict.fromkeys(number.quantity for number in totals):
        of = {number.target: number for number in totals if number.quantity == quantity}
        if guessed := [target for target, number in of.items() if is_chance(number)]:
            level_shown = of[guessed[0]].shown(chance(of[guessed[0]]) or 0.0)
            lines.append(f"{quantity} of {_listed(guessed)}: within noise no better than guessing, {level_shown}")
        for target, number in of.items():
            if "dense" in of and number.value > of["dense"].value and (worse := _worse(numbers, target)) is not None:
                noise = " within noise" if within_noise(number, of["dense"]) else ""
                lines.append(
                    f"{target}: {quantity} {number.shown(number.value)} is above the dense model's"
                    f" {number.shown(of['dense'].value)}{noise}, but {worse}: {quantity} does not see the damage"
                )
    return lines


def _worse(numbers: Mapping[str, Number], target: str) -> str | None:
    """The first perplexity of a model that is above the dense model's, in words."""
    for dense in numbers.values():
        found = numbers.get(f"{target}/{dense.quantity}")
        if dense.target == "dense" and dense.unit == "perplexity" and found is not None and found.value > dense.value:
            return f"{dense.quantity} rose from {dense.shown(dense.value)} to {dense.shown(found.value)}"
    return None


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
