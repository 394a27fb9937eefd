"""How the jobs of a multirun are composed: one whose options do not go together is an error of that job alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from slm_pipeline.config import CONF_DIR, one_line
from slm_pipeline.errors import UserError

FAULT = "fault"  # in a job's configuration: why it could not be composed
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)


class JobLoader(ConfigLoaderImpl):
    """Hydra's, for studies in which some combinations of options cannot be composed.

    Hydra composes every job before the first one starts, and a study's own configuration without what is swept; either
    may lack a key that another job's option has. Launchers hand this object on to their workers.
    """

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *args: Any, **options: Any
    ) -> DictConfig:
        """A study's own configuration takes swept options as they come, where it cannot be composed without them."""
        try:
            return super().load_configuration(config_name, overrides, run_mode, *args, **options)
        except HydraException:
            if run_mode != RunMode.MULTIRUN:
                raise
            parsed = OverridesParser.create(config_loader=self).parse_overrides(overrides)
            for chosen in examples(parsed):
                try:
                    found = super().load_configuration(config_name, chosen, run_mode, *args, **options)
                except HydraException:
                    continue
                found.hydra.overrides.task = [item.input_line for item in parsed if not item.is_hydra_override()]
                return found
            raise

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """A job's configuration; if there is none the study's own, with the reason under `FAULT`."""
        try:
            return super().load_sweep_config(master_config, sweep_overrides)
        except (*COMPOSITION_ERRORS, ValueError) as error:
            found = copy.deepcopy(master_config)
            parsed = OverridesParser.create().parse_overrides(sweep_overrides)
            with open_dict(found):
                found[FAULT] = reason(error, sweep_overrides, found.hydra.runtime.choices)
                found.hydra.overrides.task = list(sweep_overrides)
                options = found.hydra.job.config.override_dirname
                found.hydra.job.override_dirname = get_overrides_dirname(
                    parsed, options.exclude_keys, options.item_sep, options.kv_sep
                )
            return found


def install() -> None:
    """Have Hydra load every configuration through `JobLoader`."""
    hydra._internal.hydra.ConfigLoaderImpl = JobLoader  # type: ignore[misc]


def values(item: Override) -> list[str]:
    """An override with each of the values that it sweeps over, an interval with its lower end; itself if it does not.

    Raises:
        UserError: there is no value.
    """
    if not item.is_sweep_override():
        return [item.input_line or ""]
    if isinstance(interval := item.value(), IntervalSweep):
        return [f"{item.get_key_element()}={interval.start}"]
    found = [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
    if not found:
        what = "no option of a group" if isinstance(item.value(), Glob) else "nothing"
        raise UserError(f"{item.input_line} sweeps over {what}")
    return found


def examples(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Some jobs of a multirun, its first one first: every combination of swept groups, every other swept value once.

    If none of them can be composed, hardly any job can.
    """
    each = [values(item) for item in overrides]
    first = [found[0] for found in each]
    is_group = [(CONF_DIR / item.key_or_group).is_dir() for item in overrides]
    groups = [found if group else found[:1] for group, found in zip(is_group, each, strict=True)]
    yield from map(list, product(*groups))
    for place, found in enumerate(each):
        for value in [] if is_group[place] else found[1:]:
            yield [*first[:place], value, *first[place + 1 :]]


def reason(error: Exception, overrides: Sequence[str], choices: Any) -> str:
    """Why a job cannot be composed, in one line that names the option which lacks a key."""
    said = one_line(error)
    found = re.match(r"Could not override '(\w+)\.([\w.]+)'", said)
    if found is None:
        return said
    group, key = found.groups()
    named = [item.partition("=")[2] for item in overrides if item.partition("=")[0] == group]
    choice = named[-1] if named else OmegaConf.select(choices, group)
    return said if choice is None else f"{group}={choice} has no {key}: {said}"
