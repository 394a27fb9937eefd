"""Which learning rate a recovery has where none was asked for."""

from __future__ import annotations

import pytest

from slm_pipeline.jobs.command_line import compose_job
from slm_pipeline.models.description import num_parameters
from slm_pipeline.recovery.fine_tuning import LARGE
from slm_pipeline.recovery.lora import Lora

LLAMA_2 = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008,
}  # fmt: skip
GROUPED = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536}
SMOLLM2 = {**LLAMA_2, **GROUPED, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True}
OPT = {
    "model_type": "opt", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 50272, "num_attention_heads": 32,
    "ffn_dim": 16384, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
PHI_3 = {
    "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "vocab_size": 32064, "num_attention_heads": 32,
    "intermediate_size": 8192,
}  # fmt: skip
GEMMA_3 = {  # of 1B
    "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "vocab_size": 262144,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 6912,
}  # fmt: skip


@pytest.mark.parametrize(
    ("description", "missing", "whole"),
    [
        (LLAMA_2, 0, 6_738_415_616),
        (SMOLLM2, 0, 134_515_008),
        # two positions, biases of the norms and of the projections
        (OPT, 2 * 4096 + 65 * 4096 + 32 * (5 * 4096 + 16384), 6_658_473_984),
        (PHI_3, 0, 3_821_079_552),  # gate and up are one matrix
        # its head is the embedding, which its config.json leaves to the class; two more norms a layer, and those of
        # queries and keys
        (GEMMA_3, 26 * 2 * (1152 + 256), 999_885_952),
    ],
)
def test_a_models_size_is_that_of_its_weights(description, missing, whole):
    assert num_parameters(description) + missing == whole
    assert num_parameters({**description, "hidden_size": None}) is None


@pytest.mark.parametrize(("size", "rate"), [(LARGE - 1, 2e-3), (LARGE, 1e-4), (None, 1e-4)])
def test_below_a_billion_it_is_ours_and_from_there_the_published_one(size, rate):
    recovery = Lora()
    assert recovery.peak_learning_rate == 2e-3
    recovery.choose_learning_rate(size)
    assert recovery.learning_rate == recovery.peak_learning_rate == rate
    recovery.choose_learning_rate(1)  # what is settled stays
    assert recovery.learning_rate == rate
    given = Lora(learning_rate=3e-3)
    given.choose_learning_rate(size)
    assert given.peak_learning_rate == 3e-3


@pytest.mark.parametrize(
    ("recovery", "small", "large"),
    [
        ("lora", 2e-3, 1e-4), ("partial_layers", 2e-3, 1e-5), ("full", 5e-4, 2e-5), ("distill", 2e-3, 2e-4),
        ("block_mse", 2e-3, 2e-4),
    ],
)  # fmt: skip
def test_a_job_has_the_learning_rate_of_its_models_size_in_its_key(recovery, small, large):
    words = ["model=random", "evaluation=none", f"recovery={recovery}"]
    for sizes, rate in (
        ([], small),
        (["model.hidden_size=2048", "model.vocab_size=500000", "model.num_heads=4"], large),
    ):
        job = compose_job(["slm"], [*words, *sizes])
        assert job.identities["recovery"]["options"]["learning_rate"] == rate
