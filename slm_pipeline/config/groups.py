"""Groups whose options are classes: which there are, ours and the plugins', and the object that a YAML describes."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from slm_pipeline.config import COMPOSITION_ERRORS, PLUG_INS, Config, EvaluationConfig, checked, plugins, ranges
from slm_pipeline.config.folders import CONF_DIR, SWEEPS_ROOT
from slm_pipeline.errors import UserError, did_you_mean

# What options are derived from. By name: these modules stand above this one.
_BASES = {
    "method": "slm_pipeline.methods.base.Method",
    "repair": "slm_pipeline.repair.base.Repair",
    "recovery": "slm_pipeline.recovery.base.Recovery",
    "measure": "slm_pipeline.evaluation.measure.Measure",
}


def build(node: Any, *, group: str, key: str = "") -> Any:
    """The object that a plug-in group's YAML describes; None for ``repair=none`` and ``recovery=none``, which have no
    class.

    ``_target_`` names a dataclass of this package or of a plugin; the other keys are its fields, checked for name, type
    and range, and by the class's own ``__post_init__``. The option ``none`` has no use for the keys of the others: see
    `unused`. A class whose ``steps_in`` names a field gets there, by name, the mappings that are no options of its own.

    Args:
        key: where the options stand, such as ``evaluation.perplexity``; empty: under the group's name.

    Raises:
        UserError: the class is not one of these, it lacks a key, or a value is of the wrong type or range.
    """
    target, values = _target_and_values(node, group)
    if target is None and group in ("repair", "recovery"):
        return None
    options = _options_class(target, group)
    lacking = set(values) - {option.name for option in fields(options)}
    if (steps := getattr(options, "steps_in", None)) is not None:
        found = {name for name in lacking if isinstance(values[name], (Mapping, DictConfig))}
        lacking -= found
        values[steps] = {name: values.pop(name) for name in [*values] if name in found}
    if lacking and options.name != "none":
        raise UserError(_lacks(min(lacking), group, key or group, options))
    return checked(options, {name: value for name, value in values.items() if name not in lacking}, key or group)


def unused(node: Any, *, group: str) -> list[str]:
    """Keys of a plug-in group that were set although its option is ``none``, by their whole names.

    So ``recovery=none`` can be laid over an experiment, or stand in a study, that sets what the others read.

    Raises:
        UserError: no option of the group has such a key.
    """
    target, values = _target_and_values(node, group)
    options = None if target is None and group in ("repair", "recovery") else _options_class(target, group)
    if options is not None and options.name != "none":
        return []
    own = {option.name for option in fields(options)} if options is not None else set()
    extra = [key for key in values if key not in own]
    known = _options_with(group, plugins.in_use())
    for key in extra:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            raise UserError(
                f"{group}.{key} does not exist in any option of {group};"
                f" {'did you mean' if near else 'there are'} {', '.join(near or sorted(known))}"
            )
    return [f"{group}.{key}" for key in extra]


def _target_and_values(node: Any, group: str) -> tuple[Any, dict[str, Any]]:
    if not isinstance(node or {}, (Mapping, DictConfig)):
        raise UserError(f"{group}={ranges.short(node)} must be one of {', '.join(sorted(_names(group)))}")
    values = {str(key): value for key, value in (node or {}).items()}
    return values.pop("_target_", None), values


def _options_class(target: Any, group: str) -> Any:
    """The dataclass that ``_target_`` names."""
    if target is None:
        raise UserError(f"{group} has no option; choose one of {', '.join(sorted(_names(group)))}")
    ours = isinstance(target, str) and target.startswith("slm_pipeline.")
    if not isinstance(target, str) or not (ours or plugins.is_named(target)):
        raise UserError(
            f"{group}._target_={target!r} must name a class in slm_pipeline, or in a package that plugins=[...] names"
        )
    module_name, _, class_name = target.rpartition(".")
    try:
        options = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{group}._target_={target!r} does not exist ({error})") from error
    except Exception as error:
        if ours:
            raise
        words = " ".join(str(error).split())
        raise UserError(f"{group}._target_={target!r} cannot be imported: {type(error).__name__}: {words}") from error
    if wrong := _fault(options, group):
        raise UserError(f"{group}._target_={target!r} is not the class of a {group}: {wrong}")
    if not ours and (CONF_DIR / group / f"{options.name}.yaml").exists():
        raise UserError(
            f"{group}._target_={target!r} calls itself {options.name!r}, as one of slm_pipeline does; tables and plans"
            " would not tell them apart: give the class another name"
        )
    return options


def _fault(options: Any, group: str) -> str | None:
    """Why it cannot be the class of an option, in words."""
    module, _, name = _BASES[group].rpartition(".")
    if not (isinstance(options, type) and issubclass(options, getattr(importlib.import_module(module), name))):
        return f"it is not derived from {_BASES[group]}"
    if lacking := sorted(getattr(options, "__abstractmethods__", ())):
        return f"it lacks {', '.join(lacking)}"
    if not isinstance(getattr(options, "name", None), str):
        return "it has no name"
    return None


def _lacks(name: str, group: str, key: str, options: Any) -> str:
    """Why a name is refused: which options have it, or what is like it."""
    message = f"{key}.{name} does not exist for {group}={options.name}"
    if others := _options_with(group, plugins.in_use()).get(name):
        message += f", only for {group}={', '.join(others)}"
    names = [option.name for option in fields(options)]
    return f"{message}{did_you_mean(str(name), names)}; {group}={options.name} has: {', '.join(names)}"


def option_files(group: str) -> list[Path]:
    """The YAML files of a group's options, of ours and of the plugins in use, by name."""
    folder = (SWEEPS_ROOT if group == "sweeps" else CONF_DIR) / group
    files = [*folder.glob("*.yaml"), *(file for plugin in plugins.in_use() for file in plugin.options(group))]
    return sorted(files, key=lambda file: file.stem)


