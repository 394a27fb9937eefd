"""What a model is before it is loaded: its fingerprint, its configuration, its place. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slm_pipeline.assets.cache import cache_dir
from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.machine import gpus, memory, network
from slm_pipeline.models import architectures, folder
from slm_pipeline.models.architectures import PRUNED, Architecture
from slm_pipeline.models.bundled import BUNDLED_MODELS, model_fingerprint
from slm_pipeline.models.description import check_description, num_parameters
from slm_pipeline.models.json_files import read_json
from slm_pipeline.models.stored_tensors import check_stored_as
from slm_pipeline.store.checksums import digest

DTYPES = ("float32", "bfloat16", "float16")
_SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size", "seed")
_OWN_OPTIONS = {"local": ("path",), "random": ("architecture", *_SIZES)}  # what no other source reads
RANDOM_POSITIONS = 2048  # of random models that learn their positions


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        fingerprint: changes with the weights, the tokenizer and whatever else loading reads, never with time stamps.
        num_layers: number of decoder blocks; None when that is not known without fetching the model.
        model_type: as in config.json.
        max_positions: tokens that the model is made for; None if unknown, or if it is random and has no table of them.
        special_tokens: which of bos, eos, pad its tokenizer has; None if only loading it tells.
        warnings: what may not be as meant in it, in words.
        commit: of a model on the hub.
        description: config.json's content, or what it would be; None when that is not known without fetching the model.
    """

    config: ModelConfig
    fingerprint: str
    num_layers: int | None
    model_type: str
    max_positions: int | None = None
    special_tokens: frozenset[str] | None = None
    warnings: tuple[str, ...] = ()
    commit: str | None = None
    num_parameters: int | None = None  # about; None if unknown
    description: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def fingerprint_of_weights(self) -> str:
        """The fingerprint without the dtype in which the weights are to be loaded: the same model in any."""
        return self.fingerprint.replace(f":{self.config.dtype}", "")

    @property
    def architecture(self) -> Architecture:
        return architectures.find({"model_type": self.model_type})

    @property
    def layers_differ(self) -> bool:
        """Whether config.json says that its layers have different heads or neurons, or lack a sublayer."""
        sizes = (self.description or {}).get("layer_sizes") or (self.description or {}).get("widths") or []
        return any(size != sizes[0] for size in sizes) or bool((self.description or {}).get("absent"))

    def puts_bos(self, asked: bool | None) -> bool:
        """Whether the BOS token stands before a text: as asked, else where the model needs it and has one."""
        if asked is not None:
            return asked
        return self.architecture.needs_bos and (self.special_tokens is None or "bos" in self.special_tokens)

    def lacks_bos(self, asked: bool | None, option: str) -> list[str]:
        """A warning if ``option`` keeps from the model the BOS token that it needs."""
        if not self.architecture.needs_bos or self.puts_bos(asked):
            return []
        why = f"{option}=false" if asked is False else f"the tokenizer of {self.name} has no BOS token"
        return [f"{why}: a {self.model_type} model predicts a text without BOS far worse; {option}=null puts it there"]


def describe(config: ModelConfig) -> ModelSource:
    """Check a model's options and find its fingerprint and depth, without loading weights.

    Raises:
        UserError: an unknown source, dtype or architecture, a missing folder or file, an unreachable hub.
    """
    if config.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.dtype!r} is not one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|balanced|stream", config.device):
        raise UserError(f"model.device={config.device!r} is not one of auto, cpu, cuda, cuda:N, balanced, stream")
    makers = {"bundled": _bundled, "hub": _hub, "local": _local, "random": _random}
    if config.source not in makers:
        raise UserError(f"model.source={config.source!r} is not one of {', '.join(makers)}")
    for owner, names in _OWN_OPTIONS.items():
        for name in names:
            if config.source != owner and getattr(config, name) is not None:
                raise UserError(f"model.{name}={getattr(config, name)} needs model={owner}, not {config.source}")
    source = makers[config.source](config)
    if source.model_type.removeprefix(PRUNED) not in architectures.SHIPPED:  # a plugin may yet say something else of it
        said = digest(asdict(source.architecture))
        return replace(source, fingerprint=f"{source.fingerprint}:{said}")
    return source


def _bundled(config: ModelConfig) -> ModelSource:
    if config.name not in BUNDLED_MODELS:
        raise UserError(f"model.name={config.name!r} is not bundled; bundled: {', '.join(BUNDLED_MODELS)}")
    bundled = BUNDLED_MODELS[config.name]
    fingerprint = f"{model_fingerprint(config.name)}:{config.dtype}"
    if config.device == "stream" and config.dtype != "float32":
        raise UserError(
            "model.device=stream reads weights as they are stored, those of bundled models in float32; use"
            " model.dtype=float32"
        )
    file = cache_dir() / "models" / config.name / "config.json"
    return ModelSource(
        config,
        fingerprint,
        bundled.num_layers,
        bundled.model_type,
        bundled.max_positions,
        num_parameters=bundled.num_parameters,
        description=read_json(file) if file.is_file() else None,
    )


