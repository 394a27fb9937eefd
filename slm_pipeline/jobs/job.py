"""One job: a composed configuration, checked and turned into objects before the first expensive second."""

from __future__ import annotations

import logging
import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline import config as options
from slm_pipeline.config import Config, ThresholdConfig, build, unused
from slm_pipeline.data import calibration, tasks
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import efficiency, perplexity
from slm_pipeline.jobs.tracking import check_tracker
from slm_pipeline.machine import gpus
from slm_pipeline.methods.base import Method, PruningProblem, num_layers_to_remove
from slm_pipeline.models.source import ModelSource, describe
from slm_pipeline.recovery.base import Recovery
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.results import objective
from slm_pipeline.store.artifact import check_layout
from slm_pipeline.store.files import LONGEST_NAME

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.statistics import Statistics
    from slm_pipeline.models.view import ModelView


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that the stages read.

    Attributes:
        threshold: the similarity floor to use; None when the method looks for one or needs none.
        recovery: None for recovery=none.
        identities: what calibration text, recovery (with its data) and evaluation data are, as JSON for the keys.
        command: the command line that gave this configuration.
        warnings: what may not be as meant although the job can run, such as options that nothing reads.
    """

    config: Config
    source: ModelSource
    method: Method
    recovery: Recovery | None
    threshold: float | None
    command: str
    identities: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def data_dir(self) -> Path | None:
        return data_dir(self.config)

    @property
    def store(self) -> Path:
        return Path(self.config.output_dir).absolute() / "store"

    def corpora_of_calibration(self) -> list[str]:
        """The perplexity corpora that the calibration samples come from too."""
        options, corpora = self.config.calibration, self.config.evaluation.perplexity.corpora
        if options.source != "text_file":
            return [corpus for corpus in corpora if corpus == options.source and corpus != "bundled"]
        assert options.path is not None
        text = perplexity.corpus_fingerprint(options.path, self.data_dir)
        return [corpus for corpus in corpora if self.identities["evaluation"]["corpora"][corpus] == text]

    def num_layers_to_remove(self, num_layers: int, count_parameters: ParameterCounts | None = None) -> int | None:
        """Layers that the method must remove from ``num_layers``; None when the threshold alone decides.

        ``of: parameters`` takes the fewest layers whose parameters are at least the ratio of all parameters.
        """
        ratio = self.config.pruning_ratio
        if ratio.of == "parameters" and ratio.ratio is not None:
            if count_parameters is None:
                return None
            return count_parameters.layers_for(ratio.ratio, num_layers, self.method.num_protected)
        return num_layers_to_remove(
            ratio=ratio.ratio,
            keep=ratio.num_layers,
            num_layers=num_layers,
            num_protected=self.method.num_protected,
        )

    def pruning_problem(
        self,
        view: ModelView,
        input_ids: Tensor,
        statistics: Statistics,
        calibration: dict[str, Any],
        memo: Path | None = None,
    ) -> PruningProblem:
        """What the method gets; see `PruningProblem`."""
        counts = ParameterCounts.of(view)
        ratio = self.config.pruning_ratio
        by_parameters = ratio.of == "parameters" and ratio.ratio is not None
        return PruningProblem(
            source=self.source,
            view=view,
            input_ids=input_ids,
            statistics=statistics,
            num_remove=None if self.threshold is not None else self.num_layers_to_remove(view.num_layers, counts),
            threshold=self.threshold,
            refine=self.config.threshold.refine,
            exhaustive=self.config.threshold.exhaustive,
            calibration=calibration,
            num_parameters=math.ceil((ratio.ratio or 0) * counts.total) if by_parameters else 0,
            memo=memo,
            forced="merge" in self.config.force,
        )


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model and of each block."""

    total: int
    blocks: list[int]

    @classmethod
    def of(cls, view: ModelView) -> ParameterCounts:
        return cls(view.num_parameters(), [view.block_parameters(layer) for layer in range(view.num_layers)])

    def layers_for(self, ratio: float, num_layers: int, num_protected: int) -> int:
        """Fewest layers whose removal takes away at least ``ratio`` of all parameters, embeddings included."""
        if len(set(self.blocks)) > 1:
            raise UserError(
                "pruning_ratio.of=parameters needs layers of equal size; this model's differ; use of=layers"
            )
        remove = next((n for n in range(1, num_layers) if n * self.blocks[0] >= ratio * self.total), num_layers)
        asked = f"pruning_ratio.ratio={ratio} of {self.total / 1e6:.1f} M parameters"
        keep = num_layers - remove
        if keep < 1 + num_protected:
            largest = (num_layers - 1 - num_protected) * self.blocks[0] / self.total
            raise UserError(
                f"{asked} leaves {keep} layers; this method can remove at most {largest:.1%} of the parameters"
            )
        return remove


