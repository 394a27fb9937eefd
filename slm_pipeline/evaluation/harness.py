"""What every use of lm-evaluation-harness needs: a model it takes, and its logging, bars and templates kept in bounds.

lm-eval is imported inside functions: it imports datasets and pandas, and its models torch.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TypeVar

from slm_pipeline.errors import UserError
from slm_pipeline.machine import ranks
from slm_pipeline.show.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@contextmanager
def contained() -> Iterator[None]:
    """Undo what lm-eval does to logging (its issue 2102); our bars in the place of its, and none of datasets.

    Inside, lm-eval says nothing below an error: it warns that a loaded model is not a path, and of its own task files.
    What it prints goes to stderr. Templates are compiled once, not for each of some 60,000 prompts and answers as
    lm-eval does. Not to be nested.
    """
    import datasets

    loggers = [logging.getLogger(), logging.getLogger("lm_eval")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    from lm_eval.api import model as requests  # lm_eval sets its level
    from lm_eval.api import task as prompts
    from lm_eval.models import huggingface as models
    from lm_eval.utils import env as templates

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    silent = not datasets.are_progress_bars_disabled()
    if silent:
        datasets.disable_progress_bars()
    templates.from_string = functools.cache(templates.from_string)
    bars = {module: module.tqdm for module in (prompts, requests, models)}
    for module in bars:
        module.tqdm = ProgressBar
    try:
        with redirect_stdout(sys.stderr if ranks.is_first() else sys.stdout):
            yield
    finally:
        for module, bar in bars.items():
            module.tqdm = bar
        del templates.from_string  # back to the class's own
        for logger, handlers, level, propagate in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        if silent:
            datasets.enable_progress_bars()


def wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as lm-eval's ``HFLM``; the tokenizer is copied, as lm-eval gives it a padding token.

    Processes that work together share out the requests (`shared`); each goes on with the answers of all.
    """
    from lm_eval.models.huggingface import HFLM

    found = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    if ranks.count() > 1:
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(found, kind, functools.partial(shared, getattr(found, kind)))
    return found


def shared(answer: Callable[..., list[T]], requests: Sequence[Any], **options: Any) -> list[T]:
    """What ``answer`` gives for all requests, in their order; each process asks it for those of its own documents.

    These lie at even distances, so that all have long and short ones. The requests of a document stay together: where
    they differ in one token alone, lm-eval runs the model once for all of them.

    Args:
        answer: one of lm-eval's three, which gives an answer for each request.
        requests: lm-eval's instances, the same in all processes.
    """
    documents: dict[tuple[str, int], int] = {}
    numbers = [documents.setdefault((request.task_name, request.doc_id), len(documents)) for request in requests]
    own = [place for place, number in enumerate(numbers) if number % ranks.count() == ranks.rank()]
    answers = answer([requests[place] for place in own], **options) if own else []
    found = dict(ranks.gathered(list(zip(own, answers, strict=True))))
    return [found[place] for place in range(len(requests))]


def evaluated(model: Any, loaded: Any, what: str, option: str, **options: Any) -> dict[str, Any]:
    """``lm_eval.evaluate`` of loaded tasks, with lm-eval's warnings.

    Args:
        model: from `wrapped`.
        loaded: what lm-eval's ``TaskManager.load`` gives.
        what: the task, for messages.
        option: that names the batch size, for messages.
        options: of ``lm_eval.evaluate``.

    Raises:
        UserError: the batch does not fit into memory.
    """
    import torch
    from lm_eval.evaluator import evaluate

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if not ranks.is_first():  # whose standard errors nobody reads
        options = {**options, "bootstrap_iters": 0}
    try:
        results = evaluate(model, loaded, log_samples=False, **options)
    except torch.OutOfMemoryError as error:
        batch_size = model.batch_size
        raise UserError(
            f"{what} does not fit into memory with {option}={batch_size}; try {option}={max(1, batch_size // 2)}"
        ) from error
    assert results is not None  # None only on the other ranks of a distributed run
    return dict(results)


def has_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a token that lm-eval can put before a text that begins nowhere: BOS, else EOS."""
    return tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what lm-eval and datasets raise while they load a task into a `UserError` that begins with ``what``."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, TemplateError, DatasetsError) as error:
        raise UserError(f"{what}: {_first_line(error.__cause__ or error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
