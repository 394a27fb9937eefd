"""Zero-shot accuracy on the seven tasks of the depth-pruning papers, by lm-evaluation-harness.

Prompts, answer options and metrics are lm-eval's own. Only where the examples come from changes: a small task file
includes lm-eval's and points it at a local file. Scores of lm-eval 0.4 differ a little from those of the commit of
2023 that the papers used, and move with the batch size, so both are kept beside every score.
"""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config.ranges import BatchSize, Count, FilePath
from slm_pipeline.data.tasks import COLUMNS, check_name, check_row, task_fingerprint, task_rows, task_source
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import harness
from slm_pipeline.evaluation.measure import Measure, Scored
from slm_pipeline.machine import provenance
from slm_pipeline.models.context import Context
from slm_pipeline.results.number import PERCENT, Number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pipeline.models.sizes import Sizes

log = logging.getLogger(__name__)

# Task and the metric that is reported for it: normalised by answer length where the papers do so.
TASKS: dict[str, str] = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}

# lm-eval's file for each task, and the split that it scores.
TASK_FILES = {
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
}

_LONG_TEXT = 256  # tokens, with its answer, of the batch of long texts with which lm-eval begins


@dataclass(kw_only=True)
class ZeroShot(Measure):
    """Accuracy on each task, a part each, and their plain mean, as the papers report it. Options: see `score_task`."""

    tasks: list[str] = field(default_factory=list)
    data: FilePath = "bundled"
    limit: Count | None = None
    batch_size: BatchSize = 16

    name: ClassVar[str] = "zero_shot"
    shares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks:
            check_name(task)

    def parts(self) -> list[str]:
        return self.tasks

    def label(self, part: str) -> str:
        return part

    def names(self, part: str) -> list[str]:
        return [""]

    def check(self, context: Context) -> None:
        tokens = context.source.special_tokens
        if tokens is not None and not tokens & {"bos", "eos"}:
            raise UserError(
                f"evaluation.tasks={self.tasks}: the tokenizer of {context.source.name} names neither a BOS nor an EOS"
                " token, and lm-eval needs one; name them in its tokenizer_config.json"
            )

    def identity(self, part: str, context: Context) -> dict[str, Any]:
        examples = task_fingerprint(self.data, part, context.data_dir)
        version = provenance.versions().get("lm_eval")
        return {"task": part, "examples": examples, "lm_eval": version, **self.settings("tasks", "data")}

    def preflight(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> None:
        """lm-eval's own data can be had and has answers; those of a folder are looked at by `identity`."""
        if not harness.has_start(tokenizer):
            raise UserError(
                f"evaluation.tasks={self.tasks}: the model's tokenizer has neither a BOS nor an EOS token, and lm-eval"
                " needs one; name it in tokenizer_config.json, or use evaluation.tasks=[]"
            )
        if self.data == "hub":
            with _loaded(part, self.data, None):
                pass

    def memory(self, part: str, sizes: Sizes) -> int:
        """A batch of texts of `_LONG_TEXT` tokens in a block, or its logits in float32 and their logarithms."""
        tokens = self.batch_size * _LONG_TEXT
        return max(sizes.running(tokens), sizes.logits(tokens) + 8 * tokens * sizes.vocabulary)

    def run(self, part: str, scored: Scored, context: Context) -> dict[str, Any]:
        return score_task(
            scored.model,
            scored.tokenizer,
            part,
            data=self.data,
            limit=self.limit,
            batch_size=self.batch_size,
            data_dir=context.data_dir,
        )

    def numbers(self, part: str, found: Mapping[str, Any]) -> list[Number]:
        examples = "all examples" if found["limit"] is None else f"the first {found['limit']} examples of each task"
        how = f"lm-eval {found['lm_eval_version']}, {examples}, batch size {found['batch_size']}"
        settings = ("metric", "num_examples", "limit", "batch_size", "lm_eval_version", "task_version")
        measured = {"how": how, **{name: found[name] for name in settings}}
        return [Number("", found["score"], PERCENT, found["stderr"], True, measured, detail=True)]

    def totals(self, found: Mapping[str, Mapping[str, Any]]) -> list[Number]:
        errors = [result["stderr"] for result in found.values()]
        known = [error for error in errors if error is not None]
        # of independent numbers
        error = (
            math.sqrt(sum(error**2 for error in known)) / len(known) if known and len(known) == len(errors) else None
        )
        mean = average({task: result["score"] for task, result in found.items()})
        limits = {result["limit"] for result in found.values()}
        measured = {"tasks": list(found), "limit": limits.pop() if len(limits) == 1 else None}
        return [Number("average", mean, PERCENT, error, True, measured)]

    def names_of_totals(self) -> list[str]:
        return ["average"]

    def texts(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> list[str]:
        return task_documents(part, data=self.data, limit=self.limit, data_dir=context.data_dir)


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    data: str,
    limit: int | None,
    batch_size: int,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Score a model on one task, zero-shot. Nothing in it is random.

    Processes that work together share out the requests; the numbers are those of one process, up to what other batches
    do to them.

    Args:
        model: any causal language model, on one device or spread over several; is left in evaluation mode.
        tokenizer: the model's; is not changed.
        task: one of ``TASKS``.
        data: ``bundled``, ``hub`` or a folder, see ``slm_pipeline.data.tasks.task_source``.
        limit: score the first ``limit`` examples, as lm-eval's own ``limit`` does; None: all of them.
        batch_size: answer options scored at once.
        data_dir: where a relative ``data`` folder is looked up; None: the working directory.

    Returns:
        task, metric, score and stderr (percent; stderr is None for one example), num_examples, limit, batch_size,
        every metric that lm-eval gave under ``all`` (fractions), lm_eval_version and task_version.

    Raises:
        UserError: unknown task, missing or unusable data, a tokenizer with neither BOS nor EOS, or the batch does not
            fit into memory.
    """
    if not harness.has_start(tokenizer):
        raise UserError(f"{task}: the tokenizer has neither a BOS nor an EOS token, and lm-eval needs one")
    with _loaded(task, data, data_dir) as loaded:
        import lm_eval

        num_examples = len(loaded["tasks"][task].eval_docs)
        log.info("%s: %d of %d examples", task, min(limit or num_examples, num_examples), num_examples)
        wrapped = harness.wrapped(model, tokenizer, batch_size)
        results = harness.evaluated(wrapped, loaded, task, "evaluation.batch_size", limit=limit)
        version = lm_eval.__version__
    metric = TASKS[task]
    found = {
        name.removesuffix(",none"): value for name, value in results["results"][task].items() if name.endswith(",none")
    }
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}  # else "N/A"
    score, stderr = 100 * numbers[metric], numbers.get(f"{metric}_stderr")
    log.info("%s: %s %.2f", task, metric, score)
    return {
        "task": task,
        "metric": metric,
        "score": score,
        "stderr": None if stderr is None else 100 * stderr,
        "num_examples": results["n-samples"][task]["effective"],
        "limit": limit,
        "batch_size": batch_size,
        "all": numbers,
        "lm_eval_version": version,
        "task_version": results["versions"][task],
    }


def task_documents(task: str, *, data: str, limit: int | None, data_dir: Path | None = None) -> list[str]:
    """The texts of the examples that `score_task` reads: passage, question and answer options, one below the other.

    Raises:
        UserError: as `score_task`.
    """
    with _loaded(task, data, data_dir) as loaded:
        *columns, _ = COLUMNS[task]  # the last one is the answer
        docs = itertools.islice(loaded["tasks"][task].eval_docs, limit)
        return ["\n".join(text for column in columns for text in _texts(doc[column])) for doc in docs]


def task_requests(task: str, *, data: str, limit: int | None, data_dir: Path | None = None) -> list[str]:
    """The texts that a model is given to score a task: each context with one answer option, in lm-eval's order.

    The options of one question follow one another. ``limit``: the first so many texts, not documents.

    Raises:
        UserError: as `score_task`.
    """
    with _loaded(task, data, data_dir) as loaded:
        loaded["tasks"][task].build_all_requests(limit=limit)
        requests = itertools.islice(loaded["tasks"][task].instances, limit)
        return ["".join(request.args) for request in requests]


def _texts(value: Any) -> list[str]:
    """A column of an example: a text, a list of them, or options with their labels."""
    if isinstance(value, dict):
        value = value["text"]
    return [value] if isinstance(value, str) else list(value)


def average(scores: dict[str, float]) -> float:
    """Plain mean of the tasks' scores, as the papers report it."""
    return sum(scores.values()) / len(scores)


@contextmanager
def _loaded(task: str, data: str, data_dir: Path | None) -> Iterator[Any]:
    """lm-eval's task on the data asked for, while lm-eval keeps quiet and the temporary files are there."""
    source = task_source(data, task, data_dir)
    with harness.contained(), tempfile.TemporaryDirectory(prefix="slm_task_", ignore_cleanup_errors=True) as folder:
        yield _load_task(task, source, Path(folder))


def _load_task(task: str, source: Path | None, folder: Path) -> Any:
    """lm-eval's task, reading the file ``source`` unless that is None. ``folder`` takes temporary files."""
    import lm_eval.tasks
    import yaml

    file, split = TASK_FILES[task]
    settings: dict[str, Any] = {"include": str(Path(lm_eval.tasks.__file__).parent / file), "num_fewshot": 0}
    if source is not None:
        settings |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(_rewritten(task, source, folder))},
                "cache_dir": str(folder),
            },
            "training_split": None,
            "validation_split": "validation" if split == "validation" else None,
        }
    task_file = folder / f"{task}.yaml"
    task_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    place = "evaluation.data=hub" if source is None else str(source)
    with harness.loading(f"{place}: cannot load the examples of {task}"):
        loaded = lm_eval.tasks.TaskManager(include_defaults=False).load([str(task_file)])
    if source is None:
        for number, row in enumerate(loaded["tasks"][task].eval_docs, start=1):
            check_row(task, row, f"evaluation.data=hub: {task}, row {number}")
    return loaded


def _rewritten(task: str, source: Path, folder: Path) -> Path:
    """The examples as a file in which nothing has to be guessed: JSON's reader takes some texts for dates."""
    import pyarrow
    import pyarrow.parquet

    file = folder / f"{task}.parquet"
    rows = task_rows(task, source)
    if task == "hellaswag":
        rows = [{**row, "label": str(row["label"])} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file
