"""What stages take in memory is the sum of what lies there, and what would fit is the smallest change that does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import run_slm

from slm_pipeline.jobs import needs
from slm_pipeline.jobs.command_line import compose_job
from slm_pipeline.jobs.steps import steps
from slm_pipeline.machine import ranks
from slm_pipeline.machine.ranks import Launched
from slm_pipeline.models.sizes import Sizes
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery.distill import Distill
from slm_pipeline.recovery.full import Full
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.recovery.partial_layers import PartialLayers

# 4 layers of 32 wide in float32, 40 neurons, 2 of 4 heads for keys; 512 tokens; 8 samples of 16 tokens.
SMALL = Sizes(
    layers=4, hidden=32, neurons=40, vocabulary=512, queries=32, keys=16, inputs=2, is_tied=False, item_bytes=4,
    num_samples=8, seq_len=16,
)  # fmt: skip
BLOCK = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 40 + 2 * 32


def test_parameters_are_those_of_the_model(any_model):
    found = Sizes.of(any_model.config.to_dict(), "float32", num_samples=1, seq_len=1)
    assert found.parameters == pytest.approx(ModelView(any_model).num_parameters(), rel=0.05)  # biases and q/k norms


def test_weights_of_a_model_that_streams_are_two_blocks_and_what_is_outside():
    outside = 2 * 512 * 32 + 32
    assert SMALL.weights == 4 * (4 * BLOCK + outside)
    assert Sizes(**{**vars(SMALL), "streams": True}).weights == 4 * (2 * BLOCK + outside)
    assert Sizes(**{**vars(SMALL), "item_bytes": 2, "is_tied": True}).weights == 2 * (4 * BLOCK + 512 * 32 + 32)


def test_states_are_counted_by_batch():
    state = 4 * 32  # of one token
    assert SMALL.batch_tokens(50) == 48  # whole samples
    assert SMALL.batch_tokens(3) == 16
    assert SMALL.passing(48) == 2 * 48 * 5 * state  # those of the last batch and of the next
    assert SMALL.passing(100) == 128 * 5 * state  # there are no more
    assert SMALL.running(10) == 10 * 4 * (2 * 32 + 4 * 40)
    dense, walking = 128 * 5 * state, 16 * 3 * 4 * state
    assert SMALL.walking(4) == dense + walking + 12 * 16 * 512


def test_a_fit_takes_states_of_its_text_and_matrices_of_the_widest_projection():
    gram, weight = 8 * 40 * 40, 8 * 40 * 32
    kept = 96 * 4 * 4 * 32 + 2 * 4 * (BLOCK - 2 * 32)  # four states of each token, a block and a module
    assert SMALL.fitting(96, 1) == kept + 2 * gram + 4 * weight
    assert SMALL.fitting(96, 1, grams=2) == SMALL.fitting(96, 1, inverses=1) == kept + 3 * gram + 4 * weight
    token = 40 * (4 + 8) + 5 * 4 * 32
    few = replace(SMALL, vocabulary=8)
    assert few.fitting(96, 1000) == kept + 3 * gram // 2 + weight + 1000 * token  # that what streams in exceeds
    assert few.fitting(96, 1000, grams=2) - few.fitting(96, 1000) == gram
    assert replace(few, on_host=True).fitting(96, 1000) - few.fitting(96, 1000) == gram
    assert SMALL.fitting(96, 1000) == kept + 5 * 4 * 1000 * 512  # and that, at the top, logits
    wide = replace(SMALL, queries=48)
    assert wide.fitting(0, 1) == 2 * 4 * wide.block_matrices + 2 * 8 * 48 * 48 + 4 * 8 * 48 * 32


OUTSIDE = 2 * 512 * 32 + 32
MATRICES = BLOCK - 64
KEPT = {"micro_batch_size": 2, "batch_size": 4, "cutoff_len": 8, "gradient_checkpointing": True}  # 16 tokens
LAYER = 16 * (16 * 32 + 2 * (4 * 40 + 2 * 48))  # kept of one: its norms' states, and in 16 bits what is inside
ENTERS = 16 * (5 * 32 + 32 + 40)  # its projections
LOGITS = 16 * 512 * (2 * 2 + 8)


def states(layers):
    return 16 * 32 * 4 * layers


@pytest.mark.parametrize(
    ("recovery", "expected"),
    [
        # in float32 with gradient and moments, and once more in 16 bits
        (Full(**KEPT), 18 * (4 * BLOCK + OUTSIDE) + LAYER + 2 * ENTERS + states(4) + LOGITS),
        (
            Full(**KEPT, num_processes=2, sharding=True),  # three blocks whole: two weights, one's gradients
            8 * (4 * BLOCK + OUTSIDE) + 2 * (3 * BLOCK + OUTSIDE) + LAYER + 2 * ENTERS + states(4) + LOGITS,
        ),
        (
            PartialLayers(**KEPT, num_layers=1),
            4 * 3 * BLOCK + 4 * 512 * 32 + 18 * (BLOCK + 512 * 32 + 32) + LAYER + 2 * ENTERS + states(1) + LOGITS,
        ),
        (
            Lora(**KEPT, rank=1, quantize="nf4"),  # 7 adapters a block, a matrix that is multiplied with
            4 * (4 * BLOCK + OUTSIDE) + int((0.516 - 4) * 4 * MATRICES) + 18 * 4 * (256 + 72 * 3 - 32)
            + LAYER + 3 * ENTERS + states(4) + LOGITS + 4 * 32 * 40,
        ),
        (
            Distill(**KEPT),  # the dense model of 6 layers, 2 that stand for the 2 that are gone
            4 * (6 * BLOCK + OUTSIDE) + 4 * (2 * BLOCK + OUTSIDE) + 18 * 2 * BLOCK
            + LAYER + 2 * ENTERS + states(2) + 16 * 32 * (2 * 4 + 24) * 2 + SMALL.running(16),
        ),
    ],
    ids=lambda value: "" if isinstance(value, int) else value.name,
)  # fmt: skip
def test_a_recovery_takes_weights_gradients_moments_and_what_is_kept_for_the_way_back(recovery, expected, monkeypatch):
    sizes = replace(SMALL, layers=6).with_layers(4)
    assert (sizes.layers, sizes.dense.layers) == (4, 6)
    assert recovery.memory(sizes) == expected
    if recovery.num_processes == 2:  # the same where a launcher has started them
        monkeypatch.setattr(ranks, "_launched", Launched("srun", 0, 2, 0, "here", 1))
        assert replace(recovery, num_processes=1).memory(sizes) == expected


WORDS = [
    "model=random", "model.hidden_size=1024", "model.intermediate_size=4096", "model.num_heads=8",
    "model.num_kv_heads=8", "model.num_layers=8", "model.vocab_size=4096", "model.device=cpu", "calibration=text_file",
    "calibration.num_samples=64", "calibration.seq_len=128", "recovery=none", "evaluation=perplexity",
    "evaluation.of=[dense]", "tracker=jsonl",
]  # fmt: skip


def job_of(tmp_path, *more):
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the mill and the tree.\n" * 1600)
    more = (f"calibration.path={text}", f"evaluation.perplexity.corpora=[{text}]", f"output_dir={tmp_path}/out", *more)
    return [*WORDS, *more]


def stage_of(job, name):
    return next(step.stage for step in steps(job) if step.stage.name.startswith(name))


def test_a_stage_takes_its_weights_what_it_computes_and_the_process(tmp_path):
    job = compose_job(["slm"], job_of(tmp_path, "method=slm"))
    weights = 4 * (8 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024) + 2 * 4096 * 1024 + 1024)
    process = needs._OF_PROCESS["merge"] + needs._OF_TOKEN * 4096
    states = 64 * 128 * 1024 * 4 * (8 + 4)
    running = 64 * 128 * 4 * (2 * 1024 + 4 * 4096)
    found = needs.need(stage_of(job, "merge"), job)
    assert found.num_bytes == weights + states + running + process
    assert str(found) == f"{found.num_bytes / 1e9:.2f} GB of main memory"
    assert found.advice is None
    by_magnitude = compose_job(["slm"], job_of(tmp_path, "method=shortened_magnitude", "method.protect_first=1"))
    assert needs.need(stage_of(by_magnitude, "merge"), by_magnitude).num_bytes == weights + process


LLAMA_2_7B = [
    "model=random", "model.num_layers=32", "model.hidden_size=4096", "model.intermediate_size=11008",
    "model.num_heads=32", "model.num_kv_heads=32", "model.vocab_size=32000", "model.dtype=bfloat16",
    "calibration.num_samples=64", "calibration.seq_len=512",
]  # fmt: skip


GRAM, WEIGHT = 8 * 11008**2, 8 * 11008 * 4096
BATCH = 8192 * (11008 * (2 + 8) + 5 * 4 * 4096)  # tokens that go through a block, and what they are fitted with


@pytest.mark.parametrize(
    ("asked", "fit", "more"),
    [
        (["method=joint"], 5 * GRAM // 2 + WEIGHT + BATCH, 0),
        (["method=joint", "method.units=obs"], 4 * GRAM + 4 * WEIGHT, 0),
        # what eight variants put out for 8,192 tokens, 12 states of 2,048 of them
        (["method=joint", "method.export=custom"], 5 * GRAM // 2 + WEIGHT + BATCH, (8 * 8192 + 12 * 2048) * 4096 * 2),
    ],
    ids=["stock", "obs", "custom"],
)
def test_a_joint_search_at_the_7b_shape_takes_its_weights_its_text_and_some_gram_matrices(
    asked, fit, more, tmp_path, monkeypatch
):
    job = compose_job(["slm"], [*job_of(tmp_path, "pruning_ratio=r20", "repair=refit"), *LLAMA_2_7B, *asked])
    sizes, gpu = needs.sizes_of(job), needs.Place("of GPU memory", 79_000_000_000, False)
    monkeypatch.setattr(needs.Place, "of", lambda device: gpu)
    state, blocks = 2 * 4096, 2 * 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    search = needs.need(stage_of(job, "merge"), job).num_bytes
    kept = 4 * 64 * 512 * state  # 48 samples fit, 8 choose, read both ways
    assert search == sizes.weights + blocks + kept + fit + more
    assert search < 1.54 * sizes.weights
    states = 16 * 512 * 4096 * 2 * 32 if more else 0  # of the 8 samples that choose, both ways
    assert job.method.host_memory(sizes) == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + states
    repair = needs.need(stage_of(job, "repair"), job)
    assert repair.num_bytes == sizes.weights + blocks + 4 * 128 * 512 * state + 3 * GRAM // 2 + WEIGHT + BATCH
    monkeypatch.setattr(needs.Place, "of", lambda device: replace(gpu, num_bytes=repair.num_bytes - 1))
    assert needs.need(stage_of(job, "repair"), job).advice == (
        "repair.calibration.num_samples=64 would fit, by the estimate"
    )


def test_new_weights_and_blocks_lie_in_main_memory(tmp_path):
    job = compose_job(["slm"], job_of(tmp_path, "method=joint", "pruning_ratio=r20", "repair=refit"))
    sizes = needs.sizes_of(job)

    def beside_a_fit(name, tokens):
        stage, host = stage_of(job, name), needs.need(stage_of(job, name), job).num_bytes
        fits = sizes.fitting(tokens, 512, grams=2 if name == "merge" else 1)
        return host - sizes.weights - fits - needs._OF_PROCESS[stage.stage] - needs._OF_TOKEN * 4096

    assert beside_a_fit("merge", 64 * 128) == 4 * 8 * (4 * 1024**2 + 3 * 1024 * 4096)  # one model's blocks
    projections, maps = 8 * 1024 * (1024 + 4096), 8 * 2 * 1024**2
    assert beside_a_fit("repair", 128 * 512) == 4 * (2 * projections + maps)


@pytest.mark.parametrize(
    ("stage", "less", "advice"),
    [
        ("evaluate", 1, "evaluation.perplexity.batch_size=2 would fit"),
        ("evaluate", 400_000_000, "evaluation.perplexity.batch_size=1 would fit"),
        ("evaluate", 580_000_000, "model.dtype=bfloat16 would fit"),
        ("merge", 1, "calibration.num_samples=32 would fit"),
        ("merge", 800_000_000, "calibration.num_samples=8 would fit"),
        ("merge", 980_000_000, "calibration.num_samples=1 would fit"),
        ("merge", 1_000_000_000, "model.dtype=bfloat16 calibration.num_samples=32 would fit"),
        (
            "merge",
            1_700_000_000,
            "model.dtype=bfloat16 calibration.num_samples=1 takes least, 0.75 GB; else take a larger",
        ),
    ],
)
def test_the_smallest_change_that_fits_is_named(stage, less, advice, tmp_path, monkeypatch):
    job = compose_job(["slm"], job_of(tmp_path, "method=slm"))
    taken = needs.need(stage_of(job, stage), job).num_bytes
    monkeypatch.setattr(needs.memory, "of_machine", lambda: taken - less)
    assert advice in needs.need(stage_of(job, stage), job).advice


@pytest.mark.parametrize(
    ("words", "stage", "share", "advice"),
    [
        (["recovery=full"], "recover", 0.95, "recovery.micro_batch_size=2 would fit"),
        (["recovery=full"], "recover", 0.4, "model.dtype=bfloat16 recovery=lora recovery.micro_batch_size=2 would fit"),
        (["recovery=lora"], "recover", 0.5, "model.dtype=bfloat16 recovery.gradient_checkpointing=true recovery.mic"),
        (["repair=refit"], "repair", 0.6, "model.dtype=bfloat16 repair.calibration.num_samples=32 would fit"),
        ([], "evaluate_dense/efficiency/64x512", 0.9, "evaluation.efficiency.grid=[8x128,32x512] would fit"),
        ([], "evaluate_dense/efficiency/64x512", 0.4, "evaluation.efficiency.beside_dense=false evaluation.effici"),
        ([], "evaluate_dense/efficiency", 0.5, "evaluation.efficiency.batch_size=16 would fit"),
        (["pruning_ratio=latency", "pruning_ratio.speedup=1.2"], "time_blocks", 0.9, "model.dtype=bfloat16 would fit"),
    ],
)
def test_changes_go_together_where_one_is_not_enough_and_are_what_the_stage_reads(
    words, stage, share, advice, tmp_path, monkeypatch
):
    timed = ["evaluation.efficiency.enabled=true", "evaluation.efficiency.grid=[8x128,64x512]"]
    timed += ["evaluation.efficiency.batch_size=64", "evaluation.efficiency.prompt_len=2048"]
    job = compose_job(["slm"], job_of(tmp_path, *timed, *words))
    stage = next(step.stage for step in steps(job) if step.stage.name == stage)
    taken = needs.need(stage, job).num_bytes
    monkeypatch.setattr(needs.memory, "of_machine", lambda: int(share * taken))
    found = needs.need(stage, job).advice
    assert found.startswith(advice)
    changed = compose_job(["slm"], [*job_of(tmp_path, *timed, *words), *found.partition(" would fit")[0].split()])
    others = [step.stage for step in steps(changed) if step.stage.name.startswith(stage.name.removesuffix("64x512"))]
    assert any(needs.need(one, changed).advice is None for one in others)


def test_what_lies_in_main_memory_is_asked_for_there_too(tmp_path, monkeypatch):
    """New weights in float32, on a GPU machine whose main memory is small."""
    job = compose_job(["slm"], [*job_of(tmp_path, "pruning_ratio=r20", "repair=refit"), *LLAMA_2_7B])
    monkeypatch.setattr(needs.Place, "of", lambda device: needs.Place("of GPU memory", 79_000_000_000, False))
    there = job.repair.host_memory(needs.sizes_of(job)) + needs._OF_PROCESS["repair"] + needs._OF_TOKEN * 32000
    projections, maps = 32 * 4096 * (4096 + 11008), 2 * 32 * 4096**2
    assert job.repair.host_memory(needs.sizes_of(job)) == 4 * (2 * projections + maps)
    monkeypatch.setattr(needs.memory, "of_machine", lambda: there)
    assert needs.need(stage_of(job, "repair"), job).advice is None
    monkeypatch.setattr(needs.memory, "of_machine", lambda: there - 1)
    found = needs.need(stage_of(job, "repair"), job)
    assert f"repair takes {there / 1e9:.2f} GB of main memory, by the estimate, and there are" in found.warning(
        "repair"
    )


def test_a_stored_model_that_is_too_large_is_to_be_streamed(sound_models, tmp_path, monkeypatch):
    words = ["model=local", f"model.path={sound_models['llama']}", "model.dtype=bfloat16", "model.device=cpu"]
    words += ["recovery=none", "evaluation=none", f"output_dir={tmp_path}/out", "calibration.num_samples=1"]
    job = compose_job(["slm"], words)
    job = replace(job, source=replace(job.source, description={**job.source.description, "num_hidden_layers": 10**6}))
    monkeypatch.setattr(needs.memory, "of_machine", lambda: 4_000_000_000)
    monkeypatch.setattr(type(job.method), "memory", lambda *_: 0)
    assert needs.need(stage_of(job, "merge"), job).advice == "model.device=stream would fit, by the estimate"


def test_a_dry_run_says_what_is_taken_and_warns_of_what_is_not_there(tmp_path, monkeypatch):
    *stages, last = run_slm(*job_of(tmp_path), "dry_run=true").out.splitlines()
    assert all(line.endswith(" GB of main memory") for line in (*stages, last))
    monkeypatch.setattr(needs.memory, "of_machine", lambda: 1_250_000_000)
    warnings = [line for line in run_slm(*job_of(tmp_path), "dry_run=true").out.splitlines() if "warning" in line]
    assert warnings[0].startswith("warning: calibrate takes 1.")
    assert warnings[0].endswith(
        "by the estimate, and there are 1.25; calibration.num_samples=8 would fit, by the estimate"
    )


@pytest.mark.parametrize("device", ["auto", "cuda:1", "balanced"])
def test_gpus_have_what_their_driver_lists_but_for_their_context(device, monkeypatch):
    monkeypatch.setattr(needs.gpus, "visible", lambda: ["0", "1"])
    monkeypatch.setattr(needs.gpus, "memory", lambda: [80_000_000_000, 40_000_000_000])
    place = needs.Place.of(device)
    assert (place.num_bytes, place.is_host) == ({"auto": 79e9, "cuda:1": 39e9, "balanced": 118e9}[device], False)
