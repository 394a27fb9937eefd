"""One job: a composed configuration, checked and turned into objects before the first expensive second."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline import config as options
from slm_pipeline.config import CalibrationConfig, Config
from slm_pipeline.config.groups import build, options_with, unused
from slm_pipeline.data.calibration import Calibration
from slm_pipeline.data.corpora import corpus_fingerprint
from slm_pipeline.engine.window_memo import WindowMemos
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.efficiency import Efficiency
from slm_pipeline.evaluation.evaluation import Evaluation
from slm_pipeline.jobs.loaded import LoadedModels
from slm_pipeline.jobs.tracking import check_tracker
from slm_pipeline.machine import gpus, ranks
from slm_pipeline.methods.base import Method, PruningProblem
from slm_pipeline.methods.target import ParameterCounts, PruningRatio, Threshold
from slm_pipeline.models.context import Context, OptionGroup
from slm_pipeline.models.source import ModelSource, describe
from slm_pipeline.recovery.base import Recovery
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.repair.base import Repair
from slm_pipeline.results import objective
from slm_pipeline.store.artifact import check_layout
from slm_pipeline.store.files import LONGEST_NAME

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from slm_pipeline.engine.statistics import Statistics
    from slm_pipeline.models.view import ModelView


@dataclass(frozen=True)
class Job(Context):
    """Everything that the stages read: a configuration, and the object that each group of its options became.

    Attributes:
        repair, recovery: None for repair=none and recovery=none.
        identities: what repair and recovery, with their data, are, as JSON for the artefacts' keys.
        warnings: what may not be as meant although the job can run, such as options that nothing reads.
        loaded: the models that evaluations have in memory.
    """

    method: Method
    pruning_ratio: PruningRatio
    threshold: Threshold
    calibration: Calibration
    repair: Repair | None
    recovery: Recovery | None
    evaluation: Evaluation
    identities: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    loaded: LoadedModels = field(default_factory=LoadedModels)

    @cached_property
    def dense_tokenizer(self) -> PreTrainedTokenizerBase:
        from slm_pipeline.models.loading import load_dense_tokenizer

        return load_dense_tokenizer(self.source)

    @property
    def store(self) -> Path:
        return Path(self.config.output_dir).absolute() / "store"

    def texts_of_calibration(self) -> list[str]:
        """The evaluation's texts that the calibration samples, the repair's among them, come from too, as its numbers
        call them."""
        read = [self.config.calibration, *([] if self.repair is None else [self.repair.calibration])]
        return sorted({label for options in read for label in self._scored_texts_of(options)})

    def _scored_texts_of(self, options: CalibrationConfig) -> set[str]:
        of_file = options.source == "text_file" and options.path is not None
        text = corpus_fingerprint(str(options.path), self.data_dir) if of_file else None
        return {
            measure.label(part)
            for measure in self.evaluation.active
            for part in measure.parts()
            if (part == options.source != "bundled")
            or (text is not None and self.evaluation.identity()[measure.label(part)].get("text") == text)
        }

    @property
    def num_layers(self) -> int | None:
        """Of the pruned model; None when that is not known before the merge."""
        if self.threshold.floor is not None or self.source.num_layers is None:
            return None
        return self.pruning_ratio.layers_left(self.source.num_layers)

    def pruning_problem(
        self,
        view: ModelView,
        input_ids: Tensor,
        statistics: Statistics,
        calibration: dict[str, Any],
        windows: WindowMemos | None = None,
    ) -> PruningProblem:
        """What the method gets; see `PruningProblem`."""
        return PruningProblem(
            source=self.source,
            view=view,
            input_ids=input_ids,
            statistics=statistics,
            target=self.threshold.floor or self.pruning_ratio.target(ParameterCounts.of(view)),
            calibration=calibration,
            refine=self.config.threshold.refine,
            exhaustive=self.config.threshold.exhaustive,
            windows=windows or WindowMemos(),
        )


def prepare(config: Config, command: str, *, runs_here: bool = True) -> Job:
    """Check every option of every group and build the job. ``runs_here``: not on a node of a cluster, with other GPUs.

    Raises:
        UserError: for anything the user can get wrong that can be known without loading the model.
    """
    _check_top_level(config)
    method: Method = build(config.method, group="method")
    repair: Repair | None = build(config.repair, group="repair")
    recovery: Recovery | None = build(config.recovery, group="recovery")
    evaluation = Evaluation.build(config.evaluation)
    made = {"repaired": repair is not None, "recovered": recovery is not None}
    if "evaluate" in config.stages and evaluation.of and not any(made.get(target, True) for target in evaluation.of):
        unmade = " and ".join(
            f"{group}=none" for group, of in (("repair", "repaired"), ("recovery", "recovered")) if of in evaluation.of
        )
        raise UserError(f"evaluation.of=[{','.join(evaluation.of)}] has nothing to score with {unmade}")
    if (place := ranks.launched()) is not None and config.model.device not in ("auto", "cuda", "cpu", "stream"):
        raise UserError(
            f"model.device={config.model.device}: each process of {place.launcher} takes a GPU of its own; use"
            " model.device=auto, cuda or cpu"
        )
    if config.model.device == "stream":
        _check_stream(config, method, repair, recovery, evaluation)
    source = describe(config.model)
    if runs_here:
        gpus.check_device(config.model.device, len(gpus.visible()))
    warnings = [*source.warnings, *source.lacks_bos(config.calibration.bos, "calibration.bos")]
    config = replace(config, calibration=_with_bos(config.calibration, source))
    if repair is not None:
        repair.calibration = _with_bos(repair.calibration, source)
    if isinstance(recovery, FineTuning):
        recovery.choose_learning_rate(source.num_parameters)
    context = Context(config, source, command)
    ratio = PruningRatio(config.pruning_ratio, method)
    threshold = Threshold(config.threshold, ratio, config.model)
    calibration = Calibration(config.calibration, context.data_dir)
    groups: tuple[OptionGroup, ...] = (method, ratio, threshold, calibration, evaluation)
    for group in groups:
        group.check(context)
    identities: dict[str, Any] = {}
    if repair is not None and {"repair", "recover", "evaluate"}.intersection(config.stages):
        repair.check(context)
        identities["repair"] = repair.identity(context.data_dir)
    if recovery is not None and {"recover", "evaluate"}.intersection(config.stages):
        identities["recovery"] = recovery.identity(context.data_dir)
    warnings += [
        *evaluation.warnings(context),
        *_check_positions(config, source, repair, recovery, evaluation),
        *_unused_options(config),
        *threshold.unused(),
        *_unmeasured_speed(config, evaluation),
    ]
    objective.check(config.objective, numbers_to_come(config, repair, recovery, evaluation))
    check_tracker(config.tracker)
    job = Job(
        config,
        source,
        command,
        method,
        ratio,
        threshold,
        calibration,
        repair,
        recovery,
        evaluation,
        identities=identities,
        warnings=tuple(warnings),
    )
    if recovery is not None:
        recovery.check(source, job.num_layers)
    return job


def _with_bos(calibration: CalibrationConfig, source: ModelSource) -> CalibrationConfig:
    """The options with the model's own wish for a BOS token in the place of null."""
    return replace(calibration, bos=source.puts_bos(calibration.bos))


