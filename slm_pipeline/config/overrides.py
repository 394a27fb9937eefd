"""The overrides of a command line: what Hydra reads in them, or how they have to be written. Imports nothing heavy."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf

from slm_pipeline import config
from slm_pipeline.config import groups, plugins, ranges
from slm_pipeline.errors import UserError, did_you_mean

_QUOTED = re.compile(r""""[^"]*"|'[^']*'""")
_BETWEEN_COMMAS = re.compile(rf"(?:{_QUOTED.pattern}|\([^()]*\)|[^,])+")
_NOT_STEPS = ("none", "from_plan", "combined")
MOST_JOBS = 10_000  # of a study; each has a folder, and a row in its table


def parse_overrides(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """What Hydra reads in them.

    Args:
        loader: knows the options that ``glob()`` chooses from.

    Raises:
        UserError: it cannot read one, or reads something else than the text that was meant; with the form that works.
    """
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{ranges.short(override)}: options are written KEY=VALUE{_key_of(override)}")
        try:
            item = parser.parse_override(override)
        except (HydraException, ValueError, RecursionError) as error:
            reason = str(error).strip().partition("\n")[0]
            shown = override if override.isprintable() else repr(override)
            raise UserError(f"cannot read {shown[:300]}: {reason[:300]}{as_text_hint(override)}") from error
        raw, value = override.partition("=")[2], item._value
        if isinstance(value, str) and raw != raw.strip():
            raise UserError(f"{override!r}: blanks at its ends are lost{as_text_hint(override)}")
        if isinstance(value, int) and value.bit_length() > 1000:
            raise UserError(f"{item.key_or_group}={ranges.short(value)} is too large a number")
        no_text = isinstance(value, (bool, int, float, list, dict)) and str(value) != raw
        if no_text and groups.is_text(item.key_or_group):
            raise UserError(f"{override} is read as {item.value()}{as_text_hint(override)}")
        item.config_loader = loader
        parsed.append(item)
    return parsed


def _key_of(word: str) -> str:
    """What it may have been meant for: the options of that name, or a pruning ratio."""
    groups_with_it = sorted(file.parent.name for file in config.CONF_DIR.glob("*/*.yaml") if file.stem == word)
    if groups_with_it:
        return f" (did you mean {' or '.join(f'{group}={word}' for group in groups_with_it)}?)"
    ratio = other_ratio("pruning_ratio", word)
    return f"; {ratio}" if ratio else ""


def as_text_hint(override: str) -> str:
    """The end of a message about an override: how a shell and Hydra take its value as one text, whatever is in it.

    Of an option that is a list of texts as a list of them, parted by the commas outside quotes and parentheses; nothing
    of an option that holds anything else.
    """
    key, equals, value = override.partition("=")
    if not equals or ranges.Text(at_most=300).fault(value):
        return ""
    if groups.is_text(name := key.lstrip("+~")):
        return f"; as one text it is written {shlex.quote(f'{key}={_quoted(value)}')}"
    if not groups.is_list_of_texts(name):
        return ""
    texts = (text.strip() for text in _BETWEEN_COMMAS.findall(value.strip().removeprefix("[").removesuffix("]")))
    plain = (text[1:-1] if _QUOTED.fullmatch(text) else text for text in texts if text)
    return f"; as a list of texts it is written {shlex.quote(f'{key}=[' + ','.join(map(_quoted, plain)) + ']')}"


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.double).with_quotes()


def asks_for_several_jobs(item: Override) -> str:
    """What a sweep without -m asks for."""
    as_text = as_text_hint(item.input_line or "") if set("/ ") & set(item.input_line or "") else ""
    return f"{item.input_line} asks for several jobs{as_text}"


def check_group(item: Override) -> None:
    """Raise `UserError` unless an override of a group names one option, or one for each job."""
    group, given = item.key_or_group, item.value()
    if not _is_group(group) or isinstance(given, Glob):
        return
    values = [*map(Override._convert_value, given.list)] if isinstance(given, ChoiceSweep) else [given]
    for value in values:
        if item.package and group == "method" and value in _NOT_STEPS:
            raise UserError(f"{item.input_line}: {value} takes no part of a target, so it cannot be a step of a method")
    for value in values:
        if isinstance(value, list) and group == "measure" and all(isinstance(name, str) for name in value):
            continue  # several stand side by side
        if isinstance(value, list):  # Hydra would lay the options over one another without a word
            names = ",".join(map(str, value))
            in_turn = "; methods in turn are method=combined with its steps" if group == "method" else ""
            raise UserError(
                f"{item.input_line} names several options of {group}; choose one, or one job each:"
                f" slm -m {item.get_key_element()}={names}{in_turn}"
            )
        if not isinstance(value, str) or not value:
            names = ", ".join(file.stem for file in groups.option_files(group))
            of_ones_own = f"; {hint}" if (hint := other_ratio(group, value)) else ""
            raise UserError(f"{item.input_line}: {group} is a group, choose one of its options: {names}{of_ones_own}")


