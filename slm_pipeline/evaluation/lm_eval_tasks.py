"""Any task of lm-evaluation-harness by its name, groups and generation included; or one of a folder of one's own.

Prompts, metrics, aggregation and standard errors are lm-eval's own: the numbers are those of its ``simple_evaluate``
with its default seeds. The seven tasks of the depth-pruning papers on bundled data are in `zero_shot`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config.ranges import BatchSize, Count, CountOrZero, FilePath
from slm_pipeline.errors import UserError, refused_in_one_line
from slm_pipeline.evaluation import harness, task_files
from slm_pipeline.evaluation.measure import Measure, Scored
from slm_pipeline.models.context import Context
from slm_pipeline.results.number import Number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OPTION = "evaluation.lm_eval"
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the defaults of lm-eval's simple_evaluate
MAX_GEN_TOKENS = 256  # lm-eval's, of a task that does not say
_MAX_GEN_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(kw_only=True)
class LmEval(Measure):
    """Every metric of each task, group or tag that lm-eval knows, a part each, in lm-eval's own units. See `score`."""

    tasks: list[str] = field(default_factory=list)
    num_fewshot: CountOrZero | None = None  # null: as the task says
    include_path: FilePath | None = None  # a folder of task YAMLs of one's own
    apply_chat_template: bool = False
    gen_kwargs: dict[str, Any] = field(default_factory=dict)  # laid over a generating task's own
    limit: Count | None = None  # first examples of each task; null: all
    batch_size: BatchSize = 16

    name: ClassVar[str] = "lm_eval"
    shares_samples: ClassVar[bool] = True

    def parts(self) -> list[str]:
        return self.tasks

    def check(self, context: Context) -> None:
        check_names(self.tasks, self.include_path, context.data_dir)

    def identity(self, part: str, context: Context) -> dict[str, Any]:
        return identity(part, **self._options(context))

    def preflight(self, part: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> None:
        from slm_pipeline.models.loading import num_positions

        options = {name: value for name, value in self._options(context).items() if name not in ("limit", "batch_size")}
        preflight(tokenizer, [part], max_positions=num_positions(context.source), **options)

    def run(self, part: str, scored: Scored, context: Context) -> dict[str, Any]:
        return score(scored.model, scored.tokenizer, part, **self._options(context))

    def numbers(self, part: str, found: Mapping[str, Any]) -> list[Number]:
        examples = "all examples" if found["limit"] is None else f"the first {found['limit']} examples of each task"
        how = f"lm-eval {found['lm_eval_version']}, {examples}, batch size {found['batch_size']}"

        def of(name: str, one: Mapping[str, Any], detail: bool) -> list[Number]:
            shots = {} if one["num_fewshot"] is None else {"num_fewshot": one["num_fewshot"]}
            words = f"{how}, {one['num_fewshot']} examples shown" if shots else how
            measured = {"how": words, "limit": found["limit"], "task_version": one["version"], **shots}
            return [
                Number(
                    metric.removesuffix(",none"),
                    said["value"],
                    "",
                    said["stderr"],
                    said["higher_is_better"],
                    measured,
                    detail=detail,
                ).below(name)
                for metric, said in one["numbers"].items()
                if said["value"] is not None
            ]

        subtasks = [number for name, one in found["subtasks"].items() for number in of(name, one, detail=True)]
        return [*of("", found, detail=False), *subtasks]

    def _options(self, context: Context) -> dict[str, Any]:
        return {**self.settings("tasks"), "data_dir": context.data_dir}


def check_names(tasks: Sequence[str], include_path: str | None = None, data_dir: Path | None = None) -> None:
    """Raise `UserError` unless every name is a task, a group or a tag of lm-eval's or of one's own folder.

    Args:
        tasks: names.
        include_path: a folder of task YAMLs; where it has a name that lm-eval has too, its own counts.
        data_dir: where a relative ``include_path`` is looked up; None: the working directory.
    """
    with harness.contained():
        task_files.manager(tasks, _folder(include_path, data_dir), f"{OPTION}.tasks")


def identity(
    task: str,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """What the scores of a task depend on besides the model: JSON in which no path is. Imports no torch.

    Takes the arguments of `score`, and says their effect: the commit of a data set on the hub, the content of local
    files. See `task_files.contents`.

    Raises:
        UserError: unknown name, a data file that is not there, or neither the hub nor its cache has the data.
    """
    with harness.contained():
        contents = task_files.contents(task, _folder(include_path, data_dir), f"{OPTION}.tasks")
    return {
        "task": task,
        "lm_eval": importlib.metadata.version("lm_eval"),
        **contents,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "gen_kwargs": dict(gen_kwargs or {}),
        "seeds": SEEDS,
    }


def preflight(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None,
    max_positions: int | None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
    data_dir: Path | None = None,
) -> None:
    """Check with the tokenizer alone that the tasks can be scored: each is loaded and its first prompt written.

    Args:
        max_positions: of the model; None if unknown.

    Raises:
        UserError: unknown name, data that cannot be had or read, examples that cannot be had, a task that runs code
            which the model writes or shows it pictures, a tokenizer without the tokens or the chat template that is
            needed, or more tokens to generate than the model has positions.
    """
    if apply_chat_template and tokenizer.chat_template is None:
        raise UserError(f"{OPTION}.apply_chat_template=true: the model's tokenizer has no chat template")
    folder = _folder(include_path, data_dir)
    with harness.contained():
        for name in tasks:
            what = f"{OPTION}.tasks: {name}"
            for task in _loaded(name, folder, num_fewshot, gen_kwargs)["tasks"].values():
                _check(task, tokenizer, what, max_positions)
                with refused_in_one_line(f"{what}: cannot write the first prompt of {task.task_name}"):
                    task.build_all_requests(limit=1)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Score a model on a task, a group of tasks or all tasks of a tag. Sets the seeds of random, numpy and torch.

    Processes that work together share out the requests; the numbers are those of one process, up to what other batches
    do to them, but for texts that are sampled.

    Args:
        model: any causal language model, on one device or spread over several; is left in evaluation mode.
        tokenizer: the model's; is not changed.
        task: its name.
        num_fewshot: solved examples in each prompt; None: as many as the task says. Tasks that say 0 keep it, as with
            lm-eval's own command.
        limit: score the first ``limit`` examples of each task; None: all of them.
        batch_size: answer options scored, or texts generated, at once.
        include_path: a folder of task YAMLs of one's own.
        apply_chat_template: write prompts with the tokenizer's chat template, examples as turns.
        gen_kwargs: change the settings by which tasks generate, such as ``max_gen_toks``.
        data_dir: where a relative ``include_path`` is looked up; None: the working directory.

    Returns:
        task, ``kind`` (task, group or tag), ``numbers``, ``num_examples``, ``num_fewshot`` (None where subtasks
        differ) and ``version`` (None if the task has none); ``subtasks``: the last four for every group and task below
        it; ``limit``, ``batch_size``, ``apply_chat_template``, ``gen_kwargs``, ``seeds`` and ``lm_eval_version``.

        ``numbers`` are lm-eval's under its names, such as "acc,none" or "exact_match,strict-match" (metric and
        filter): each a dict of ``value`` (in lm-eval's unit: accuracies are fractions), ``stderr`` (None where lm-eval
        gives none) and ``higher_is_better`` (None where subtasks differ). A group has those that lm-eval aggregates, a
        tag none. One that is not finite is None.

    Raises:
        UserError: as `preflight`, the batch does not fit into memory, or lm-eval fails.
    """
    import numpy as np
    import torch

    with harness.contained():
        folder = _folder(include_path, data_dir)
        loaded = _loaded(task, folder, num_fewshot, gen_kwargs)
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        wrapped = harness.wrapped(model, tokenizer, batch_size)
        chat = {"apply_chat_template": apply_chat_template, "fewshot_as_multiturn": True}
        with refused_in_one_line(f"{OPTION}.tasks: lm-eval fails at {task}"):
            results = harness.evaluated(wrapped, loaded, task, f"{OPTION}.batch_size", limit=limit, **chat)
    found = {name: _found(results, loaded, name) for name in (*loaded["groups"], *loaded["tasks"])}
    numbers = found.pop(task, None) or _found(results, loaded, task)
    for name, number in numbers["numbers"].items():
        log.info("%s: %s %s", task, name, "not finite" if number["value"] is None else f"{number['value']:.4f}")
    return {
        "task": task,
        "kind": "group" if task in loaded["groups"] else "task" if task in loaded["tasks"] else "tag",
        **numbers,
        "subtasks": found,
        "limit": limit,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "gen_kwargs": dict(gen_kwargs or {}),
        "seeds": SEEDS,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
    }


def _found(results: Mapping[str, Any], loaded: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What lm-eval's results say of a task, a group or a tag."""
    values = results["results"].get(name, {})
    better = results["higher_is_better"].get(name, {})
    numbers = {}
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue  # a name or a count, or beside its metric
        numbers[key] = {
            "value": _finite(value),
            "stderr": _finite(values.get(f"{metric}_stderr,{filter_name}")),
            "higher_is_better": better.get(metric),
        }
        if numbers[key]["value"] is None:
            log.warning("%s: lm-eval gives %s for %s, which is no finite number", name, value, key)
    group = loaded["groups"].get(name)
    tasks = [each.task_name for each in group.get_all_tasks()] if group else [name] if name in loaded["tasks"] else []
    version = results["versions"].get(name)
    return {
        "numbers": numbers,
        "num_examples": sum(results["n-samples"][each]["effective"] for each in tasks or loaded["tasks"]),
        "num_fewshot": results["n-shot"].get(name),
        "version": None if version in ("N/A", "Yaml") else version,
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _folder(include_path: str | None, data_dir: Path | None) -> Path | None:
    return task_files.folder(include_path, data_dir, f"{OPTION}.include_path")


def _loaded(name: str, folder: Path | None, num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> Any:
    """lm-eval's tasks and groups, with what ``simple_evaluate`` sets in them before it evaluates."""
    manager = task_files.manager([name], folder, f"{OPTION}.tasks")
    with refused_in_one_line(f"{OPTION}.tasks: cannot load {name}"):
        loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
        said = task.get_config("num_fewshot")
        if said is None or (num_fewshot is not None and said != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        elif num_fewshot is not None and num_fewshot != said:
            log.warning("%s: no examples in the prompt, as its own file says; num_fewshot is not taken", task.task_name)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    return loaded


def _check(task: Any, tokenizer: PreTrainedTokenizerBase, what: str, max_positions: int | None) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"{what}: {task.task_name} runs code that the model writes, which is not supported")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{what}: {task.task_name} has pictures or sounds, which a language model does not read")
    if task.OUTPUT_TYPE != "generate_until":
        if not harness.has_start(tokenizer):
            raise UserError(f"{what}: the model's tokenizer has neither a BOS nor an EOS token, and lm-eval needs one")
        return
    if tokenizer.eos_token_id is None:
        raise UserError(f"{what}: the model's tokenizer has no EOS token, and lm-eval needs one to generate")
    settings = task.get_config("generation_kwargs") or {}
    given = [settings[name] for name in _MAX_GEN_TOKENS if settings.get(name) is not None]
    max_tokens = int(next(iter(given), MAX_GEN_TOKENS))
    if max_positions is not None and max_tokens >= max_positions:
        raise UserError(
            f"{what}: {task.task_name} generates up to {max_tokens} tokens, and the model has {max_positions}"
            f" positions; {OPTION}.gen_kwargs={{max_gen_toks: {max_positions // 2}}} makes it fewer"
        )