def data_dir(config: Config) -> Path | None:
    return Path(config.data_dir).expanduser().absolute() if config.data_dir else None


def prepare(config: Config, command: str, *, runs_here: bool = True) -> Job:
    """Check every option of every group and build the job. ``runs_here``: not on a node of a cluster, with other GPUs.

    Raises:
        UserError: for anything the user can get wrong that can be known without loading the model.
    """
    _check_top_level(config)
    method: Method = build(config.method, group="method")
    recovery: Recovery | None = build(config.recovery, group="recovery")
    if recovery is None and config.evaluation.of == ["recovered"] and "evaluate" in config.stages:
        raise UserError("evaluation.of=[recovered] has nothing to score with recovery=none")
    source = describe(config.model)
    if runs_here:
        gpus.check_device(config.model.device, len(gpus.visible()))
    threshold = _threshold(config, method, command)
    method.check(source)
    if method.reads_calibration and config.calibration.seq_len < method.min_seq_len:
        raise UserError(
            f"calibration.seq_len={config.calibration.seq_len} must be at least {method.min_seq_len} for"
            f" method={method.name}, which predicts the next token"
        )
    identities: dict[str, Any] = {"calibration": calibration.check(config.calibration, data_dir(config))}
    if recovery is not None and {"recover", "evaluate"}.intersection(config.stages):
        identities["recovery"] = recovery.identity(data_dir(config))
    identities["evaluation"] = _check_evaluation(config)
    _check_special_tokens(config, source)
    warnings = (*source.warnings, *_check_positions(config, source, recovery), *_unused_options(config, method))
    objective.check(config)
    check_tracker(config.tracker)
    job = Job(config, source, method, recovery, threshold, command, identities, warnings)
    num_layers = None
    if source.num_layers is not None and (removed := job.num_layers_to_remove(source.num_layers)) is not None:
        num_layers = source.num_layers - removed
    if recovery is not None:
        recovery.check(source, num_layers)
    return job


def _unused_options(config: Config, method: Method) -> list[str]:
    """What was set although the options that were chosen have no use for it, in words."""
    found = {f"{group}=none": unused(getattr(config, group), group=group) for group in options.PLUG_INS}
    if config.threshold.kind != "auto" or not method.takes_threshold:
        chosen = f"threshold={config.threshold.kind} with method={method.name}"
        default = ThresholdConfig()
        found[chosen] = [
            f"threshold.{name}"
            for name in ("refine", "exhaustive")
            if getattr(config.threshold, name) != getattr(default, name)
        ]
    return [f"{chosen} does not use {', '.join(keys)}" for chosen, keys in found.items() if keys]


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


def _threshold(config: Config, method: Method, command: str) -> float | None:
    """Check that method, threshold and ratio go together; the floor to use, None for ``auto``."""
    threshold, ratio = config.threshold, config.pruning_ratio
    if threshold.kind not in ("auto", "fixed", "published"):
        raise UserError(f"threshold.kind={threshold.kind!r} is not one of auto, fixed, published")
    if ratio.of not in ("layers", "parameters"):
        raise UserError(f"pruning_ratio.of={ratio.of!r} is not one of layers, parameters")
    if ratio.ratio is not None and ratio.num_layers is not None:
        raise UserError("pruning_ratio.ratio and pruning_ratio.num_layers exclude each other; set one of them to null")
    has_target = ratio.ratio is not None or ratio.num_layers is not None
    if has_target and not method.takes_ratio:
        raise UserError(f"method={method.name} takes no pruning ratio; use pruning_ratio=none")
    if threshold.kind == "auto":
        if threshold.value is not None:
            raise UserError(f"threshold.value={threshold.value} needs threshold=fixed and pruning_ratio=none")
        if not has_target and method.takes_ratio:
            raise UserError(
                f"method={method.name} needs a target: choose a pruning_ratio"
                " (pruning_ratio=layers with pruning_ratio.num_layers=, the layers to keep)"
                + (", or threshold=fixed" if method.takes_threshold else "")
            )
        return None
    if not method.takes_threshold:
        raise UserError(f"method={method.name} has no threshold; use threshold=auto, not threshold={threshold.kind}")
    if threshold.kind == "published":
        if threshold.value is not None:
            raise UserError(f"threshold.value={threshold.value} needs threshold=fixed; threshold=published has its own")
        if ratio.of != "layers":
            raise UserError(f"threshold=published is known by ratios of layers; pruning_ratio.of={ratio.of!r} is not")
        return _published_threshold(config)
    if threshold.value is None:
        raise UserError("threshold=fixed needs a value: threshold=fixed threshold.value=0.8 pruning_ratio=none")
    if has_target:
        kept = [word for word in shlex.split(command) if not word.startswith("pruning_ratio")]
        raise UserError(
            "a fixed threshold alone decides how much is removed, so it takes no ratio:"
            f" {shlex.join([*kept, 'pruning_ratio=none'])}"
        )
    return threshold.value