def refusal(error: Exception) -> str:
    """Why Hydra cannot compose a configuration, in a line: of an option that nobody has, which it nearly is, and which
    there are. A file that chooses it is named."""
    message = config.one_line(error)
    group, _, name = str(getattr(error, "missing_cfg_file", "") or "").rpartition("/")
    if not isinstance(error, MissingConfigException) or not group:
        return message
    names = GlobalHydra.instance().config_loader().get_group_options(group)
    ratio = other_ratio(group, name)
    near = f" ({ratio})" if ratio else did_you_mean(name, names)
    allowed = f"; {group} is one of {', '.join(names)}" if names else ""
    file = re.match(r"In '(?!config'|hydra/config')[^']*': ", message)  # else it is the command line that chooses it
    return f"{file[0] if file else ''}{group}={name}: no option of that name{near}{allowed}{plugins.without_options()}"


def other_ratio(group: str, value: Any) -> str:
    """How a pruning ratio that is no option is asked for: 0.2, 40 or r40; empty where nothing of that kind was."""
    found = re.fullmatch(r"r?(\d+(?:\.\d+)?)", str(value)) if group == "pruning_ratio" else None
    if found is None or not (number := float(found[1])) < 100 or not number:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        layers = f"; for {value} layers left pruning_ratio=layers pruning_ratio.num_layers={value}"
    else:
        layers = ""
    ratio = number if number < 1 and not isinstance(value, int) else number / 100
    return f"any other ratio: pruning_ratio.ratio={ratio:g}{layers}"


def check_added_measures(before: Any, after: Any) -> None:
    """Raise `UserError` if what ``+measure=`` adds undoes what files set of a measure: Hydra lays it over them.

    Args:
        before: ``evaluation`` as it is composed without.
        after: and with it.
    """
    set_before, set_after = _measures(before), _measures(after)
    for name, values in set_before.items():
        if undone := [key for key in values if set_after[name].get(key) != values[key]]:
            raise UserError(
                f"+measure={name} would undo evaluation.{name}.{undone[0]}={ranges.short(values[undone[0]])}, which a"
                f" file sets; chosen among the others it does not: measure=[{','.join(set_after)}]"
            )


def _measures(evaluation: Any) -> dict[str, Any]:
    """The options of each measure as they are written, before interpolation."""
    values: Any = OmegaConf.to_container(evaluation, resolve=False) if OmegaConf.is_config(evaluation) else {}
    return {name: of_measure for name, of_measure in values.items() if isinstance(of_measure, dict)}


def _is_group(name: str) -> bool:
    return _folder(name).is_dir()


def _folder(group: str) -> Path:
    return (config.SWEEPS_ROOT if group == "sweeps" else config.CONF_DIR) / group


def first_value(item: Override) -> str:
    """An override with the first of the values that it sweeps over, in their order; itself if it does not.

    Raises:
        UserError: there is no value.
    """
    if not item.is_sweep_override():
        return item.input_line or ""
    if not _num_values(item):
        what = "no option of a group" if isinstance(item.value(), Glob) else "nothing"
        raise UserError(f"{item.input_line} sweeps over {what}")
    value = item.value()
    first = value.start if isinstance(value, (IntervalSweep, RangeSweep)) else next(item.sweep_string_iterator())
    return f"{item.get_key_element()}={first}"


def check_number_of_jobs(overrides: Sequence[Override]) -> None:
    """Raise `UserError` where the overrides' values make more than `MOST_JOBS` jobs; makes no list of them."""
    swept = {item.get_key_element(): item for item in overrides}  # of two with one key the last counts
    numbers = {item.input_line: _num_values(item) for item in swept.values() if item.is_sweep_override()}
    if (asked := math.prod(numbers.values())) > MOST_JOBS:
        of = ", ".join(f"{ranges.short(line)[1:-1]} has {ranges.short(number)}" for line, number in numbers.items())
        raise UserError(f"a study has at most {MOST_JOBS} jobs; these are {ranges.short(asked)}: {of}")


def _num_values(item: Override) -> int:
    value = item.value()
    if isinstance(value, RangeSweep):
        try:
            start, stop, step = (Fraction(number) for number in (value.start, value.stop, value.step))  # type: ignore
            return max(0, math.ceil((stop - start) / step))
        except (ValueError, OverflowError, ZeroDivisionError) as error:
            raise UserError(f"{item.input_line}: no range has such bounds or such a step") from error
    if isinstance(value, IntervalSweep):
        return 1
    return len(value.list) if isinstance(value, ChoiceSweep) else len(list(item.sweep_iterator()))