def _check_stream(
    config: Config, method: Method, repair: Repair | None, recovery: Recovery | None, evaluation: Evaluation
) -> None:
    """Raise `UserError` for what cannot work on a model whose layers stay on disk."""
    runs = {"recover": recovery is not None, "evaluate": bool(evaluation.of and evaluation.active)}
    if refused := [stage for stage in config.stages if runs.get(stage)]:
        left = [stage for stage in config.stages if stage not in refused] or ["calibrate", "merge"]
        raise UserError(
            f"model.device=stream cannot {' or '.join(refused)}, which go through the whole model again and again; use"
            f" stages=[{','.join(left)}], then the same command on another model.device for the rest: what is done is"
            " reused"
        )
    for stage, group, option in (("merge", "method", method), ("repair", "repair", repair)):
        if option is not None and stage in config.stages and not option.streams:
            raise UserError(
                f"{group}={option.name} does not work layer by layer, as model.device=stream does; of {group} these do:"
                f" {', '.join(options_with(group, 'streams'))}"
            )


def _unused_options(config: Config) -> list[str]:
    """What was set of a group whose option is none and has no use for it, in words."""
    found = {f"{group}=none": unused(getattr(config, group), group=group) for group in ("method", "repair", "recovery")}
    return [f"{chosen} does not use {', '.join(keys)}" for chosen, keys in found.items() if keys]


