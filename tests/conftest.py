"""Shared by all tests: small random models of every supported architecture, and ``slm`` as a function."""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import hypothesis
import model_folders
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slm_pipeline.cli import main
from slm_pipeline.config import Config, ModelConfig
from slm_pipeline.models.architectures import ARCHITECTURES
from slm_pipeline.models.context import Context
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.source import ModelSource, describe
from slm_pipeline.models.view import ModelView

torch.set_num_threads(1)

# Property tests: the same few examples each time; SLM_TEST_EXAMPLES=20000 draws that many new ones. None may hang.
_examples = os.environ.get("SLM_TEST_EXAMPLES")
hypothesis.settings.register_profile(
    "slm",
    max_examples=int(_examples or 25),
    derandomize=_examples is None,
    deadline=timedelta(seconds=10),
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("slm")


def pytest_collection_finish() -> None:
    """What is imported by now stays: `gc.collect`, which each job calls ten times, would look half a second at it."""
    gc.collect()
    gc.freeze()


def random_source(architecture: str = "llama", num_layers: int = 6, **sizes: int) -> ModelSource:
    """A model of random weights: hidden size 32, 4 query heads on 2 key-value heads, unless said otherwise."""
    defaults = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 300, "num_heads": 4, "num_kv_heads": 2}
    sizes = {**defaults, "seed": 1234, **sizes}
    config = ModelConfig(
        name="random",
        source="random",
        architecture=architecture,
        num_layers=num_layers,
        dtype="float32",
        device="cpu",
        **sizes,
    )
    return describe(config)


def context_of(source: ModelSource) -> Context:
    """A job on this model, with the schema's defaults."""
    return Context(Config(), source, "slm")


@pytest.fixture
def tiny_llama():
    """(model, tokenizer): a 6-layer random Llama and a byte tokenizer."""
    return load_dense(random_source())


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


HEAD_DIM = 12  # of `peculiar_model`, and not 32 / 4 = 8
WINDOW = 5  # of its sliding layers, and less than the 12 tokens of ``input_ids``
_TWO_KINDS = {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2}
_PECULIARITIES = {
    **dict.fromkeys(("llama", "gemma", "olmo2"), {"head_dim": HEAD_DIM}),
    **dict.fromkeys(("mistral", "phi3"), {"head_dim": HEAD_DIM, "sliding_window": WINDOW}),  # every layer slides
    **dict.fromkeys(("qwen2", "qwen3"), {"head_dim": HEAD_DIM, "use_sliding_window": True, **_TWO_KINDS}),
    **dict.fromkeys(("gemma2", "gemma3_text"), {"head_dim": HEAD_DIM, **_TWO_KINDS}),
}


def peculiar_model(architecture: str, num_layers: int = 6, **sizes: int) -> Any:
    """The model of `random_source`, as its architecture may be but seldom is in small.

    Its heads are wider than hidden size / heads, its layers differ in kind and those that slide see less than the
    text, as far as the architecture knows such things; norms and biases are not 1 and 0; queries and keys are large
    enough for attention to differ from a plain mean.
    """
    model, _ = load_dense(random_source(architecture, num_layers, **sizes))
    description = {**model.config.to_dict(), **_PECULIARITIES.get(architecture, {})}
    if description.get("layer_types"):
        description["layer_types"] = description["layer_types"][:num_layers]
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**description), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    view = ModelView(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for layer in view.layers:
            for name in view.architecture.attention_inputs:
                layer.get_submodule(name).weight.mul_(5)
    return model


@pytest.fixture
def any_model(architecture: str):
    """A 6-layer `peculiar_model` of each supported architecture."""
    return peculiar_model(architecture)


@pytest.fixture(scope="session")
def sound_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole model folders, by name, see model_folders.py. Not to be changed: `model_folders.copy` makes a copy."""
    return model_folders.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def input_ids() -> torch.Tensor:
    """[3, 12] token ids."""
    return torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


def run_slm(*arguments: str) -> Outcome:
    """``slm arguments`` in this process: a new one would spend seconds on imports."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out, err = io.StringIO(), io.StringIO()
    status = 0
    try:
        with mock.patch.object(sys, "argv", ["slm", *arguments]), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        for handler in set(root.handlers) - set(handlers):  # those of Hydra write to the run's log file
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
    return Outcome(status, out.getvalue(), err.getvalue())
