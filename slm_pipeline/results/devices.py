"""Numbers that belong to the device that showed them, such as speed: those of two devices are not compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slm_pipeline.errors import UserError
from slm_pipeline.results.number import Number
from slm_pipeline.show.tables import in_order


def device_of(number: Number | None) -> str | None:
    """The device that a number holds for; None for one that is the same on any."""
    device = None if number is None else number.measured.get("device")
    return None if device is None else str(device)


def devices_of(numbers: Iterable[Number]) -> list[str]:
    """The devices that the numbers hold for, each once."""
    return in_order(device for number in numbers if (device := device_of(number)) is not None)


def check_one_device(key: str, mine: Number, others: Iterable[Mapping[str, Number]]) -> None:
    """Raise `UserError` if the same number of other runs is one of another device."""
    here = device_of(mine)
    for numbers in others if here is not None else ():
        there = device_of(numbers.get(key))
        if there is not None and there != here:
            raise UserError(f"{key} was measured on {here} here and on {there} in another job: they cannot be compared")
