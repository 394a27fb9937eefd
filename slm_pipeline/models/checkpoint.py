"""Write checkpoints that plain transformers loads, and prove it each time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.machine import memory
from slm_pipeline.models import config_files, modeling_pruned
from slm_pipeline.models.architectures import PRUNED
from slm_pipeline.models.checked import our_bars
from slm_pipeline.models.loading import load_checkpoint, load_tokenizer
from slm_pipeline.models.view import ModelView
from slm_pipeline.store.files import give_usual_modes, write_json, write_text

_PROBE_LENGTH = 16  # tokens, beyond the longest sliding window
_LONGEST_PROBED_WINDOW = 1024  # tokens: Gemma 3's; above, the windows' settings are compared and the probe is short
_PROBE_TEXT = "The 12 Zürich bankers said: 'Don't!'\n\n\tThey left  at 7:45, naïve as ever \U0001f642."
_HOW_TO_LOAD = (
    "Its layers differ in what they have: it brings `modeling_pruned.py`, and `AutoModelForCausalLM` loads it with"
    " `trust_remote_code=True` only."
)
MAX_SHARD = "5GB"  # of one file of weights; transformers 5 would write up to 50
MAX_STREAMED_SHARD = "2GB"  # in memory while it is written
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}  # relative, of the logits; equal in most cases


def save(model: Any, tokenizer: Any, folder: Path, *, card: str, config: ModelConfig) -> Any:
    """Save weights, configuration, tokenizer and card to ``folder``; reload and compare; return the reloaded model.

    Written under a temporary name and renamed when it has been verified. ``model`` must not be used afterwards: its
    memory is given back before the reload, so that two copies never share a GPU.

    Raises:
        UserError: the reloaded model's logits, size, attention windows or token ids differ.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    view = ModelView(model)
    model.config.dtype = config.dtype
    model.config.tie_word_embeddings = view.ties_embeddings
    with our_bars():
        model.save_pretrained(partial, max_shard_size=MAX_SHARD if view.stream is None else MAX_STREAMED_SHARD)
    if model.config.model_type.startswith(PRUNED):
        _add_modelling_file(partial)
        card = f"{card}\n\n{_HOW_TO_LOAD}\n"
    tokenizer.save_pretrained(partial)
    config_files.mend(partial, tokenizer)
    write_text(partial / "README.md", card)
    give_usual_modes(partial)
    expected, expected_ids = probe(model), tokenizer(_PROBE_TEXT)["input_ids"]
    windows, num_parameters = view.attention_windows(), view.num_parameters()
    if view.stream is not None:
        view.stream.close()
    elif not hasattr(model, "hf_device_map"):  # a model spread over GPUs cannot be moved; there both copies must fit
        model.to("meta")
    del model, view
    memory.free()
    reloaded = load_checkpoint(partial, config)
    _compare(expected, probe(reloaded), config.dtype, folder)
    found = ModelView(reloaded)
    if found.num_parameters() != num_parameters:
        raise UserError(f"{folder}: the reloaded model has another number of parameters than the saved one")
    if found.attention_windows() != windows:
        raise UserError(f"{folder}: the reloaded model has other attention windows than the saved one")
    if load_tokenizer(partial)(_PROBE_TEXT)["input_ids"] != expected_ids:
        raise UserError(f"{folder}: the reloaded tokenizer gives other token ids than the saved one")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return reloaded


def _add_modelling_file(folder: Path) -> None:
    """Let plain transformers find the classes of a model whose layers differ, with trust_remote_code=True."""
    source = Path(str(modeling_pruned.__file__))
    shutil.copyfile(source, folder / source.name)
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = description["architectures"][0]
    config_name = getattr(modeling_pruned, name).config_class.__name__
    description["auto_map"] = {
        "AutoConfig": f"{source.stem}.{config_name}",
        "AutoModelForCausalLM": f"{source.stem}.{name}",
    }
    write_json(folder / "config.json", description)


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Logits at the end of a fixed sequence of token ids: [1, 16, vocabulary] float32 on the CPU.

    The sequence is 16 tokens longer than the longest sliding window of up to 1024, if the model has so many positions.
    """
    view = ModelView(model)
    window = max((size for size in view.attention_windows() if size and size <= _LONGEST_PROBED_WINDOW), default=0)
    length = min(window + _PROBE_LENGTH, model.config.max_position_embeddings)
    token_ids = torch.arange(1, length + 1) * 97 % model.config.vocab_size
    output = model(input_ids=token_ids[None].to(view.device), use_cache=False, logits_to_keep=_PROBE_LENGTH)
    return output.logits.float().cpu()


def _compare(expected: Tensor, found: Tensor, dtype: str, folder: Path) -> None:
    difference = (expected - found).norm() / expected.norm()
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"{folder}: the reloaded model's logits differ from the saved model's by {float(difference):.2e} (relative;"
            f" at most {TOLERANCE[dtype]:.0e} allowed): the checkpoint was not kept"
        )
