"""Zero-shot accuracy on the seven tasks of the depth-pruning papers, by lm-evaluation-harness.

Prompts, answer options and metrics are lm-eval's own. Only where the examples come from changes: a small task file
includes lm-eval's and points it at a local file. Scores of lm-eval 0.4 differ a little from those of the commit of
2023 that the papers used, and move with the batch size, so both are kept beside every score.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.data.tasks import COLUMNS, check_row, task_rows, task_source
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import harness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        data, every metric that lm-eval gave under ``all`` (fractions), lm_eval_version and task_version.

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
        "data": data,
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


def preflight(tokenizer: PreTrainedTokenizerBase, tasks: list[str], data: str) -> None:
    """Check with the tokenizer alone that the tasks can be scored: lm-eval's own data can be had and has answers.

    Those of a folder are looked at by `slm_pipeline.data.tasks.task_fingerprint`.

    Raises:
        UserError: they cannot.
    """
    if tasks and not harness.has_start(tokenizer):
        raise UserError(
            f"evaluation.tasks={tasks}: the model's tokenizer has neither a BOS nor an EOS token, and lm-eval needs"
            " one; name it in tokenizer_config.json, or use evaluation.tasks=[]"
        )
    if data == "hub":
        for task in tasks:
            with _loaded(task, data, None):
                pass


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
