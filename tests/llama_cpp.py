"""llama.cpp itself, through xllamacpp: what it says of a GGUF file is what people get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xllamacpp


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
        return found

    def _complete(self, **request: Any) -> dict[str, Any]:
        answer = self.server.handle_completions({"temperature": 0, "cache_prompt": False, **request})
        assert "choices" in answer, answer
        return answer["choices"][0]