def _published_threshold(config: Config) -> float:
    published = config.model.published_thresholds
    ratio = config.pruning_ratio
    if ratio.num_layers is not None:
        option = "layers"
    else:
        option = "none" if ratio.ratio is None else f"r{round(100 * ratio.ratio)}"
    if option not in published:
        known = ", ".join(f"pruning_ratio={name}: {value}" for name, value in published.items()) or "none is known"
        raise UserError(
            f"model={config.model.name} has no published threshold for pruning_ratio={option}; published: {known}"
        )
    if ratio.ratio is not None:
        log.warning(
            "threshold=published: that %s goes with pruning_ratio=%s is inferred from the names in the authors'"
            " scripts, which do not say how many layers it removes",
            published[option], option,
        )  # fmt: skip
    return published[option]


def _check_positions(config: Config, source: ModelSource, recovery: Recovery | None) -> list[str]:
    """Warnings about texts longer than the model is made for; `UserError` where it has no positions for them."""
    evaluation = config.evaluation
    lengths: dict[str, int] = {}
    if {"calibrate", "merge"}.intersection(config.stages):
        lengths["calibration.seq_len"] = config.calibration.seq_len
    if "recover" in config.stages and isinstance(recovery, FineTuning):
        lengths["recovery.cutoff_len"] = recovery.cutoff_len
    if "evaluate" in config.stages and evaluation.of:
        if evaluation.perplexity.corpora:
            lengths["evaluation.perplexity.window"] = evaluation.perplexity.window
        if evaluation.efficiency.enabled:
            efficiency.check_lengths(None, evaluation.efficiency.output_len, source.max_positions)
    most = source.max_positions
    if most is None or not (longer := [f"{name}={length}" for name, length in lengths.items() if length > most]):
        return []
    if source.architecture.learned_positions:
        raise UserError(f"{', '.join(longer)}: {source.name} has learned {most} positions and none for longer texts")
    return [f"{', '.join(longer)}: {source.name} is made for {most} positions; longer texts say little about it"]


def _check_special_tokens(config: Config, source: ModelSource) -> None:
    """Raise `UserError` if an evaluation needs a token that the tokenizer is known to lack."""
    evaluation, tokens = config.evaluation, source.special_tokens
    if tokens is None or "evaluate" not in config.stages or not evaluation.of:
        return
    if evaluation.tasks and not tokens & {"bos", "eos"}:
        raise UserError(
            f"evaluation.tasks={list(evaluation.tasks)}: the tokenizer of {source.name} names neither a BOS nor an EOS"
            " token, and lm-eval needs one; name them in its tokenizer_config.json"
        )
    if evaluation.perplexity.bos and evaluation.perplexity.corpora and "bos" not in tokens:
        raise UserError(f"evaluation.perplexity.bos=true: the tokenizer of {source.name} has no BOS token")


def _check_evaluation(config: Config) -> dict[str, object]:
    evaluation = config.evaluation
    for target in evaluation.of:
        if target not in options.TARGETS:
            raise UserError(f"evaluation.of has {target!r}; allowed: {', '.join(options.TARGETS)}")
    for task in evaluation.tasks:
        tasks.check_name(task)
    text, speed = evaluation.perplexity, evaluation.efficiency
    perplexity.check(text.window, text.stride, text.max_tokens)
    efficiency.check(speed.num_runs, speed.num_warmup)
    if "evaluate" not in config.stages or not evaluation.of:
        return {}
    folder = data_dir(config)
    return {
        "tasks": {task: tasks.task_fingerprint(evaluation.data, task, folder) for task in evaluation.tasks},
        "corpora": {corpus: perplexity.corpus_fingerprint(corpus, folder) for corpus in evaluation.perplexity.corpora},
    }
