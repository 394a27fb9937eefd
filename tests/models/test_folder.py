"""Model folders as people have them: what is wrong is said in one line before anything runs, and never a traceback."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct
from pathlib import Path

import model_folders as folders
import pytest
import torch
from conftest import run_slm
from hypothesis import given
from hypothesis import strategies as st
from model_folders import config, replace_by, weights
from transformers import AutoConfig
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slm_pipeline.config import ModelConfig
from slm_pipeline.engine.blocks import BlockRunner
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.zero_shot import score_task
from slm_pipeline.models import fault_words
from slm_pipeline.models import folder as model_folder
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.description import ACTIVATIONS, ROPE_TYPES, check_description
from slm_pipeline.models.loading import (
    load_checkpoint,
    load_dense,
    load_dense_tokenizer,
    load_tokenizer,
    ties_embeddings,
)
from slm_pipeline.models.source import ModelSource, describe
from slm_pipeline.models.view import ModelView

FLOAT32 = {"dtype": "float32", "device": "cpu"}


def options(folder: Path, **more: object) -> ModelConfig:
    return ModelConfig(**{"name": "local", "source": "local", "path": str(folder), **FLOAT32, **more})


def unchecked(folder: Path, **more: object) -> ModelSource:
    """A source that nobody looked at: what only loading can find."""
    return ModelSource(options(folder, **more), "", 4, "llama")


def filled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """With ``value`` in one place."""
    return tensor.flatten().index_fill(0, torch.tensor(31), value).view_as(tensor)


def header_only(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")


def odd_metadata(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 18) + b'{"__metadata__":5}')


FAULTS = {
    # config.json
    "no config": ("llama", replace_by("nothing", "config.json"), "it has no config.json"),
    "config is a list": ("llama", replace_by("list", "config.json"), r"config.json is \[1, 2\], not an object"),
    "config is null": ("llama", replace_by("null", "config.json"), "config.json is null, not an object"),
    "config is UTF-16": ("llama", replace_by("utf-16", "config.json"), "config.json is UTF-16; transformers reads"),
    "config is Latin-1": ("llama", replace_by("latin-1", "config.json"), "config.json is not UTF-8 text: .* at byte 7"),
    "config is cut": ("llama", replace_by("truncated", "config.json"), "config.json is not valid JSON"),
    "config is deep": ("llama", replace_by("deep", "config.json"), "config.json is nested too deeply"),
    "config is a fifo": ("llama", replace_by("fifo", "config.json"), "config.json is not a regular file"),
    "layers as text": ("llama", config(num_hidden_layers="12"), 'num_hidden_layers="12": an integer from 1 to 10000'),
    "layers below 1": ("llama", config(num_hidden_layers=-1), "num_hidden_layers=-1: an integer"),
    "a billion layers": ("llama", config(num_hidden_layers=10**9), "num_hidden_layers=1000000000: an integer"),
    "layers not whole": ("llama", config(num_hidden_layers=1e9), "num_hidden_layers=1000000000.0: an integer"),
    "layers null": ("llama", config(num_hidden_layers=None), "num_hidden_layers=null: an integer"),
    "layers true": ("llama", config(num_hidden_layers=True), "num_hidden_layers=true: an integer"),
    "no width": ("llama", config(hidden_size=0), "hidden_size=0: an integer from 1"),
    "heads": ("llama", config(num_attention_heads=3, head_dim=None), "num_attention_heads=3, which does not divide"),
    "groups": ("llama", config(num_key_value_heads=3), "num_key_value_heads=3, which does not divide its 4 heads"),
    "pad beyond": ("llama", config(pad_token_id=300), "pad_token_id=300: an integer from 0 to 299, or null"),
    "eps as text": ("llama", config(rms_norm_eps="1e-6"), 'rms_norm_eps="1e-6": a positive number with a decimal p'),
    "activation": ("llama", config(hidden_act="nosuch"), 'hidden_act="nosuch": one of gelu, .*, xielu is needed'),
    "bias as text": ("llama", config(attention_bias="x"), 'attention_bias="x": true or false is needed'),
    "window as text": ("llama", config(sliding_window="a"), 'sliding_window="a": an integer from 1 to 2147483647'),
    "dropout": ("llama", config(attention_dropout=5), "attention_dropout=5: a number from 0 to 1"),
    "dtype": ("llama", config(dtype="float99"), 'dtype="float99": one of float64, .*, bfloat16, or null, is needed'),
    "bos beyond": ("llama", config(bos_token_id=9999), "bos_token_id=9999: an integer from 0 to 299, or null, is need"),
    "eos as text": ("llama", config(eos_token_id=[1, "x"]), 'eos_token_id="x": an integer from 0 to 299'),
    "rope as text": ("llama", config(rope_parameters="x"), 'rope_parameters="x": an object, or null, is needed'),
    "rope type": ("llama", config(rope_parameters={"rope_type": "no"}), 'rope_type="no": one of default, linear'),
    "rope theta": (
        "llama", config(rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        "rope_parameters.rope_theta=-1.0: a positive number is needed",
    ),
    "rope of layers": (
        "gemma3_text", config(rope_parameters={"full_attention": {"rope_type": "linear"}}),
        "config.json has rope_parameters.full_attention of type linear without factor",
    ),
    "rope scaling": (
        "llama", config(rope_scaling={"type": "longrope", "short_factor": 1, "long_factor": [1.0]}),
        "rope_scaling.short_factor=1: a list of positive numbers",
    ),
    "kinds of layers": ("gemma3_text", config(layer_types=["x"] * 4), 'layer_types="x": one of full_attention'),
    "layer types": ("gemma3_text", config(num_hidden_layers=3), "4 layer_types for 3 layers"),
    "bitsandbytes": ("llama", config(quantization_config={"quant_method": "bitsandbytes"}), '"bitsandbytes"'),
    "gptq": ("llama", config(quantization_config={"quant_method": "gptq"}), 'quantised checkpoint ."gptq".*dequantise'),
    "quantised somehow": ("llama", config(quantization_config={}), r"quantised checkpoint \(null\)"),
    "int8 weights": (
        "llama",
        weights(lambda w: {k: v.char() if "up_proj" in k else v for k, v in w.items()}),
        "model.layers.0-3.mlp.up_proj.weight as I8: dequantise",
    ),
    "opt with projections": ("opt_proj", lambda folder: None, "word_embed_proj_dim=16 beside hidden_size=32"),
    "opt without a norm": ("opt", config(_remove_final_layer_norm=True), "no final norm: not supported"),
    # weights that are not those of the configuration
    "deeper": ("llama", config(num_hidden_layers=6), r"lack 18 tensors .*: model.layers.4-5.input_layernorm.weight, "),
    "narrower": (
        "llama", config(intermediate_size=32),
        r"model.layers.0-3.mlp.down_proj.weight as \[32, 48\], config.json says \[32, 32\]",
    ),
    "of DDP": (
        "llama", weights(lambda w: {f"module.{k}": v for k, v in w.items()}),
        "lack 39 tensors .*what they hold is called module.lm_head.weight and so on",
    ),
    "without its head": (
        "llama", weights(lambda w: {k.removeprefix("model."): v for k, v in w.items() if k != "lm_head.weight"}),
        "its files lack 1 tensor of the model that config.json describes: lm_head.weight$",
    ),
    "hole in the index": (
        "llama_shards", folders.without_a_tensor_of_its_index,
        "index.json names model.layers.3.mlp.down_proj.weight, which no file holds",
    ),
    "adapter": ("llama", folders.with_an_adapter, r"an adapter \(adapter_config.json, adapter_model.safetensors\)"),
    # weights that are no files
    "weights are a folder": ("llama", replace_by("folder", "model.safetensors"), "model.safetensors is a folder"),
    "weights are a fifo": ("llama", replace_by("fifo", "model.safetensors"), "model.safetensors is not a regular file"),
    "weights are a link": ("llama", replace_by("link", "model.safetensors"), "a link to nowhere, which is not there"),
    "weights are empty": ("llama", replace_by("empty", "model.safetensors"), "model.safetensors is empty"),
    "weights are cut": ("llama", replace_by("truncated", "model.safetensors"), "damaged or incomplete: .* header says"),
    "weights of no texts": ("llama", odd_metadata, "its __metadata__ is no object of texts"),
    "weights have no tensor": ("llama", header_only, "its files lack 39 tensors"),
    "index without a map": ("llama_shards", folders.replace_by("latin-1", "model.safetensors.index.json"), "not UTF-8"),
    "index of nothing": ("llama_shards", lambda f: folders.edit_index(f, weight_map={}), "has no weight_map"),
    "index without metadata": ("llama_shards", lambda f: folders.edit_index(f, metadata=None), "has no metadata"),
    "index elsewhere": (
        "llama_shards", lambda f: folders.edit_index(f, weight_map={"lm_head.weight": "../a.safetensors"}),
        'names "../a.safetensors", which is not the name of a file beside it',
    ),
    "other names": (
        "llama", lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        "no model.safetensors and no model.safetensors.index.json, only consolidated.safetensors",
    ),
    # tokenizer
    "no tokenizer": ("llama", replace_by("nothing", "tokenizer.json"), "it has no tokenizer: none of tokenizer.json"),
    "empty tokenizer": ("llama", replace_by("empty", "tokenizer.json"), "tokenizer.json is empty"),
    "cut tokenizer": ("llama", replace_by("truncated", "tokenizer.json"), "tokenizer.json is not valid JSON"),
    "tokenizer is a list": ("llama", replace_by("list", "tokenizer.json"), r"tokenizer.json is \[1, 2\], not an obj"),
    "no vocabulary": ("llama", lambda f: folders.edit_json(f, "tokenizer.json", model={}), "has no vocabulary"),
    "more tokens": ("llama", folders.with_more_tokens_than_rows, "token ids up to 318, its embedding only 300 rows"),
    "empty settings": ("llama", replace_by("empty", "tokenizer_config.json"), "tokenizer_config.json is empty"),
    "longest text": (
        "llama", lambda f: folders.edit_json(f, "tokenizer_config.json", model_max_length="x"),
        'tokenizer_config.json has model_max_length="x": a positive number, or null, is needed',
    ),
    "eos is a number": (
        "llama", lambda f: folders.edit_json(f, "tokenizer_config.json", eos_token=5),
        "tokenizer_config.json has eos_token=5: a text or an object with a text as its content",
    ),
    "generation": ("llama", replace_by("truncated", "generation_config.json"), "generation_config.json is not valid"),
    "own tokenizer": (
        "llama",
        lambda f: (
            replace_by("nothing", "tokenizer.json")(f),
            folders.edit_json(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
        ),
        "its tokenizer is code of its own, which model.trust_remote_code=true runs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_before_anything_is_loaded(fault, sound_models, tmp_path, monkeypatch):
    base, change, message = FAULTS[fault]
    folders.copy(sound_models[base], tmp_path / "model", change)
    monkeypatch.chdir(tmp_path)
    outcome = run_slm("model=local", "model.path=model")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("error: model.path='model': ")
    assert outcome.err.count("\n") == 1
    assert re.search(message, outcome.err)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing was written


def test_all_that_is_wrong_is_said_at_once(sound_models, tmp_path, monkeypatch):
    folder = folders.copy(sound_models["llama"], tmp_path / "model", folders.with_an_adapter)
    folders.edit_json(folder, hidden_size=None, quantization_config={"quant_method": "awq"})
    for kind, file in (("folder", "model.safetensors"), ("empty", "tokenizer.json")):
        replace_by(kind, file)(folder)
    monkeypatch.chdir(tmp_path)
    outcome = run_slm("model=local", "model.path=model")
    assert outcome.err == (
        "error: model.path='model': config.json has hidden_size=null: an integer from 1 to 2147483647 is needed; it is"
        ' a quantised checkpoint ("awq"), whose layers cannot be merged: dequantise it; model.safetensors is a folder;'
        " tokenizer.json is empty; it holds an adapter (adapter_config.json, adapter_model.safetensors), and only you"
        " know whether it belongs to the weights beside it: merge it into them, or move its files away\n"
    )
    assert outcome.status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing was written


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        ("llama", config(num_hidden_layers=6), "lack 18 tensors of the model .*: model.layers.4-5.input_layernorm"),
        ("llama", config(intermediate_size=32), r"mlp.gate_proj.weight, .* as \[48, 32\], config.json says \[32, 32\]"),
        ("llama_shards", folders.without_a_tensor_of_its_index, "lack 1 tensor of .*layers.3.mlp.down_proj.weight"),
        ("llama", folders.with_an_adapter, "holds an adapter beside the weights"),
        ("llama", weights(lambda w: {**w, "x": torch.zeros(2)} | {"lm_head.weight": torch.zeros(9, 9)}), "lm_head"),
        ("llama", config(rms_norm_eps="small"), "cannot load the [a-z]+ .*/model: [A-Za-z]+Error: "),
        ("llama", config(hidden_act="swiiish"), "cannot load the model .*/model: KeyError: .*swiiish"),
        (
            "llama", weights(lambda w: {k: filled(v, torch.nan) if "norm" in k else v for k, v in w.items()}),
            ": not every value of model.layers.0-3.input_layernorm.weight, .*, model.norm.weight is a finite number",
        ),
        (
            "llama", weights(lambda w: w | {"lm_head.weight": filled(w["lm_head.weight"], -torch.inf)}),
            "/model: not every value of lm_head.weight is a finite number in float32$",
        ),
        ("llama", replace_by("truncated", "model.safetensors"), "cannot load the model .*: SafetensorError: "),
        ("llama", replace_by("nothing", "tokenizer.json"), "cannot load the tokenizer .*/model: "),
        ("llama", lambda f: folders.edit_json(f, "tokenizer.json", model={"type": "?"}), "cannot load the tokenizer"),
        ("llama", folders.with_more_tokens_than_rows, "token ids up to 318, its embedding only 300 rows"),
    ],
)  # fmt: skip
def test_whatever_loading_finds_is_one_line(base, change, message, sound_models, tmp_path):
    folder = folders.copy(sound_models[base], tmp_path / "model", change)
    with pytest.raises(UserError, match=message) as refused:
        load_dense(unchecked(folder))
    assert "\n" not in str(refused.value)


def test_our_own_checkpoints_are_checked_too(sound_models, tmp_path):
    folder = folders.copy(sound_models["llama"], tmp_path / "model", config(num_hidden_layers=5))
    with pytest.raises(UserError, match="lack 9 tensors of the model"):
        load_checkpoint(folder, options(folder))
    replace_by("empty", "tokenizer.json")(folder)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_a_panic_of_the_tokenizers_library_is_one_line(sound_models, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds:\n 3")

    monkeypatch.setattr("slm_pipeline.models.loading.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(UserError, match="cannot load the tokenizer .*: PanicException: index out of bounds: 3$"):
        load_dense_tokenizer(unchecked(sound_models["llama"]))


def test_tensors_that_are_not_used_are_warned_about_and_sound_ones_are_not(sound_models, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name in ("llama", "llama_shards", "gemma3_text", "opt"):  # the heads of the last two are their embeddings
        assert describe(options(sound_models[name])).warnings == ()
        load_dense(describe(options(sound_models[name])))
    assert caplog.messages == []
    folder = folders.copy(sound_models["llama"], tmp_path / "model", weights(lambda w: {**w, "v": torch.ones(1)}))
    load_dense(describe(options(folder)))
    assert caplog.messages == [f"{folder}: the model has no place for 1 tensor of its files, not used: v"]


def test_opt_whose_norms_have_no_weights_and_projections_no_biases_is_sound(tmp_path, input_ids):
    folder = folders.save(
        tmp_path, "opt", enable_bias=False, layer_norm_elementwise_affine=False, max_position_embeddings=48
    )
    source = describe(options(folder))
    assert source.warnings == ()
    model, _ = load_dense(source)
    with torch.no_grad():
        expected = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(BlockRunner(ModelView(model), input_ids).final, expected)


JOB = (
    "method=reverse", "recovery=none", "evaluation=none", "pictures=false", "tracker=jsonl", "hydra.run.dir=run",
    "calibration=text_file", "calibration.path=text.txt", "calibration.num_samples=2", "model.dtype=float32",
    "model.device=cpu",
)  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the river runs past the mill\n" * 50)
    return tmp_path


def test_warnings_reach_the_summary_also_of_a_run_that_reuses(sound_models, here):
    """Two layers too many in the files, and samples longer than the positions that the model is made for."""
    folders.copy(sound_models["llama"], here / "model", config(num_hidden_layers=3, max_position_embeddings=16))
    job = ["model=local", "model.path=model", "calibration.seq_len=24", "pruning_ratio=layers", *JOB]
    texts = [
        "model.path='model': the model has no place for 9 tensors of its files, not used: ",
        "calibration.seq_len=24: local is made for 16 positions; longer texts say little about it",
    ]
    dry = run_slm(*job, "pruning_ratio.num_layers=2", "dry_run=true")
    for _ in range(2):
        outcome = run_slm(*job, "pruning_ratio.num_layers=2")
        assert outcome.status == 0, outcome.err
        warnings = json.loads((here / "run" / "summary.json").read_text())["warnings"]
        for text in texts:
            assert f"warning: {text}" in dry.out
            assert [warning for warning in warnings if warning.startswith(text)]
        shutil.rmtree(here / "run")


def test_the_traceback_of_what_a_library_said_is_in_the_log_file_alone(sound_models, here):
    folders.copy(sound_models["llama"], here / "model", lambda f: folders.edit_json(f, "tokenizer.json", normalizer=5))
    job = ["model=local", "model.path=model", "calibration.seq_len=24", "pruning_ratio=layers", *JOB]
    outcome = run_slm(*job, "pruning_ratio.num_layers=2")
    assert outcome.status == 2
    assert "error: cannot load the tokenizer model: " in outcome.err
    assert "Traceback" not in outcome.err
    log = (here / "run" / "slm.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "tokenization_utils" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibration.seq_len=49"], "calibration.seq_len=49: local has learned 48 positions and none for longer"),
        (
            ["calibration.seq_len=48", "evaluation=perplexity", "evaluation.perplexity.window=64"],
            "evaluation.perplexity.window=64: local has learned 48 positions",
        ),
        (
            ["calibration.seq_len=64", "recovery=lora", "recovery.cutoff_len=50"],
            "calibration.seq_len=64, recovery.cutoff_len=50: local has learned",
        ),
        (
            ["evaluation=efficiency", "evaluation.efficiency.output_len=48"],
            "evaluation.efficiency.output_len=48 after any prompt: the model has 48 positions",
        ),
    ],
)
def test_texts_beyond_the_learned_positions_are_refused(arguments, message, sound_models, here):
    (here / "model").symlink_to(sound_models["opt"])
    job = ["model=local", "model.path=model", "pruning_ratio=layers", "pruning_ratio.num_layers=3", *JOB]
    outcome = run_slm(*job, *arguments, "dry_run=true")
    assert outcome.status == 2
    assert message in outcome.err
    assert run_slm(*job, "calibration.seq_len=48", "dry_run=true").status == 0


def test_special_tokens_that_an_evaluation_needs(sound_models, here):
    folders.copy(sound_models["llama"], here / "model", folders.without_special_tokens)
    job = ["model=local", "model.path=model", "pruning_ratio=layers", "pruning_ratio.num_layers=3", *JOB]
    job += ["dry_run=true", "calibration.seq_len=8"]
    assert run_slm(*job).status == 0
    assert run_slm(*job, "evaluation=perplexity").status == 0
    assert "names neither a BOS nor an EOS token" in run_slm(*job, "evaluation=zero_shot").err
    asked = run_slm(*job, "evaluation=perplexity", "evaluation.perplexity.bos=true")
    assert "evaluation.perplexity.bos=true: the tokenizer of local has no BOS token" in asked.err
    model, tokenizer = load_dense(describe(options(here / "model")))
    assert tokenizer.pad_token is None
    with pytest.raises(
        UserError, match="piqa: the tokenizer has neither a BOS nor an EOS token, and lm-eval needs one"
    ):
        score_task(model, tokenizer, "piqa", data="bundled", limit=1, batch_size=1)


@pytest.mark.parametrize(("base", "decoder"), [("gemma3_text", "model"), ("opt", "model.decoder")])
def test_whether_the_head_is_the_embedding_is_what_the_files_hold(base, decoder, sound_models, tmp_path):
    """Both are described as tied, and saved so."""
    for number, (change, tied) in enumerate([(lambda e: {}, True), (lambda e: {"lm_head.weight": e.clone()}, True),
                                             (lambda e: {"lm_head.weight": e.flip(0)}, False)]):  # fmt: skip
        with_head = weights(lambda w, change=change: {**w, **change(w[f"{decoder}.embed_tokens.weight"])})
        source = describe(options(folders.copy(sound_models[base], tmp_path / str(number), with_head)))
        assert ties_embeddings(source) == tied
        assert ModelView(load_dense(source)[0]).ties_embeddings == tied


def test_an_index_beside_a_single_file_is_said_not_to_be_read(sound_models, tmp_path):
    folder = folders.copy(sound_models["llama"], tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text("{}")
    (warning,) = describe(options(folder)).warnings
    assert warning.endswith("model.safetensors is the whole model: model.safetensors.index.json beside it is not read")


def test_what_transformers_itself_writes_and_knows_is_allowed():
    for name in ARCHITECTURES:
        written = AutoConfig.for_model(name).to_dict()
        assert check_description({**written, "rope_scaling": None, "sliding_window": None}) == []
    assert set(ACTIVATIONS) == set(ACT2CLS)
    assert set(ROPE_TYPES) == {"default", "su", *ROPE_INIT_FUNCTIONS}


def test_names_of_tensors_in_short():
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (9, 1, 2, 3)]
    assert (
        fault_words.tensor_names([*names, "lm_head.weight"]) == "model.layers.1-3,9.mlp.up_proj.weight, lm_head.weight"
    )
    assert fault_words.tensor_names([f"a{n}" for n in range(14)]).endswith("a11 and 2 more")


def test_blocks_of_a_large_tensor_are_evenly_spaced_up_to_its_end():
    size = model_folder.BLOCK_BYTES
    assert model_folder._blocks(100, 100) == [(0, 100)]
    assert model_folder._blocks(10 * size + 7, 3 * size) == [(0, size), (9 * size // 2 + 3, size), (9 * size + 7, size)]
    assert model_folder._blocks(1000, 10) == [(0, 10)]


# What a mutation puts into config.json, and in place of other files.
values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.lists(st.integers(0, 9), max_size=4), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
         "model.safetensors.index.json", "special_tokens_map.json", "merges.txt", "chat_template.jinja")  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, str, object]:
    kind = draw(st.sampled_from(["value", "value", "bytes", "cut", "flip", "folder", "fifo", "link", "nothing"]))
    file = draw(st.sampled_from(FILES))
    if kind == "value":
        return kind, draw(st.sampled_from(FILES[:6])), (draw(st.integers(0, 40)), draw(values))
    if kind == "bytes":
        return kind, file, draw(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
    return kind, file, draw(st.floats(0, 1, exclude_max=True)) if kind in ("cut", "flip") else None


def mutate(folder: Path, kind: str, file: str, how: object) -> None:
    path = folder / file
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if kind == "value":
        where, value = how
        try:
            settings = json.loads(content)
            name = sorted(settings)[where % len(settings)]
            content = json.dumps({**settings, name: value}).encode()
        except (ValueError, TypeError, ZeroDivisionError, RecursionError):  # not an object with keys, by now
            content = json.dumps(value).encode()
    elif kind == "bytes":
        content = how
    elif kind == "cut":
        content = content[: int(how * len(content))]
    elif kind == "flip" and content:
        at = int(how * min(len(content), 4000))  # in the header, of weights
        content = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    elif kind == "folder":
        return path.mkdir()
    elif kind == "fifo":
        return os.mkfifo(path)
    elif kind == "link":
        return path.symlink_to("nowhere")
    elif kind == "nothing":
        return None
    path.write_bytes(content)
    return None


def mutated(sound_models, tmp_path, base, changes) -> Path:
    target = tmp_path / "mutated"
    shutil.rmtree(target, ignore_errors=True)
    folders.copy(sound_models[base], target)
    for change in changes:
        mutate(target, *change)
    return target


bases = st.sampled_from(["llama", "llama_shards", "gemma3_text", "opt"])


def refusal(function, *arguments) -> str:
    """What a user's error says; empty if there is none."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


@given(base=bases, changes=st.lists(mutations(), min_size=1, max_size=3))
def test_whatever_is_in_a_folder_it_is_described_or_refused(base, changes, sound_models, tmp_path):
    said = refusal(describe, options(mutated(sound_models, tmp_path, base, changes)))
    assert said == "" or said.startswith("model.path=")
    assert "\n" not in said


@given(base=bases, changes=st.lists(mutations(), min_size=1, max_size=1))
def test_what_passes_is_loaded_or_refused_in_one_line(base, changes, sound_models, tmp_path):
    config = options(mutated(sound_models, tmp_path, base, changes))
    assert "\n" not in refusal(lambda: load_dense(describe(config)))