def _unmeasured_speed(config: Config, evaluation: Evaluation) -> list[str]:
    """Where a speedup was asked and what came of it is not measured, or otherwise, in words."""
    asked, efficiency = config.pruning_ratio, evaluation.measures.get("efficiency")
    if asked.of != "latency" or not {"merge", "evaluate"} <= set(config.stages):
        return []
    if not isinstance(efficiency, Efficiency) or not efficiency.enabled or "pruned" not in evaluation.of:
        return ["pruning_ratio=latency: what is got is only predicted; evaluation.efficiency.enabled=true measures it"]
    return [
        f"pruning_ratio.{name}={getattr(asked, name)} is not evaluation.efficiency.{name}={getattr(efficiency, name)}:"
        " the speedup that was asked is not the one that is measured"
        for name in ("mode", "batch_size")
        if getattr(asked, name) != getattr(efficiency, name)
    ]


def check_output_root(output_dir: str, option: str = "output_dir") -> None:
    """Raise `UserError` unless ``output_dir`` can be made and written; makes nothing. ``option`` is what gave it."""
    root = Path(output_dir).expanduser().absolute()
    if longest := [part for part in root.parts if len(os.fsencode(part)) > LONGEST_NAME]:
        raise UserError(f"{option} has a name of {len(longest[0])} characters, {longest[0][:40]}...; choose a shorter")
    existing = root
    try:
        while not existing.exists():
            existing = existing.parent
    except OSError as error:  # of many such names
        raise UserError(f"{option}={output_dir[:300]!r}...: {error.strerror}; choose another {option}=") from error
    if not existing.is_dir():
        raise UserError(f"{option}={output_dir!r}: {existing} is not a folder")
    if not os.access(existing, os.W_OK) or _read_only(existing):
        raise UserError(f"{option}={output_dir!r} cannot be written: {existing} is read-only; choose another {option}=")


def make_output_root(output_dir: str) -> None:
    """Make the folder that everything is written below; raise `UserError` if that fails."""
    check_output_root(output_dir)
    try:
        (Path(output_dir).expanduser().absolute() / "store").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir={output_dir!r} cannot be made: {error.strerror}; choose another output_dir="
        ) from error


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _check_top_level(config: Config) -> None:
    for option, allowed in (("stages", options.STAGES), ("force", options.STAGES)):
        for value in getattr(config, option):
            if value not in allowed:
                raise UserError(f"{option}={getattr(config, option)} has {value!r}; allowed: {', '.join(allowed)}")
    if config.keep not in ("model", "plan"):
        raise UserError(f"keep={config.keep!r} is not one of model, plan")
    if config.data_dir and not Path(config.data_dir).expanduser().is_dir():
        raise UserError(f"data_dir={config.data_dir!r} is not a folder")
    if config.output_dir.startswith("~"):
        raise UserError(f"output_dir={config.output_dir!r}: write the home folder out, only a shell expands ~")
    check_output_root(config.output_dir)
    check_layout(Path(config.output_dir).absolute() / "store", options.STAGES)


def numbers_to_come(
    config: Config, repair: Repair | None, recovery: Recovery | None, evaluation: Evaluation
) -> dict[str, bool]:
    """Keys of the numbers that this job will measure; False where only their beginning is known before."""
    known = dict.fromkeys(["num_layers", "parameters"] if "merge" in config.stages else [], True)
    if known and config.pruning_ratio.speedup is not None:
        known["predicted_speedup"] = True
    if "evaluate" not in config.stages:
        return known
    for target in evaluation.of:
        if {"repaired": repair, "recovered": recovery}.get(target, True) is not None:
            known |= {f"{target}/{key}": whole for key, whole in evaluation.keys(target).items()}
    return known


def _check_positions(
    config: Config,
    source: ModelSource,
    repair: Repair | None,
    recovery: Recovery | None,
    evaluation: Evaluation,
) -> list[str]:
    """Warnings about texts longer than the model is made for; `UserError` where it has no positions for them."""
    lengths: dict[str, int] = {}
    if {"calibrate", "merge"}.intersection(config.stages):
        lengths["calibration.seq_len"] = config.calibration.seq_len
    if "repair" in config.stages and repair is not None:
        lengths["repair.calibration.seq_len"] = repair.calibration.seq_len
    if "recover" in config.stages and isinstance(recovery, FineTuning):
        lengths["recovery.cutoff_len"] = recovery.cutoff_len
    for measure in evaluation.active if "evaluate" in config.stages else ():
        lengths |= measure.lengths()
    most = source.max_positions
    if most is None or not (longer := [f"{name}={length}" for name, length in lengths.items() if length > most]):
        return []
    if source.architecture.learned_positions:
        raise UserError(f"{', '.join(longer)}: {source.name} has learned {most} positions and none for longer texts")
    return [f"{', '.join(longer)}: {source.name} is made for {most} positions; longer texts say little about it"]
