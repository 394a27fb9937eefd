"""Models whose blocks stay on disk decide, and become, what they do in memory, with two blocks there at a time."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import peculiar_model, run_slm
from problems import problem_of
from repairs import refit, rescale
from safetensors.torch import load_file, save_file

from slm_pipeline.config import ModelConfig
from slm_pipeline.config.groups import options_with
from slm_pipeline.engine import blocks
from slm_pipeline.engine.statistics import collect
from slm_pipeline.engine.walk import Removal, RemovalWalk
from slm_pipeline.engine.windows import StackSimilarity
from slm_pipeline.errors import UserError
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import byte_tokenizer, load_dense
from slm_pipeline.models.source import ModelSource, describe
from slm_pipeline.models.view import ModelView
from slm_pipeline.repair.base import RepairProblem
from slm_pipeline.store import unfinished
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

TEXT = torch.randint(0, 256, (9, 12), generator=torch.Generator().manual_seed(2))


def saved(folder: Path, architecture: str = "llama") -> Path:
    peculiar_model(architecture).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def source_of(folder: Path, device: str = "stream", dtype: str = "float32") -> ModelSource:
    return describe(ModelConfig(name="m", source="local", path=str(folder), dtype=dtype, device=device))


def views(folder: Path) -> tuple[ModelView, ModelView]:
    """The model in memory, and streamed."""
    return ModelView(load_dense(source_of(folder, "cpu"))[0]), ModelView(load_dense(source_of(folder))[0])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"))


def reads(view, monkeypatch):
    """Layers that are read, in order, from now on."""
    found, start = [], view.stream._start
    monkeypatch.setattr(view.stream, "_start", lambda b: (found.append(view.stream.blocks.index(b)), start(b))[1])
    return found


def test_statistics_walks_and_windows_are_those_in_memory(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr("slm_pipeline.engine.statistics.MAX_BATCH_TOKENS", 36)  # three batches
    in_memory, streamed = views(saved(tmp_path, architecture))
    assert torch.equal(in_memory.model(TEXT).logits, streamed.model(TEXT).logits)
    first, second = (vars(collect(view, TEXT)) for view in (in_memory, streamed))
    for name, values in first.items():
        for one, other in zip(values, second[name], strict=True):
            assert torch.equal(one, other), name
    candidates = [Removal(layer) for layer in range(1, 5)] + [Removal(2, "attention")]
    rounds = [list(RemovalWalk(view, TEXT).greedily(candidates, 2)) for view in (in_memory, streamed)]
    assert rounds[0] == rounds[1]
    similarities = [
        StackSimilarity(view, TEXT, "mean", "final_hidden")((2, (3, 4), 5)) for view in (in_memory, streamed)
    ]
    assert similarities[0] == similarities[1]


def test_all_text_goes_through_a_block_before_the_next_is_read(llama, monkeypatch):
    monkeypatch.setattr("slm_pipeline.engine.statistics.MAX_BATCH_TOKENS", 12)  # nine batches
    _, view = views(llama)
    found = reads(view, monkeypatch)
    collect(view, TEXT)
    assert found == [0, 1, 2, 3, 4, 5]
    walk = RemovalWalk(view, TEXT)
    del found[:]
    walk.losses([Removal(layer) for layer in range(1, 5)])
    assert sorted(found) == [2, 3, 4, 5]  # the lowest candidate leaves what enters layer 1 to layer 2
    monkeypatch.setattr(blocks, "STREAMED_BYTES", 3 * 12 * 7 * 32 * 4)  # of three samples' states
    view.rest()
    del found[:]
    collect(view, TEXT)
    assert found == [0, 1, 2, 3, 4, 5] * 3


def test_two_blocks_are_in_memory_at_a_time(llama, monkeypatch):
    _, view = views(llama)
    start, seen = view.stream._start, []

    def there():
        mapped = view.stream._files._places
        return [i for i, b in enumerate(view.stream.blocks) if any(p.data_ptr() not in mapped for p in b.parameters())]

    def watched(block):
        seen.append((there(), view.stream.blocks.index(block)))  # those there, and the one that is begun beside them
        return start(block)

    monkeypatch.setattr(view.stream, "_start", watched)
    collect(view, TEXT)
    assert seen == [([], 0), ([0], 1), ([1], 2), ([2], 3), ([3], 4), ([4], 5)]
    assert there() == [5]
    view.rest()
    assert there() == []


@pytest.mark.parametrize("name", sorted({*options_with("method", "streams")} - {"none", "from_plan"}))
def test_every_method_that_streams_decides_the_same(name, llama):
    from methods.test_every_method import method_of

    in_memory, streamed = views(llama)
    statistics = collect(in_memory, TEXT)
    plans = [
        method_of(name).plan(problem_of(view.model, source_of(llama), TEXT, num_remove=1, statistics=statistics))
        for view in (in_memory, streamed)
    ]
    assert plans[0].content() == plans[1].content()
    assert plans[0].ops


PLANS = {
    "drop": [Drop((2, 3))],
    "mean": [Merge((1, 2, 3), "mean")],
    "zeroed": [DropSublayer((2,), "attention", "stock")],
    "absent": [DropSublayer((2,), "mlp", "custom")],
}


@pytest.mark.parametrize("ops", PLANS.values(), ids=PLANS)
def test_the_checkpoint_is_that_of_the_model_in_memory(ops, llama, tmp_path):
    plan = Plan({"name": "m", "fingerprint": "f", "num_layers": 6}, "test", {}, None, ops)
    plan.check("the plan")
    weights = []
    for device in ("cpu", "stream"):
        model, tokenizer = load_dense(source_of(llama, device))
        ModelView(model).model(TEXT)  # a block is there when the plan is applied
        reloaded = checkpoint.save(
            apply(plan, model), tokenizer, tmp_path / device, card="", config=source_of(llama, device).config
        )
        assert (ModelView(reloaded).stream is not None) == (device == "stream")
        weights.append(load_file(tmp_path / device / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    configs = [json.loads((tmp_path / device / "config.json").read_text()) for device in ("cpu", "stream")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("ops", [
    [Drop((2,))], [Resize((layer,), f"r.{layer}", neurons=20) for layer in range(6)],
])  # fmt: skip
def test_every_repair_makes_of_it_what_it_makes_of_the_model_in_memory(ops, llama, tmp_path):
    about = {"name": "m", "fingerprint": "f", "num_layers": 6}
    tensors = {f"{op.tensors}.neurons": np.arange(20) for op in ops if isinstance(op, Resize)}
    plan = Plan(about, "test", {}, None, ops, tensors=tensors)
    for repair in (refit(reads=[1.0], weighting="either", shares=[0.5]), rescale()):
        found = []
        for view, name in zip(views(llama), ("memory", "stream"), strict=True):
            out = tmp_path / repair.name / name
            out.mkdir(parents=True)
            note = functools.partial(unfinished.note_complete, out)
            found.append(repair.repair(RepairProblem(view, plan, TEXT, out, note)))
        assert found[0].ops == found[1].ops
        assert found[0].scores == found[1].scores
        assert len(found[0].ops) > len(ops) or repair.name == "rescale"
        for name, expected in found[0].tensors.items():
            assert np.array_equal(found[1].tensors[name], expected), name


def test_gains_of_norms_are_where_blocks_run_whichever_is_there(tmp_path):
    _, view = views(saved(tmp_path, "gemma2"))
    view.stream.device = torch.device("meta")  # in the place of a GPU
    assert view.output_norm(1, "mlp")[1].device == view.device_of(1)


def test_a_damaged_weight_is_named_when_its_block_is_read(tmp_path):
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    view = ModelView(load_dense(source_of(folder))[0])
    with pytest.raises(UserError, match=r"not every value of model.layers.3.mlp.up_proj.weight is a finite number"):
        view.model(TEXT)


def test_weights_of_another_type_are_refused_before_they_are_read(llama):
    with pytest.raises(
        UserError, match=r"stored, float32; model.dtype=bfloat16 is another type: use model.dtype=float32"
    ):
        source_of(llama, dtype="bfloat16")
    bundled = ModelConfig(name="smollm2_135m", source="bundled", dtype="float16", device="stream")
    with pytest.raises(UserError, match="those of bundled models in float32; use"):
        describe(bundled)
    with pytest.raises(UserError, match="model.device=stream reads stored weights layer by layer; random ones"):
        describe(dataclasses.replace(bundled, source="random", **SIZES))


SIZES = {
    "architecture": "llama", "num_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2,
    "num_kv_heads": 2, "vocab_size": 300, "seed": 1,
}  # fmt: skip


def test_a_job_streams_what_it_can_and_another_device_goes_on(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    (tmp_path / "text.txt").write_text("The river runs past the mill and the tree.\n" * 20)
    words = [
        "model=local", f"model.path={llama}", "model.dtype=float32", "calibration=text_file",
        f"calibration.path={tmp_path}/text.txt", "calibration.num_samples=2", "calibration.seq_len=16", "tracker=jsonl",
        f"output_dir={tmp_path}/out", "recovery=none",
    ]  # fmt: skip
    for more, message in (
        ([], "cannot evaluate, which go through the whole model again and again; use stages=[calibrate,merge,repair"),
        (["evaluation=none", "method=shortened_taylor"], "method=shortened_taylor does not work layer by layer, as"),
        (["evaluation=none", "method=flap", "method.allocation=sensitivity"], "once for each sublayer, which model.de"),
        (["evaluation=none", "method=reverse", "pruning_ratio=latency", "pruning_ratio.speedup=1.3"],
         "pruning_ratio.of=latency times models that are whole in memory, which model.device=stream has not"),
    ):  # fmt: skip
        outcome = run_slm(*words, "model.device=stream", *more)
        assert outcome.status == 2
        assert message in outcome.err
    outcome = run_slm(*words, "evaluation=none", "model.device=stream")
    assert outcome.status == 0, outcome.err
    lines = run_slm(*words, "evaluation=none", "model.device=cpu", "dry_run=true").out.splitlines()
    assert [line.split()[:2] for line in lines] == [["calibrate", "reuse"], ["merge", "reuse"]]
