"""The schema of every option we own.

The dataclasses below are the root of the Hydra configuration: a misspelt key or a wrong type is refused while the
configuration is composed. Groups that plug in (``method``, ``repair``, ``recovery``, ``measure``) name a class with
``_target_``; see `slm_pipeline.config.groups`. Importing this module stays cheap: no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm_pipeline.config import plugins, ranges
from slm_pipeline.config.folders import CONF_DIR as CONF_DIR
from slm_pipeline.config.folders import SWEEPS_ROOT as SWEEPS_ROOT
from slm_pipeline.config.ranges import (
    BatchSize,
    Count,
    FilePath,
    FolderName,
    NumLayers,
    Range,
    Seed,
    Text,
    Tokens,
    UpToOne,
)
from slm_pipeline.errors import UserError
from slm_pipeline.store.checksums import digest

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)  # of a configuration that cannot be put together
PLUG_INS = ("method", "repair", "recovery", "measure")  # their options are classes: `slm_pipeline.config.groups`
STAGES = ("calibrate", "merge", "repair", "recover", "evaluate")
TARGETS = ("dense", "pruned", "repaired", "recovered")


@dataclass
class ModelConfig:
    """Where weights and tokenizer come from, and how they are placed."""

    name: str = MISSING  # short name for tables and folders
    source: str = MISSING  # bundled | hub | local | random
    repo: str | None = None  # hub: repository
    revision: str | None = None  # hub: commit, tag or branch
    path: FilePath | None = None  # local: folder that transformers can load
    dtype: str = "bfloat16"  # float32 | bfloat16 | float16
    # auto (cuda if there is one) | cpu | cuda | cuda:N | balanced (spread over all GPUs) | stream (block by block from
    # disk, for models that fit nowhere: calibrate, merge and repair)
    device: str = "auto"
    trust_remote_code: bool = False
    published_thresholds: dict[str, UpToOne] = field(default_factory=dict)  # ratio option -> threshold
    architecture: str | None = None  # random: a model_type of transformers, e.g. qwen3; the rest is for random too
    num_layers: NumLayers | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    vocab_size: Annotated[int, Range(at_least=260, below=2**31)] | None = None  # 256 bytes and special tokens
    seed: Seed | None = None


@dataclass
class CalibrationConfig:
    """The text that a method looks at."""

    source: str = MISSING  # bundled | text_file | bookcorpus | c4 | wikitext2 | slimpajama
    path: FilePath | None = None  # text_file: a UTF-8 file; hub sets: a local folder in the hub's layout
    num_samples: Count = 10
    seq_len: Tokens = 128
    sampling: str = "random"  # random | contiguous
    seed: Seed = 1234
    bos: bool | None = None  # each sample begins with the BOS token, one of seq_len; null: where the model needs it


@dataclass
class ThresholdConfig:
    """Similarity floor of the threshold-driven methods."""

    kind: str = "auto"  # auto | fixed | published
    value: UpToOne | None = None  # fixed
    refine: Annotated[int, Range(at_least=0, at_most=100)] = 5  # auto: grid points tried above the best from halving
    exhaustive: bool = False  # auto: walk the whole grid down from 0.99 instead


@dataclass
class PruningRatioConfig:
    """How much to remove."""

    of: str = "layers"  # layers | parameters | latency
    ratio: Annotated[float, Range(above=0, below=1)] | None = None  # fraction to remove
    num_layers: NumLayers | None = None  # layers to keep, instead of a ratio
    speedup: Annotated[float, Range(above=1, at_most=1000)] | None = None  # latency: dense time of a token / pruned
    batch_size: BatchSize = 1  # latency: texts that are generated at once
    context: Tokens = 128  # latency: tokens before the one that is timed
    mode: str = "eager"  # latency: eager | compile | graph, as of the efficiency measure


@dataclass
class EvaluationConfig:
    """Which models are scored, and what several measures share; the options of each are its own, see conf/measure/."""

    of: list[str] = field(default_factory=lambda: list(TARGETS))
    data: FilePath = "bundled"  # bundled | hub | a folder with <task>.jsonl files
    tasks: list[str] = field(default_factory=list)
    limit: Count | None = None  # first examples of each task; null: all
    batch_size: BatchSize = 16


@dataclass
class TrackerConfig:
    """Where metrics go; metrics.jsonl is always written."""

    kind: str = "jsonl"  # jsonl | wandb | tensorboard | mlflow | trackio
    mode: str = "offline"  # wandb: offline | online
    project: Annotated[str, Text(at_most=128, empty=False)] = "slm_pipeline"  # wandb, mlflow, trackio
    entity: str | None = None
    tags: list[Annotated[str, Text(at_most=64, empty=False)]] = field(default_factory=list)


@dataclass
class StudyConfig:
    """What a multirun asks, and how its table and its plot answer; see sweeps/."""

    question: str | None = None  # in words, the title of its report
    metric: str | None = None  # the column that answers it, e.g. "pruned/perplexity/bundled"
    x: str | None = None  # what it is drawn against: a column such as layers, or an option such as threshold.value
    series: list[str] = field(default_factory=list)  # options whose values name the curves, e.g. [method]
    sort_by: str | None = None  # a column of the table, best first; null: in the order of the jobs


@dataclass
class ObjectiveConfig:
    """The number that a job returns to a sweeper that searches, such as Optuna's."""

    metric: str | None = None  # such as pruned/perplexity/bundled, pruned/average or num_layers; null: no number
    direction: str = "minimize"  # minimize | maximize
    max_layers: NumLayers | None = None  # budget: more layers count as worse than anything within it


