"""The schema of every option we own, and the one place where YAML turns into objects.

The dataclasses below are the root of the Hydra configuration: a misspelt key or a wrong type is refused while the
configuration is composed. Groups that plug in (``method``, ``recovery``) name a class with ``_target_``; `build` is
the only function that resolves such a name. Importing this module stays cheap: no torch.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm_pipeline.artifacts import digest
from slm_pipeline.errors import UserError

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE if (_HERE / "conf").is_dir() else _HERE.parent  # an installed wheel carries conf/ and sweeps/ inside
CONF_DIR = _ROOT / "conf"
SWEEPS_ROOT = _ROOT  # the folder that holds the shipped sweeps/

STAGES = ("calibrate", "merge", "recover", "evaluate")
TARGETS = ("dense", "pruned", "recovered")


@dataclass
class ModelConfig:
    """Where weights and tokenizer come from, and how they are placed."""

    name: str = MISSING  # short name for tables and folders
    source: str = MISSING  # bundled | hub | local | random
    repo: str | None = None  # hub: repository
    revision: str | None = None  # hub: commit, tag or branch
    path: str | None = None  # local: folder that transformers can load
    dtype: str = "bfloat16"  # float32 | bfloat16 | float16
    device: str = "auto"  # auto (cuda if there is one) | cpu | cuda | cuda:N | balanced (spread over all GPUs)
    trust_remote_code: bool = False
    published_thresholds: dict[str, float] = field(default_factory=dict)  # ratio option -> threshold
    architecture: str | None = None  # random: a model_type of transformers, e.g. qwen3; the rest is for random too
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    seed: int | None = None


@dataclass
class CalibrationConfig:
    """The text that a method looks at."""

    source: str = MISSING  # bundled | text_file | bookcorpus | c4 | wikitext2 | slimpajama
    path: str | None = None  # text_file: a UTF-8 file; hub sets: a local folder in the hub's layout instead of the hub
    num_samples: int = 10
    seq_len: int = 128  # tokens
    sampling: str = "random"  # random | contiguous
    seed: int = 1234


@dataclass
class ThresholdConfig:
    """Similarity floor of the threshold-driven methods."""

    kind: str = "auto"  # auto | fixed | published
    value: float | None = None  # fixed: in [0, 1]
    refine: int = 5  # auto: grid points tried above the best threshold found by halving
    exhaustive: bool = False  # auto: walk the whole grid down from 0.99 instead


@dataclass
class PruningRatioConfig:
    """How much to remove."""

    of: str = "layers"  # layers | parameters
    ratio: float | None = None  # fraction to remove, in (0, 1)
    num_layers: int | None = None  # layers to keep, instead of a ratio


@dataclass
class PerplexityConfig:
    """Language-model loss over running text."""

    corpora: list[str] = field(default_factory=list)  # bundled | wikitext2 | c4 | ptb | a text file
    window: int = 1024  # tokens
    stride: int | None = None  # null: windows do not overlap; else only the last `stride` tokens of a window are scored
    bos: bool = False  # put the BOS token before every window
    max_tokens: int | None = None  # null: the whole text
    batch_size: int = 4


@dataclass
class EfficiencyConfig:
    """Speed and memory of generation, as the SLM authors measure it."""

    enabled: bool = False
    batch_size: int = 1
    output_len: int = 128  # tokens
    num_runs: int = 30
    num_warmup: int = 10  # of the runs, not counted
    prompt: str = "The Leaning Tower of Pisa is known for"


@dataclass
class EvaluationConfig:
    """Which numbers, on which data."""

    of: list[str] = field(default_factory=lambda: list(TARGETS))
    data: str = "bundled"  # bundled | hub | a folder with <task>.jsonl files
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None  # first examples of each task; null: all
    batch_size: int = 16
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)


@dataclass
class TrackerConfig:
    """Where metrics go; metrics.jsonl is always written."""

    kind: str = "jsonl"  # jsonl | wandb
    mode: str = "offline"  # wandb: offline | online
    project: str = "slm_pipeline"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class StudyConfig:
    """What a multirun asks, and how its table and its plot answer; see sweeps/."""

    question: str | None = None  # in words, the title of its report
    metric: str | None = None  # the column that answers it, e.g. "perplexity bundled pruned"
    x: str | None = None  # what it is drawn against: a column such as layers, or an option such as threshold.value
    series: list[str] = field(default_factory=list)  # options whose values name the curves, e.g. [method]
    sort_by: str | None = None  # a column of the table, best first; null: in the order of the jobs


@dataclass
class ObjectiveConfig:
    """The number that a job returns to a sweeper that searches, such as Optuna's."""

    metric: str | None = None  # such as pruned/perplexity/bundled, pruned/average or num_layers; null: no number
    direction: str = "minimize"  # minimize | maximize
    max_layers: int | None = None  # budget: more layers count as worse than anything within it