def _names(group: str) -> list[str]:
    return [file.stem for file in option_files(group)]


@functools.cache
def _options_with(group: str, in_use: tuple[plugins.Plugin, ...]) -> dict[str, list[str]]:
    """Of each key of a plug-in group the options that have it; see `_classes`."""
    found: dict[str, list[str]] = {}
    for name, options in _classes(group, in_use).items():
        for option in fields(options):
            found.setdefault(option.name, []).append(name)
    return found


@functools.cache
def _classes(group: str, in_use: tuple[plugins.Plugin, ...]) -> dict[str, Any]:
    """The class of each option of a plug-in group that has one, of ours and of the plugins in use.

    A plugin's option that is wrong is left out: it is refused when it is chosen.
    """
    found = {}
    for file in option_files(group):
        refused = () if file.is_relative_to(CONF_DIR) else (UserError, *COMPOSITION_ERRORS, YAMLError)
        with suppress(*refused):
            values: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            values = values.get(group, values)  # some are written from the top
            if target := values.get("_target_"):
                found[file.stem] = _options_class(target, group)
    return found


def options_with(group: str, attribute: str) -> list[str]:
    """Names of the options of a plug-in group for whose class ``attribute`` is true."""
    return [name for name, options in _classes(group, plugins.in_use()).items() if getattr(options, attribute)]


def is_text(key: str) -> bool:
    """Whether an option, by its whole name, holds one text; one of a plug-in group if it does so in any of its options,
    one of Hydra if its own schema says so."""
    return str in _types(key)


def is_list_of_texts(key: str) -> bool:
    """As `is_text`, but whether it holds a list of them."""
    return list[str] in _types(key)


def _types(key: str) -> list[Any]:
    """What an option, by its whole name, may hold, without None and ranges; empty if there is none of that name."""
    first, *names = key.split(".")
    if first == "evaluation":
        kinds: list[Any] = [EvaluationConfig]
        if names and names[0] in (measures := _classes("measure", plugins.in_use())):
            kinds, names = [measures[names[0]]], names[1:]
    elif first in PLUG_INS:
        kinds = list(_classes(first, plugins.in_use()).values())
    elif first == "hydra":
        kinds = [HydraConf]
    else:
        kinds, names = [Config], [first, *names]
    if first == "method" and len(names) > 1:  # of a step of several methods
        names = names[1:]
    for name in names:
        hints = [ranges.declared(kind).get(name) for kind in kinds if is_dataclass(kind)]
        kinds = [ranges.split(hint)[0] for hint in hints if hint is not None]
    of_texts = [get_origin(kind) is list and ranges.split(get_args(kind)[0])[0] is str for kind in kinds]
    return [list[str] if is_list else kind for kind, is_list in zip(kinds, of_texts, strict=True)]
