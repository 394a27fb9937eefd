"""What the JSON files of a checkpoint say: the truth, in the words of transformers 5 and in those of transformers 4.

transformers 5 keeps some settings under new names and reads both; transformers 4 knows the old names alone, and takes
its defaults for what it does not find, without a word. Importing this module stays cheap: no torch.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from slm_pipeline.store.files import write_json

log = logging.getLogger(__name__)


def mend(folder: Path, tokenizer: Any) -> None:
    """Correct config.json and tokenizer_config.json, which transformers 5 has just written to ``folder``."""
    config = _read(folder / "config.json")
    config.pop("quantization_config", None)  # the weights beside it are plain numbers: the save compares their logits
    _drop_absent_code(config, folder)
    write_json(folder / "config.json", dict(sorted((config | old_names(config)).items())))
    file = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file():
        settings = _read(file)
        _drop_absent_code(settings, folder)
        write_json(file, dict(sorted(_plain_tokenizer(settings, tokenizer).items())))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _drop_absent_code(settings: dict[str, Any], folder: Path) -> None:
    """Drop the entries of ``auto_map`` that name a modelling file which is not in the folder."""

    def is_here(reference: str | list[str | None]) -> bool:  # module.Class; of tokenizers two, either may be null
        names = [reference] if isinstance(reference, str) else reference
        return all((folder / f"{name.rpartition('.')[0]}.py").is_file() for name in names if name)

    if "auto_map" in settings:
        code = settings.pop("auto_map")
        code = code if isinstance(code, dict) else {"AutoTokenizer": code}  # the form of old tokenizers
        if here := {name: reference for name, reference in code.items() if is_here(reference)}:
            settings["auto_map"] = here


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of ``config`` (a config.json of transformers 5) under the names of transformers 4."""
    old: dict[str, Any] = {}
    if "dtype" in config:
        old["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not rope:
        return old
    if "full_attention" in rope:  # Gemma 3 has one for each kind of layer
        local, rope = rope["sliding_attention"], rope["full_attention"]
        old["rope_local_base_freq"] = local["rope_theta"]
        if local["rope_type"] != "default":
            log.warning("transformers 4 cannot scale the positions of sliding layers alone: load this with 5 or later")
    if config["model_type"].endswith("gpt_neox"):
        old |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    else:
        old["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        apart = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in rope.items() if key not in apart}
        if rope["rope_type"] == "longrope" and "original_max_position_embeddings" in scaling:
            old["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        kind = "type" if config["model_type"].endswith(("phi3", "olmo2")) else "rope_type"  # these know no other key
        old["rope_scaling"] = {kind: rope["rope_type"], **scaling}
    return old


def _plain_tokenizer(settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """tokenizer_config.json for the class that both versions have and that does just what tokenizer.json says.

    transformers 4 has no TokenizersBackend, and its classes of the other names change what they have read: one adds a
    BOS, another token_type_ids. What the class of ``tokenizer`` decided is written out.
    """
    settings = {key: value for key, value in settings.items() if key not in ("backend", "is_local", "local_files_only")}
    if "extra_special_tokens" in settings:  # a list here, a mapping of names in transformers 4
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for key in ("clean_up_tokenization_spaces", "model_input_names", "padding_side", "truncation_side"):
        settings[key] = getattr(tokenizer, key)
    first = tokenizer.backend_tokenizer.pre_tokenizer
    prefix = None if first is None else json.loads(first.__getstate__()).get("add_prefix_space")
    if prefix is not None:  # else transformers 4 puts its default into the pre-tokenizer
        settings["add_prefix_space"] = prefix
    return settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
