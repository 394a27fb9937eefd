"""SmolLM2 in llama.cpp, dense and pruned: the same text, and how far quantised files are from the model."""

from __future__ import annotations

import copy

import gguf
import pytest
import torch
from run_llama_cpp import LlamaCpp

from slm_pipeline.config import ModelConfig
from slm_pipeline.export import gguf_file
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.source import describe
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
]
# KL in nats a token, at most, to transformers with the values that the file holds; llama.cpp multiplies quantised
# weights by states that it quantises to 8 bits, which SmolLM2's massive activations do not like.
KL = {"f16": 1e-4, "q8_0": 0.05, "q4_0": 0.1}


@pytest.fixture(scope="module")
def dense():
    return load_dense(describe(ModelConfig(name="smollm2_135m", source="bundled", dtype="float32", device="cpu")))


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]


def greedy(model, tokenizer, prompt: str, num_tokens: int) -> str:
    ids = tokenizer(prompt)["input_ids"]
    made = model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False)[0, len(ids) :]
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.real
@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_smollm2_goes_on_with_the_same_text(which, dense, tmp_path, capsys):
    model, tokenizer = dense
    if which == "pruned":
        named = {"name": "smollm2_135m", "fingerprint": "x", "num_layers": 30}
        drops = [Drop((layer,)) for layer in (24, 20)]
        model = apply(Plan(model=named, method="test", options={}, calibration=None, ops=drops), copy.deepcopy(model))
    expected = [logits(model, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    for kind in ("f16", "q8_0", "q4_0") if which == "dense" else ("f16", "q4_0"):
        gguf_file.write(model, tokenizer, tmp_path / "x.gguf", kind)
        run = LlamaCpp(tmp_path / "x.gguf")
        if kind == "f16":
            for prompt in PROMPTS:
                assert run.greedy(prompt, 12) == greedy(model, tokenizer, prompt, 12)
        found = [run.log_probs(prompt, model.config.vocab_size) for prompt in PROMPTS]
        in_file = copy.deepcopy(model)
        if kind != "f16":
            round_as(kind, in_file)
        rounded = [logits(in_file, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
        with capsys.disabled():
            print(f"\n{which} {kind}: KL to transformers {mean_kl(expected, found):.1e} nats a token", end="")
        assert 0 <= mean_kl(rounded, found) < KL[kind]


def mean_kl(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    pairs = [(e.log_softmax(-1), f.log_softmax(-1)) for e, f in zip(expected, found, strict=True)]
    return sum(float((e.exp() * (e - f)).sum()) for e, f in pairs) / len(pairs)


@torch.no_grad()
def round_as(kind: str, model) -> None:
    """Give the matrices the values that they have in a file of this type."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            to = gguf.GGMLQuantizationType["Q8_0" if "embed_tokens" in name else kind.upper()]
            rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), to), to)
            parameter.copy_(torch.from_numpy(rounded))
