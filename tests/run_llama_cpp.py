"""llama.cpp itself, through xllamacpp: what it says of a GGUF file is what people get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoConfig, AutoModelForCausalLM


class LlamaCpp:
    """A GGUF file run by llama.cpp on one thread."""

    def __init__(self, file: Path, context: int = 512):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.warmup = False
        parameters.fit_params = False
        parameters.verbosity = 0
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # else float16
        self.server = xllamacpp.Server(parameters)

    def greedy(self, prompt: str, num_tokens: int) -> str:
        """The text that it goes on with."""
        return self._complete(prompt=prompt, n_predict=num_tokens)["text"]

    def log_probs(self, prompt: str | list[int], vocabulary: int) -> torch.Tensor:
        """Natural logarithms of the next token's probabilities: [vocabulary]."""
        a_letter = [["a", 1000]]  # chosen after the probabilities were noted: others may be no whole character
        choice = self._complete(prompt=prompt, n_predict=1, n_probs=vocabulary, logit_bias=a_letter)
        found = torch.full((vocabulary,), float("nan"))
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        assert not found.isnan().any()
        assert abs(float(found.double().logsumexp(-1))) < 1e-3  # llama.cpp adds them up in float32
        return found.double().log_softmax(-1).float()

    def _complete(self, **request: Any) -> dict[str, Any]:
        answer = self.server.handle_completions({"temperature": 0, "cache_prompt": False, **request})
        assert "choices" in answer, answer
        return answer["choices"][0]


def make_model(architecture: str, **settings: Any) -> Any:
    """6 layers, hidden size 32, 4 heads on 2; every weight is a float16 number, and positions show in the logits."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    if architecture != "gpt_neox":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(architecture, **{**sizes, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
            parameter.copy_(parameter.half().float())
    return model
