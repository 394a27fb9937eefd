"""What stands in a GGUF file, read back with the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from conftest import peculiar_model, random_source

from slm_pipeline.export import gguf_file
from slm_pipeline.models.loading import byte_tokenizer, load_dense


def read(file) -> tuple[dict[str, np.ndarray], dict[str, str], gguf.GGUFReader]:
    """Values and types of all tensors, and the reader."""
    reader = gguf.GGUFReader(file)
    values = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return values, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}, reader


def field(reader: gguf.GGUFReader, key: str):
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


def test_every_tensor_of_a_llama_is_there_with_its_pairs_side_by_side(tmp_path):
    model = peculiar_model("llama", num_layers=2).half().float()
    assert gguf_file.write(model, byte_tokenizer(), tmp_path / "x.gguf", "f16", name="a name", licence="mit") == []
    values, types, reader = read(tmp_path / "x.gguf")
    state = model.state_dict()
    assert len(values) == len(state)
    np.testing.assert_array_equal(values["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"])
    np.testing.assert_array_equal(values["blk.0.attn_v.weight"], state["model.layers.0.self_attn.v_proj.weight"])
    np.testing.assert_array_equal(values["output.weight"], state["lm_head.weight"])
    for name, child, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        rows = state[f"model.layers.1.self_attn.{child}.weight"].numpy()
        found = values[f"blk.1.{name}.weight"]
        for head in range(heads):
            for pair in range(6):  # of heads 12 wide
                np.testing.assert_array_equal(found[12 * head + 2 * pair], rows[12 * head + pair])
                np.testing.assert_array_equal(found[12 * head + 2 * pair + 1], rows[12 * head + 6 + pair])
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert {types[name] for name in types if "norm" not in name} == {"F16"}
    assert field(reader, "general.name") == "a name"
    assert field(reader, "general.license") == "mit"
    assert field(reader, "llama.attention.key_length") == 12
    assert field(reader, "llama.attention.head_count_kv") == 2
    assert field(reader, "llama.block_count") == 2
    assert len(field(reader, "tokenizer.ggml.tokens")) == 300


def test_gains_of_gemma_are_one_more(tmp_path):
    model = peculiar_model("gemma", num_layers=1)
    gguf_file.write(model, byte_tokenizer(), tmp_path / "x.gguf", "f16")
    values, _, _ = read(tmp_path / "x.gguf")
    assert "output.weight" not in values
    np.testing.assert_array_equal(values["output_norm.weight"], model.state_dict()["model.norm.weight"].numpy() + 1)


@pytest.mark.parametrize(
    ("kind", "inside", "outside", "error"), [("q8_0", "Q8_0", "Q8_0", 1 / 254), ("q4_0", "Q4_0", "Q8_0", 1 / 8)]
)
def test_quantised_values_are_within_half_a_step(kind, inside, outside, error, tmp_path):
    """A step is the block's largest number over 127 or 8; rows of 48 neurons are not whole blocks of 32."""
    model, tokenizer = load_dense(random_source(num_layers=1))
    said = gguf_file.write(model, tokenizer, tmp_path / "x.gguf", kind)
    values, types, _ = read(tmp_path / "x.gguf")
    assert said == ["blk.0.ffn_down.weight is f16: its rows have 48 numbers, no multiple of 32"]
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == inside
    assert types["token_embd.weight"] == types["output.weight"] == outside
    exact = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    largest = np.abs(exact).max(axis=1, keepdims=True)  # rows are one block
    difference = np.abs(values["blk.0.ffn_up.weight"] - exact)
    assert (difference <= (error + 2**-11) * largest).all()  # the step itself is a float16 number
    assert difference.max() > 0


def test_a_number_beyond_float16_keeps_its_matrix_in_float32(tmp_path):
    model, tokenizer = load_dense(random_source(num_layers=1))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    assert gguf_file.write(model, tokenizer, tmp_path / "x.gguf", "f16") == [
        "blk.0.ffn_up.weight is f32: float16 does not hold its 1e+05"
    ]
    values, types, _ = read(tmp_path / "x.gguf")
    assert types["blk.0.ffn_up.weight"] == "F32"
    assert values["blk.0.ffn_up.weight"][0, 0] == np.float32(1e5)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space")

    model, tokenizer = load_dense(random_source(num_layers=1))
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="no space"):
        gguf_file.write(model, tokenizer, tmp_path / "x.gguf", "f16")
    assert list(tmp_path.iterdir()) == []
