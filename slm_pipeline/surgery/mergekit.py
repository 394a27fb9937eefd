"""Plans that only remove layers, as mergekit's passthrough YAML, and back.

mergekit's layer ranges are half-open: ``layer_range: [0, 21]`` is layers 0 to 20.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slm_pipeline.errors import UserError


def to_mergekit(kept: list[int], model: str, dtype: str) -> str:
    """The YAML that keeps the layers ``kept`` (original indices, ascending) of ``model``."""
    slices: list[dict[str, Any]] = []
    start = 0
    for index in range(1, len(kept) + 1):
        if index == len(kept) or kept[index] != kept[index - 1] + 1:
            source = {"model": model, "layer_range": [kept[start], kept[index - 1] + 1]}
            slices.append({"sources": [source]})
            start = index
    return yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": dtype}, sort_keys=False)


def kept_layers(path: Path) -> list[int]:
    """The layers that a passthrough YAML keeps.

    Raises:
        UserError: the file is missing or not a passthrough of one model's layers in their order, each at most once.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if values["merge_method"] != "passthrough":
            raise UserError(f"{path}: merge_method={values['merge_method']!r} is not passthrough: it is not a removal")
        sources = [source for part in values["slices"] for source in part["sources"]]
        ranges = [source["layer_range"] for source in sources]
        kept = [layer for low, high in ranges for layer in range(low, high)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not mergekit's passthrough YAML with slices, sources, layer_range: {reason}"
        ) from error
    if len({str(source["model"]) for source in sources}) > 1:
        raise UserError(f"{path}: it takes layers of several models; a plan is about one")
    if kept != sorted(set(kept)) or any(len(part["sources"]) != 1 for part in values["slices"]):
        raise UserError(f"{path}: it repeats or reorders layers; a plan only removes them")
    return kept
