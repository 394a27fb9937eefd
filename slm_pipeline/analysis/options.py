"""The options of each analysis, ``analysis.NAME=VALUE`` on the command line. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from slm_pipeline.config import checked
from slm_pipeline.config.overrides import parse_overrides
from slm_pipeline.config.ranges import Count, NotNegative, NumLayers, NumLayersOrZero, Positive, Tokens
from slm_pipeline.errors import UserError

PREFIX = "analysis."


def _list(about: str, *given: str) -> Any:
    return field(default_factory=lambda: list(given), metadata={"about": about})


def _one(default: Any, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class DynamicSkip:
    """Of ``slm-analyze dynamic-skip``."""

    tolerance: NotNegative = _one(0.0, "allowed increase of the loss; 0.01: 1 %")
    plans: list[str] = _list("plan.json files to compare with")


@dataclass(frozen=True)
class Similarity:
    """Of ``slm-analyze similarity``."""

    metrics: list[str] = _list("of cosine and cka, or a plugin's", "cosine", "cka")
    estimator: str = _one("unbiased", "CKA: unbiased | biased | official")
    kernel: str = _one("linear", "CKA: linear | rbf")
    bandwidth: Positive = _one(1.0, "rbf: so many median distances")
    features: str = _one("mean_pooled", "CKA, what a row is: mean_pooled | tokens | flattened")
    minibatch: Count | None = _one(None, "CKA: rows at a time; null: 64, or 256 tokens")
    raw: bool = _one(False, "CKA: do not scale each token's state to length 1 first")
    sources: list[str] = _list("calibration sources; none: that of calibration=")
    texts: list[str] = _list("more texts, files")
    tasks: list[str] = _list("zero-shot tasks (of evaluation.data), or all")
    limit: Count = _one(64, "the first so many examples of a task")
    per_option: bool = _one(
        False,
        "a text for each answer option, as lm-eval scores them and the paper measured; such rows are not independent"
        " (else a text for each example, with all its options)",
    )
    max_tokens: Tokens = _one(512, "examples are cut to so many")
    num_patches: NumLayers | None = _one(None, "of each map; null: as many as fit it best")
    plans: list[str] = _list("plan.json files whose merged and dropped layers are drawn on the maps")


@dataclass(frozen=True)
class Painters:
    """Of ``slm-analyze painters``."""

    keep_ends: NumLayersOrZero = _one(1, "layers at each end that stay")
    ranges: Count = _one(8, "at most so many ranges of layers")
    loops: Count = _one(3, "of the looped parallel variant")
    orders: Count = _one(3, "random orders that are averaged")
    corpus: str | None = _one(None, "a perplexity corpus (bundled, wikitext2, c4, ptb or a file) for the text")


Options = TypeVar("Options", DynamicSkip, Similarity, Painters)


def read(options: type[Options], overrides: Sequence[str], program: str) -> Options:
    """The options that the overrides give, each ``analysis.NAME=VALUE`` in Hydra's grammar.

    A list of one may be written without brackets.

    Raises:
        UserError: there is no such option, or its value is none of its type and range.
    """
    kinds = {one.name: one for one in dataclasses.fields(options)}
    values: dict[str, Any] = {}
    for item in parse_overrides(overrides):
        name, line = item.key_or_group.removeprefix(PREFIX), item.input_line or ""
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(kinds)}"
            raise UserError(f"{PREFIX}{name} does not exist for {program}; {hint}")
        is_list = kinds[name].default_factory is not dataclasses.MISSING
        if item.is_sweep_override():
            text = line.partition("=")[2]
            as_list = f", or as a list {PREFIX}{name}=[{text}]" if is_list else ""
            raise UserError(f"{line} asks for several jobs; {program} runs one{as_list}")
        value = item.value()
        values[name] = [value] if is_list and not isinstance(value, (list, dict)) else value
    built: Options = checked(options, values, PREFIX.rstrip("."))
    return built


def help_page(options: type[Any]) -> str:
    """A line for each option: its name and default, and what it is."""
    lines = []
    for one in dataclasses.fields(options):
        if one.default_factory is not dataclasses.MISSING:
            default: Any = "[" + ",".join(one.default_factory()) + "]"
        else:
            default = "null" if one.default is None else one.default
            default = str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {f'{PREFIX}{one.name}={default}':<36} {one.metadata['about']}")
    return "\n".join(lines)