@dataclass
class Config:
    """The whole configuration of one job."""

    name: FolderName = "slm"
    seed: Seed = 1234
    plugins: list[str] = field(default_factory=list)  # packages that bring options of their own, see config/plugins.py
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    force: list[str] = field(default_factory=list)  # stages to run again, with everything after them
    keep: str = "model"  # model | plan: whether the pruned weights stay on disk or are rebuilt from the plan
    dry_run: bool = False
    pictures: bool = True  # in the run's folder; without them a job of seconds in a large study takes half as long
    study: StudyConfig = field(default_factory=StudyConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    output_dir: FilePath = "outputs"
    data_dir: FilePath | None = None  # where relative data paths are looked up; null: the directory you started in
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    method: Any = None
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    pruning_ratio: PruningRatioConfig = field(default_factory=PruningRatioConfig)
    repair: Any = None
    recovery: Any = None
    evaluation: Any = None
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


def register() -> None:
    """Make the schema known to Hydra, as ``schema`` in the defaults list.

    The groups that plug in are open, and so is ``evaluation``, under which measures stand: which keys they have is for
    their classes to say, where an error can name the option that lacks a key, and is one job's alone in a
    study.
    """
    schema = OmegaConf.structured(Config)
    for group, shared in (("method", {}), ("repair", {}), ("recovery", {}), ("evaluation", asdict(EvaluationConfig()))):
        schema[group] = shared
        OmegaConf.set_struct(schema[group], False)
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("digest", _digest, replace=True)
    OmegaConf.register_new_resolver("largest_calibration", _largest_calibration, replace=True)


def _digest(*keys: str, _root_: DictConfig) -> str:
    """``${digest:model,evaluation}``: six digits that change with these parts of the configuration."""
    parts = {key: _root_[key] for key in keys}
    plain = {
        key: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        for key, part in parts.items()
    }
    return digest(plain)[:6]


def _largest_calibration(key: str, *, _parent_: DictConfig) -> int:
    """``${largest_calibration:num_samples}``, of the options beside the size that it stands in: that of the published
    calibration size with the most tokens."""
    options: Any = _parent_._get_parent()
    sizes = [part.published_calibration for part in options.values() if OmegaConf.is_dict(part) and "_target_" in part]
    if not sizes:
        raise UserError("no step of the method has a published_calibration")
    return int(max(sizes, key=lambda size: size.num_samples * size.seq_len)[key])


def to_config(composed: DictConfig) -> Config:
    """The typed configuration of a composed one; interpolations resolved, unknown keys refused, its plugins in use.

    Raises:
        UserError: a key that does not exist (also one added with ``+``), a wrong type, a missing value, or one out of
            its range; or a plugin that cannot be used.
    """
    values = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(values, dict)
    values.pop("hydra", None)
    plain = OmegaConf.create(values)
    with refusals_in_one_line():
        OmegaConf.resolve(plain)
        if missing := sorted(OmegaConf.missing_keys(plain)):
            raise UserError(f"no value for {', '.join(missing)}; see slm --help")
        config = OmegaConf.to_object(OmegaConf.merge(_schema(Config), plain))
    assert isinstance(config, Config)
    ranges.check(config)
    plugins.use(config.plugins)  # another process than the one that composed it has not imported them
    return config


@functools.cache
def _schema(options: Any) -> DictConfig:
    """The dataclass as OmegaConf checks values against it; making one takes longer than using it."""
    return OmegaConf.structured(options)


@contextmanager
def refusals_in_one_line(group: str = "") -> Iterator[None]:
    """Turn what OmegaConf has against a value, of the whole configuration or of a group, into a user's error."""
    try:
        yield
    except OmegaConfBaseException as error:
        message = one_line(error)
        names_key = bool(error.full_key) and message.startswith(str(error.full_key))
        raise UserError(f"{group}{'.' if names_key else ': '}{message}" if group else message) from error
    except OverflowError as error:  # an integer of hundreds of digits where a float belongs
        raise UserError(f"{group and group + ': '}{str(error).partition(chr(10))[0]}") from error
    except RecursionError as error:
        raise UserError("values refer to one another in a circle: ${...}") from error


def checked(options: Any, values: Mapping[str, Any], key: str) -> Any:
    """An instance of a dataclass of options with these values.

    Args:
        key: where they stand, such as ``method``, for messages.

    Raises:
        UserError: a value is of the wrong type, or out of its range.
    """
    with refusals_in_one_line(key):
        built = OmegaConf.to_object(OmegaConf.merge(_schema(options), dict(values)))
    ranges.check(built, f"{key}.")
    return built


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
