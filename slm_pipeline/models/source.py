"""What a model is before it is loaded: its fingerprint, its configuration, its place. No torch."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slm_pipeline import assets, memory
from slm_pipeline.artifacts import digest
from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import architectures
from slm_pipeline.models.architectures import PRUNED, Architecture

DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size", "seed")
_OWN_OPTIONS = {"local": ("path",), "random": ("architecture", *_SIZES)}  # what no other source reads


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        fingerprint: changes whenever the weights or the tokenizer may have changed.
        num_layers: number of decoder blocks; None when that is not known without fetching the model.
        model_type: as in config.json.
    """

    config: ModelConfig
    fingerprint: str
    num_layers: int | None
    model_type: str

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def architecture(self) -> Architecture:
        return architectures.find({"model_type": self.model_type})


def describe(config: ModelConfig) -> ModelSource:
    """Check a model's options and find its fingerprint and depth, without loading weights.

    Raises:
        UserError: an unknown source, dtype or architecture, a missing folder or file, an unreachable hub.
    """
    if config.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.dtype!r} is not one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|balanced", config.device):
        raise UserError(f"model.device={config.device!r} is not one of auto, cpu, cuda, cuda:N, balanced")
    makers = {"bundled": _bundled, "hub": _hub, "local": _local, "random": _random}
    if config.source not in makers:
        raise UserError(f"model.source={config.source!r} is not one of {', '.join(makers)}")
    for owner, names in _OWN_OPTIONS.items():
        for name in names:
            if config.source != owner and getattr(config, name) is not None:
                raise UserError(f"model.{name}={getattr(config, name)} needs model={owner}, not {config.source}")
    source = makers[config.source](config)
    if source.model_type.startswith(PRUNED):
        raise UserError(
            f"{config.path or config.repo} lacks whole sublayers already, so it cannot be pruned further; start from"
            " the dense model, or from a checkpoint written with method.export=stock"
        )
    return source


def _bundled(config: ModelConfig) -> ModelSource:
    if config.name not in assets.BUNDLED_MODELS:
        raise UserError(f"model.name={config.name!r} is not bundled; bundled: {', '.join(assets.BUNDLED_MODELS)}")
    bundled = assets.BUNDLED_MODELS[config.name]
    fingerprint = f"{assets.model_fingerprint(config.name)}:{config.dtype}"
    return ModelSource(config, fingerprint, bundled.num_layers, bundled.model_type)


def _hub(config: ModelConfig) -> ModelSource:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not config.repo:
        raise UserError("model.source=hub needs model.repo=ORGANISATION/NAME")
    try:
        file = hf_hub_download(config.repo, "config.json", revision=config.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.repo={config.repo!r} cannot be had from the hub and is not in its local cache ({reason});"
            " with a copy on disk use model=local model.path=FOLDER"
        ) from error
    commit = Path(file).parent.name  # the hub's cache keeps files under snapshots/<commit>/
    description = json.loads(Path(file).read_text(encoding="utf-8"))
    architectures.find(description)
    return ModelSource(
        config, f"hub:{config.repo}@{commit}:{config.dtype}", _depth(description), description["model_type"]
    )


def _local(config: ModelConfig) -> ModelSource:
    if not config.path:
        raise UserError("model.source=local needs model.path=FOLDER")
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"model.path={config.path!r} is not a folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={config.path!r} has no config.json: it is not a transformers model folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model.path={config.path!r} has no *.safetensors file; pickled weights are never loaded")
    try:
        description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    architectures.find(description)
    _check_shards(folder, weights)
    content = hashlib.sha256((folder / "config.json").read_bytes())
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            content.update(name.encode() + (folder / name).read_bytes())
    for file in weights:
        state = file.stat()
        content.update(f"{file.name}:{state.st_size}:{state.st_mtime_ns}".encode() + _safetensors_header(file))
    fingerprint = f"local:{content.hexdigest()[:16]}:{config.dtype}"
    return ModelSource(config, fingerprint, _depth(description), description["model_type"])


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
    irrelevant = ("name", "device", "published_thresholds")
    options = {key: value for key, value in asdict(config).items() if key not in irrelevant}
    assert config.architecture is not None
    return ModelSource(config, f"random:{digest(options)}", config.num_layers, config.architecture)


def _check_size(config: ModelConfig) -> None:
    """Raise `UserError` unless main memory holds a random model of these sizes.

    Counted are its matrices alone; a model that is made on a GPU goes through main memory when it is saved.
    """
    hidden, heads = config.hidden_size or 0, config.num_heads or 1
    keys_and_values = hidden // heads * (config.num_kv_heads or 0)
    of_layer = 2 * hidden * (hidden + keys_and_values) + 2 * hidden * (config.intermediate_size or 0)
    embedding = hidden * (config.vocab_size or 0)
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


def _depth(description: dict[str, Any]) -> int:
    if "num_hidden_layers" not in description:
        raise UserError(f"model_type={description['model_type']!r}: its config.json has no num_hidden_layers")
    return int(description["num_hidden_layers"])


def _check_shards(folder: Path, weights: list[Path]) -> None:
    """Raise `UserError` when the folder's index names a file that is not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(needed - {file.name for file in weights}):
        raise UserError(f"{folder} lacks {missing[0]}, which {index.name} names")


def _safetensors_header(file: Path) -> bytes:
    """The part that names the tensors and says where each lies; a file too short for them is refused."""
    num_bytes = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(8)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > num_bytes - 8:
            raise UserError(f"{file} is damaged or incomplete: its header is longer than the file")
        header = handle.read(length)
    try:
        tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
        end = max((about["data_offsets"][1] for about in tensors.values()), default=0)
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{file} is not a safetensors file: {error}") from error
    if 8 + length + end != num_bytes:
        raise UserError(f"{file} is damaged or incomplete: {num_bytes} bytes, its header says {8 + length + end}")
    return header