@dataclass
class Config:
    """The whole configuration of one job."""

    name: str = "slm"
    seed: int = 1234
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    force: list[str] = field(default_factory=list)  # stages to run again, with everything after them
    keep: str = "model"  # model | plan: whether the pruned weights stay on disk or are rebuilt from the plan
    dry_run: bool = False
    pictures: bool = True  # in the run's folder; without them a job of seconds in a large study takes half as long
    study: StudyConfig = field(default_factory=StudyConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    output_dir: str = "outputs"
    data_dir: str | None = None  # where relative data paths are looked up; null: the directory you started in
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    method: Any = None
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    pruning_ratio: PruningRatioConfig = field(default_factory=PruningRatioConfig)
    recovery: Any = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


def register() -> None:
    """Make the schema known to Hydra, as ``schema`` in the defaults list."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("digest", _digest, replace=True)


def _digest(*keys: str, _root_: DictConfig) -> str:
    """``${digest:model,evaluation}``: six digits that change with these parts of the configuration."""
    parts = {key: _root_[key] for key in keys}
    plain = {
        key: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        for key, part in parts.items()
    }
    return digest(plain)[:6]


def to_config(composed: DictConfig) -> Config:
    """The typed configuration of a composed one; interpolations resolved, unknown keys refused.

    Raises:
        UserError: a key that does not exist (also one added with ``+``), a wrong type, or a missing value.
    """
    values = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(values, dict)
    values.pop("hydra", None)
    plain = OmegaConf.create(values)
    try:
        OmegaConf.resolve(plain)
        if missing := sorted(OmegaConf.missing_keys(plain)):
            raise UserError(f"no value for {', '.join(missing)}; see slm --help")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(config, Config)
    return config


def build(node: Any, *, group: str) -> Any:
    """The object that a plug-in group's YAML describes.

    ``_target_`` names a dataclass of this package; the other keys are its fields, checked for name and type, then by
    the class's own ``__post_init__``.

    Raises:
        UserError: the class is not one of ours, a key is unknown, or a value is of the wrong type or range.
    """
    values = dict(node)
    target = values.pop("_target_", None)
    if not isinstance(target, str) or not target.startswith("slm_pipeline."):
        raise UserError(f"{group}._target_={target!r} must name a class in slm_pipeline")
    module_name, _, class_name = target.rpartition(".")
    try:
        options = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{group}._target_={target!r} does not exist ({error})") from error
    if not is_dataclass(options):
        raise UserError(f"{group}._target_={target!r} is not a dataclass")
    if unknown := sorted(set(values) - {option.name for option in fields(options)}):
        allowed = ", ".join(option.name for option in fields(options))
        raise UserError(f"{group}.{unknown[0]} does not exist; {group} has: {allowed}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(options), values))
    except OmegaConfBaseException as error:
        raise UserError(f"{group}.{one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An OmegaConf or Hydra message without its trailing location block."""
    message = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):  # Hydra names the override, OmegaConf what is wrong with it
        message += f": {error.__cause__}"
    message = message.partition("Config search path:")[0]
    message = re.sub(r"To append to your config use \S+", "See slm --cfg job for all keys.", message.strip())
    lines = [line.strip() for line in message.splitlines()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    first = " ".join(line for line in lines if not re.match(r"(full_key|object_type|reference_type):?", line))
    return f"{key}: {first}" if key and key not in first else first
