"""A model is spread block after block: at no time are two of them out of their files and whole."""

from __future__ import annotations

import pytest
import torch
from recovery.conftest import teacher
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from slm_pipeline.config import ModelConfig
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import byte_tokenizer, load_mapped
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery import sharding

FOUR = 4  # processes, of which this is the first and the only one that there is


@pytest.fixture
def four_processes():
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=FOUR)
    yield
    distributed.destroy_process_group()


def test_a_model_for_the_processor_stays_there_beside_a_gpu(tmp_path, monkeypatch):
    config = ModelConfig(dtype="float32", device="cpu")
    checkpoint.save(teacher(), byte_tokenizer(), tmp_path / "model", card="", config=config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert load_mapped(tmp_path / "model", config).device.type == "cpu"


def test_one_block_at_a_time_is_whole_and_each_process_keeps_its_part(tmp_path, four_processes):
    config = ModelConfig(dtype="float32", device="cpu")
    checkpoint.save(teacher(), byte_tokenizer(), tmp_path / "model", card="", config=config)
    model = load_mapped(tmp_path / "model", config)
    layers = ModelView(model).layers
    mapped = [[parameter.data_ptr() for parameter in layer.parameters()] for layer in layers]
    seen = []

    def prepare(module):
        spread = [all(isinstance(parameter, DTensor) for parameter in layer.parameters()) for layer in layers]
        number = next((number for number, layer in enumerate(layers) if layer is module), len(layers))
        assert spread == [index < number for index in range(len(layers))]
        for layer, places in zip(layers[number + 1 :], mapped[number + 1 :], strict=True):
            assert [parameter.data_ptr() for parameter in layer.parameters()] == places
        seen.append(number)

    sharding.shard(model, layers, prepare, torch.float32)
    assert seen == [*range(len(layers) + 1)]
    parts = {name: parameter.to_local().numel() for name, parameter in model.named_parameters()}
    whole = {name: parameter.numel() for name, parameter in teacher().named_parameters()}
    assert parts == {name: number // FOUR for name, number in whole.items()}
