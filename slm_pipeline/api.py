"""The Python API, as ``slm_pipeline.compose`` and so on; docs/python.md shows it at work.

Whatever the user can get wrong is a `UserError`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra

from slm_pipeline.config import Config, ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.job import Job, make_output_root
from slm_pipeline.report.runs import Run, read_runs
from slm_pipeline.surgery.plan import Plan, file_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Composed:
    """A configuration that has passed every check that needs no model.

    Attributes:
        overrides: what it was composed of, as on the command line of ``slm``.
        config_dir: a folder with options of one's own, as ``--config-dir``.
    """

    job: Job
    overrides: tuple[str, ...]
    config_dir: str | os.PathLike[str] | None = None

    @property
    def config(self) -> Config:
        """Every option with its value."""
        return self.job.config

    def describe(self) -> str:
        """What ``dry_run=true`` prints: each stage, run or reuse, and its folder."""
        from slm_pipeline.jobs.steps import describe_plan

        return describe_plan(self.job)


def compose(overrides: Sequence[str] = (), *, config_dir: str | os.PathLike[str] | None = None) -> Composed:
    """The configuration that ``slm`` would run with overrides such as ``["method=shortgpt", "seed=7"]``, checked.

    Raises:
        UserError: anything that is wrong with it and can be known without loading the model.
    """
    job = command_line.compose_job(["slm"], overrides, config_dir=config_dir)
    return Composed(job, tuple(overrides), config_dir)


def run(composed: Composed) -> Run:
    """Run it in this process, as ``slm`` does: what is in the store is reused, a folder of results is left.

    Returns:
        The finished run; its ``path`` is its folder, its ``summary`` what summary.json holds.

    Raises:
        UserError: what the run was refused or ended for.
    """
    command_line.set_environment()
    command_line.use_plugins(composed.overrides)
    arguments, overrides = Namespace(config_dir=composed.config_dir, config_name=None), list(composed.overrides)
    with command_line.config_loader(arguments):
        whole = command_line.composed_of(arguments, overrides)
        if command_line.check_run(whole, overrides):
            raise UserError("dry_run=true runs nothing; compose(...).describe() says what would run")
        make_output_root(whole.output_dir)
        hydra: Any = GlobalHydra.instance().hydra
        finished = hydra.run(
            "config",
            lambda given: command_line.run_inside_hydra(given, overrides),
            overrides,
            with_log_configuration=False,
        )
        _ = finished.return_value  # raises what ended the run
    (found,) = read_runs(Path(finished.hydra_cfg.hydra.runtime.output_dir))
    return found


def load_results(*folders: str | os.PathLike[str]) -> list[Run]:
    """Every run in or below the folders, finished or not, as ``slm-report`` reads them.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    return read_runs(*map(Path, folders))


def make_plan(composed: Composed) -> Plan:
    """The method's decision alone: runs the stages that lead to it, as `run` does, and keeps no weights."""
    found = run(compose([*composed.overrides, "stages=[calibrate,merge]", "keep=plan"], config_dir=composed.config_dir))
    return Plan.read(found.path / "plan.json")


def apply_plan(plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
    """Edit a dense model in memory, of a supported architecture and on any device, as the plan says.

    Returns:
        The same object, with fewer layers. What it shares with other models (tensors, configuration) changes with it.

    Raises:
        UserError: the architecture is not supported, or the plan is for another depth or width.
    """
    from slm_pipeline.surgery.apply import apply

    pruned: PreTrainedModel = apply(plan, model)
    return pruned


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str], *, plan: Plan
) -> PreTrainedModel:
    """Save a pruned model with its tokenizer, its plan and a model card; load it again, and compare the two.

    Args:
        model: used up: its memory is given back before the saved one is loaded.
        folder: a new one; it appears when the comparison has succeeded.

    Returns:
        The model as it was loaded again, on the same device and in the same dtype.

    Raises:
        UserError: the folder is not empty, or the saved model's logits, size or token ids are not those of the model.
    """
    from slm_pipeline.export import model_card
    from slm_pipeline.models import checkpoint
    from slm_pipeline.models.source import DTYPES

    place = Path(folder)
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{place} is there already; choose a new folder")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(f"the model's dtype {dtype} is not one of {', '.join(DTYPES)}")
    name = str(plan.model["name"])
    card = model_card.text(
        title=f"{name}, {plan.num_layers} layers ({plan.method})",
        base=model_card.Base(name),
        paragraphs=[model_card.in_words(plan, []), model_card.REPLAY],
        command=shlex.join(["slm", "method=from_plan", "method.path=plan/plan.json", "pruning_ratio=none"]),
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    device = "balanced" if hasattr(model, "hf_device_map") else str(model.device)
    config = ModelConfig(name=name, source="local", path=str(place), dtype=dtype, device=device)
    loaded: PreTrainedModel = checkpoint.save(model, tokenizer, place, card=card, config=config)
    plan.write(file_of(place))
    return loaded


def load(place: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that was saved here, whatever its layers have, and its tokenizer. No code in its folder is run.

    Args:
        place: a model's folder, or a run's: then the last model that it made.

    Returns:
        The model on the CPU in the dtype of its files, ready to run, and the tokenizer.

    Raises:
        UserError: it is neither, or the run kept no model, or something is wrong in the folder.
    """
    from slm_pipeline.export import exported

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model, tokenizer = exported.find(Path(place)).load()
    return model, tokenizer