def _hub(config: ModelConfig) -> ModelSource:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not config.repo:
        raise UserError("model.source=hub needs model.repo=ORGANISATION/NAME")
    there = network.hub_answers()
    try:
        file = hf_hub_download(config.repo, "config.json", revision=config.revision, local_files_only=not there)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if there else f"{network.hub()} does not answer"
        raise UserError(
            f"model.repo={config.repo!r} cannot be had from the hub and is not in its local cache ({reason});"
            " with a copy on disk use model=local model.path=FOLDER"
        ) from error
    commit = Path(file).parent.name  # the hub's cache keeps files under snapshots/<commit>/
    try:
        description = read_json(Path(file))
    except ValueError as error:
        raise UserError(f"model.repo={config.repo!r}: config.json {error}") from error
    if problems := check_description(description):
        raise UserError(f"model.repo={config.repo!r}: {'; '.join(problems)}")
    return ModelSource(
        config,
        f"hub:{config.repo}@{commit}:{config.dtype}",
        description["num_hidden_layers"],
        description["model_type"],
        description.get("max_position_embeddings"),
        commit=commit,
        num_parameters=num_parameters(description),
        description=description,
    )


def _local(config: ModelConfig) -> ModelSource:
    if not config.path:
        raise UserError("model.source=local needs model.path=FOLDER")
    path = Path(os.path.expanduser(config.path))
    if not os.path.isdir(path):
        raise UserError(f"model.path={config.path!r} is not a folder")
    found = folder.look(path, f"model.path={config.path!r}", trust_remote_code=config.trust_remote_code)
    if config.device == "stream":
        check_stored_as(found.tensors.values(), config)
    return ModelSource(
        config,
        f"local:{found.fingerprint()}:{config.dtype}",
        found.description["num_hidden_layers"],
        found.description["model_type"],
        found.description.get("max_position_embeddings"),
        found.special_tokens,
        found.warnings,
        num_parameters=num_parameters(found.description),
        description=found.description,
    )


def _random(config: ModelConfig) -> ModelSource:
    architectures.find({"model_type": config.architecture})
    for name in _SIZES:
        if getattr(config, name) is None:
            raise UserError(f"model.{name}=null: a random model needs a number")
    assert config.num_heads is not None
    assert config.num_kv_heads is not None
    assert config.hidden_size is not None
    assert config.vocab_size is not None
    if config.num_heads % config.num_kv_heads or config.hidden_size % config.num_heads:
        raise UserError(
            f"model.num_heads={config.num_heads} must divide model.hidden_size={config.hidden_size}"
            f" and be a multiple of model.num_kv_heads={config.num_kv_heads}"
        )
    _check_size(config)
    if config.device in ("balanced", "stream"):
        does = {"balanced": "spreads stored weights over GPUs", "stream": "reads stored weights layer by layer"}
        raise UserError(f"model.device={config.device} {does[config.device]}; random ones are drawn on one device")
    irrelevant = ("name", "device", "published_thresholds")
    options = {key: value for key, value in asdict(config).items() if key not in irrelevant}
    options["drawn_on"] = drawn_on(config)
    assert config.architecture is not None
    architecture = architectures.find({"model_type": config.architecture})
    description = {
        "model_type": config.architecture,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        architecture.intermediate_size: config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads if config.architecture not in ("opt", "gpt_neox") else None,
        "vocab_size": config.vocab_size,
    }
    return ModelSource(
        config,
        f"random:{digest(options)}",
        config.num_layers,
        config.architecture,
        RANDOM_POSITIONS if architecture.learned_positions else None,
        frozenset(("bos", "eos", "pad")),
        num_parameters=num_parameters(description),
        description=description,
    )


def _check_size(config: ModelConfig) -> None:
    """Raise `UserError` unless main memory holds a random model of these sizes.

    Counted are its matrices alone; a model that is made on a GPU goes through main memory when it is saved.
    """
    hidden = config.hidden_size or 0
    embedding = hidden * (config.vocab_size or 0)
    of_layer = (_matrices(config) - embedding) // (config.num_layers or 1)
    num_bytes, there = (4 if config.dtype == "float32" else 2), memory.of_machine()
    needed = num_bytes * (embedding + of_layer * (config.num_layers or 0))
    if needed <= there:
        return
    fitting = (there // num_bytes - embedding) // of_layer
    advice = f"model.num_layers={fitting} would fit" if fitting > 0 else "make model.hidden_size smaller"
    raise UserError(
        f"model=random with model.num_layers={config.num_layers}, model.hidden_size={config.hidden_size},"
        f" model.intermediate_size={config.intermediate_size} and model.vocab_size={config.vocab_size} takes"
        f" {needed / 1e9:.0f} GB and this machine has {there / 1e9:.0f} GB; {advice}"
    )


def _matrices(config: ModelConfig) -> int:
    """Parameters in the matrices of a random model, at least."""
    hidden, heads = config.hidden_size or 0, config.num_heads or 1
    keys_and_values = hidden // heads * (config.num_kv_heads or 0)
    of_layer = 2 * hidden * (hidden + keys_and_values) + 2 * hidden * (config.intermediate_size or 0)
    return hidden * (config.vocab_size or 0) + of_layer * (config.num_layers or 0)


def drawn_on(config: ModelConfig) -> str:
    """The kind of device, cpu or cuda, on which random weights are drawn: the same seed gives each kind its own."""
    if config.device == "auto":
        return "cuda" if gpus.visible() else "cpu"
    return config.device.partition(":")[0]
