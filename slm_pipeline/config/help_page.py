"""The text of ``slm --help``, made from the configuration files so that it cannot drift from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from slm_pipeline import config
from slm_pipeline.config import groups, plugins

_GROUPS = (
    "model",
    "pruning_ratio",
    "threshold",
    "method",
    "calibration",
    "repair",
    "recovery",
    "evaluation",
    "measure",
    "tracker",
    "experiment",
)

_INTRODUCTION = """\
slm: compress a language model by depth and width. One command calibrates, prunes, repairs or trains, and evaluates.

  slm                                                     the defaults
  slm pruning_ratio=r35 recovery=none                     another option of a group
  slm method.merge_rule=base_difference seed=7            another value of a key
  slm dry_run=true                                        what would run, what would be reused
  slm -m threshold=fixed pruning_ratio=none threshold.value=0.7,0.8,0.9    one job for each
  slm -m sweeps=thresholds                                a study
  slm plugins=[mypackage] method=mine                     an option of another package; its --help shows them all

Running the same command again reuses every stage that is done and continues what was interrupted."""

_FURTHER = """\
More: slm --cfg job prints the whole configuration, slm --cfg job -p method one group of it;
eval "$(slm -sc install=bash)" switches tab completion on, with zsh or fish in the place of bash those shells';
slm --config-dir FOLDER adds options of your own; slm --hydra-help shows Hydra's own flags."""


def text(config_dir: str | None = None) -> str:
    """Introduction, every group with its options, the keys of the top level.

    Args:
        config_dir: a folder with options of the user's own, as ``--config-dir``. Studies of the user's own are those in
            ./sweeps.
    """
    parts = [_INTRODUCTION]
    own = [] if config_dir is None else [Path(config_dir)]
    for group in _GROUPS:
        parts.append(f"{group}=\n" + "\n".join(_option_lines(group, own)))
    parts.append("sweeps=   (with -m)\n" + "\n".join(_option_lines("sweeps", [Path(), *own])))
    parts.append(
        "hydra/launcher=   (with -m; also joblib, and basic: one after another)\n"
        + "\n".join(_option_lines("hydra/launcher", own))
    )
    parts.append("keys of the top level\n" + "\n".join(_key_lines()))
    parts.append(_FURTHER)
    return "\n\n".join(parts)


def _option_lines(group: str, own: Sequence[Path]) -> list[str]:
    """Each option with the first comment of its file; of a plugin's its package, of the user's own its file.

    Args:
        own: folders of the user's in which the group may have options; the first that has one of a name counts.
    """
    owners = {file: f" ({plugin.name})" for plugin in plugins.in_use() for file in plugin.options(group)}
    files = {file.stem: file for file in groups.option_files(group)}
    for folder in reversed(own):
        for file in sorted((folder / group).glob("*.yaml")):
            files[file.stem] = file
            owners[file] = f" ({file})"
    return [f"  {name:<20} {_first_comment(file)}{owners.get(file, '')}" for name, file in sorted(files.items())]


def _first_comment(file: Path) -> str:
    comments = (line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def _key_lines() -> list[str]:
    """Top-level keys with the values and comments of conf/config.yaml."""
    wanted = {option.name for option in fields(config.Config)} - set(_GROUPS)
    lines = []
    for line in (config.CONF_DIR / "config.yaml").read_text(encoding="utf-8").splitlines():
        key, separator, rest = line.partition(":")
        if separator and key in wanted:
            value, _, comment = rest.partition("#")
            lines.append(f"  {f'{key}={value.strip()}':<52}{comment.strip()}".rstrip())
    return lines
