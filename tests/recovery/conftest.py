"""Tiny Llamas, examples of one easy rule, a plan that merges and drops layers, and a LoRA training to compare with."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from conftest import peculiar_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slm_pipeline.models.loading import byte_tokenizer
from slm_pipeline.recovery.base import RecoveryProblem
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

BUDGET = {
    "source": "file",
    "path": "alpaca.json",
    "validation_size": 6,
    "max_steps": 6,
    "num_epochs": 9.0,
    "batch_size": 4,
    "micro_batch_size": 2,
    "warmup_steps": 1,
    "cutoff_len": 220,
    "eval_steps": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "dtype": "float32",
}


def make_plan(num_layers=6, **decision):
    model = {"name": "tiny", "fingerprint": "x", "num_layers": num_layers}
    return Plan(model=model, method="test", options={}, calibration={}, **{"ops": [], **decision})


MERGED = make_plan(ops=[Merge((1, 2), "mean"), Drop((4,))])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with alpaca.json: 26 examples."""
    folder = tmp_path_factory.mktemp("data")
    letters = random.Random(0).sample("abcdefghijklmnopqrstuvwxyz", 26)
    rows = [
        {"instruction": "Repeat.", "input": letter, "output": letter * (3 + row % 4)}
        for row, letter in enumerate(letters)
    ]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return folder


def teacher(architecture="llama", tied=False):
    """Six layers with weights large enough that layers differ in what they do."""
    if architecture == "llama":
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=tied,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    return peculiar_model(architecture)


def problem(data, out, plan=MERGED, log=lambda metrics, step: None, seed=1234, architecture="llama", **options):
    """The pruned model of ``plan`` as a recovery gets it."""
    out.mkdir(parents=True, exist_ok=True)
    return RecoveryProblem(
        teacher=lambda: teacher(architecture, **options),
        model=apply(plan, teacher(architecture, **options)),
        tokenizer=byte_tokenizer(),
        plan=plan,
        out=out,
        base_path="base",
        seed=seed,
        data_dir=data,
        log=log,
    )


WHOLE = make_plan(num_layers=4)
LORA_OPTIONS = {
    "source": "file",
    "path": "alpaca.json",
    "validation_size": 6,
    "rank": 4,
    "learning_rate": 1e-2,
    "max_steps": 10,
    "num_epochs": 9.0,
    "batch_size": 4,
    "micro_batch_size": 2,
    "warmup_steps": 2,
    "cutoff_len": 220,
    "eval_steps": 3,
    "save_steps": 4,
    "logging_steps": 3,
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def folder(data, tmp_path_factory):
    """A tiny Llama with a byte tokenizer in model/, and 26 examples of one easy rule in alpaca.json."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("recovery")
    byte_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=256, bos_token_id=257, eos_token_id=258, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    shutil.copy(data / "alpaca.json", folder)
    return folder


def run_lora(folder, out, log=lambda metrics, step: None, model=None, seed=1234, plan=None, **changes):
    """LoRA on the whole model in ``folder``."""
    out.mkdir(parents=True, exist_ok=True)
    problem = RecoveryProblem(
        teacher=None,
        model=model or AutoModelForCausalLM.from_pretrained(folder / "model"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        plan=plan or WHOLE,
        out=out,
        base_path=str(folder / "model"),
        seed=seed,
        data_dir=folder,
        log=log,
    )
    return Lora(**{**LORA_OPTIONS, **changes}).run(problem)


@pytest.fixture(scope="session")
def undisturbed(folder):
    """Its result, and what was logged."""
    logged = []
    result = run_lora(folder, folder / "undisturbed", log=lambda metrics, step: logged.append((step, metrics)))
    return result, logged
