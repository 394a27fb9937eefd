"""Weights that are loaded are those of the model, all of them and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from slm_pipeline.errors import UserError
from slm_pipeline.models import fault_words
from slm_pipeline.show.progress import ProgressBar

log = logging.getLogger(__name__)


def load_checked(model_class: Any, place: Path | str, **options: Any) -> Any:
    """``model_class.from_pretrained(place, **options)``, if the weights there are those of the model and no others.

    transformers fills in random numbers for what is missing or of another shape, and applies an adapter that happens to
    lie beside the weights.

    Raises:
        UserError: a tensor is missing or of another shape or has a value that is not finite, or there is an adapter.
            Tensors that are not used are warned about.
    """
    if find_adapter_config_file(str(place), revision=options.get("revision")):
        raise UserError(f"{place} holds an adapter beside the weights: merge it into them, or move its files away")
    with our_bars(), unsaid("transformers.modeling_utils", "LOAD REPORT"):  # said below, in a line
        model, found = model_class.from_pretrained(
            place, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    problems = [fault_words.lacking(sorted(found["missing_keys"]))] if found["missing_keys"] else []
    problems += fault_words.unequal({name: (saved, wanted) for name, saved, wanted in sorted(found["mismatched_keys"])})
    if not problems and (names := [name for name, tensor in model.named_parameters() if not is_finite(tensor)]):
        problems.append(fault_words.not_finite(names, str(model.dtype)))
    if problems:
        raise UserError(f"{place}: {'; '.join(problems)}")
    if found["unexpected_keys"]:
        log.warning("%s", fault_words.not_used(str(place), sorted(found["unexpected_keys"])))
    return model


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: least and greatest are NaN if any is; some 20 GB/s on a processor."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


@contextmanager
def our_bars() -> Iterator[None]:
    """A bar of ours in the place of transformers', which leaves each one on the terminal."""
    module: Any = transformers_logging
    theirs = module.tqdm_lib
    module.tqdm_lib = SimpleNamespace(tqdm=ProgressBar)
    try:
        yield
    finally:
        module.tqdm_lib = theirs


@contextmanager
def unsaid(logger: str, words: str) -> Iterator[None]:
    """Messages of a logger that have these words in them are not shown meanwhile."""

    def is_other(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    spoken = logging.getLogger(logger)
    spoken.addFilter(is_other)
    try:
        yield
    finally:
        spoken.removeFilter(is_other)
