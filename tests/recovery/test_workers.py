"""Training in two processes (on the CPU, with gloo): the same result as in one, and nothing lost when it breaks."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from conftest import random_source, run_slm
from plans import narrowing
from recovery.conftest import BUDGET, MERGED, problem
from safetensors.torch import load_file

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.machine import memory
from slm_pipeline.models import checkpoint
from slm_pipeline.models.loading import load_mapped
from slm_pipeline.recovery import workers
from slm_pipeline.recovery.block_mse import BlockMse
from slm_pipeline.recovery.collective import Trained
from slm_pipeline.recovery.distill import Distill
from slm_pipeline.recovery.full import Full
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.recovery.partial_layers import PartialLayers

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# 19 examples are 10 micro-batches of 2, 6 to a step: the second of two processes has a blank one in the last step of an
# epoch. The 6 steps are three epochs. Of the 7 validation examples one process has 3.
OPTIONS = {**BUDGET, "validation_size": 7, "batch_size": 12, "eval_steps": 2, "learning_rate": 1e-3}
RECOVERIES = {
    "full": Full(**OPTIONS),
    "lora": Lora(**{**OPTIONS, "learning_rate": 1e-2}, dropout=0.0),
    "partial_layers": PartialLayers(**OPTIONS, num_layers=2, gradient_checkpointing=True),
    "language_model": BlockMse(**OPTIONS, objective="language_model"),
    "packed": Full(**{**OPTIONS, "cutoff_len": 300}, packing=True),
    "joint": Distill(**OPTIONS, logit_share=0.5, max_grad_norm=0.01),
    "blocks": Distill(**OPTIONS, order="blocks"),
    "stopped": Full(**{**OPTIONS, "learning_rate": 0.3}, early_stopping=1),
    "short": Full(**OPTIONS, max_minutes=1e-6),
}
SHARDED = {
    f"sharded_{name}": dataclasses.replace(RECOVERIES[name], num_processes=2, sharding=True)
    for name in ("full", "lora", "partial_layers", "language_model")
}
DROPOUT = Lora(**{**OPTIONS, "learning_rate": 1e-2}, dropout=0.3, num_processes=2, sharding=True)
DIVERGING = Full(**{**OPTIONS, "learning_rate": 1e30, "eval_steps": 9}, schedule="constant")
MIXED = {  # float32 adapters among bfloat16 weights; an embedding that is the head too; layers of unequal width
    "bfloat16": dataclasses.replace(SHARDED["sharded_lora"], dtype="bfloat16"),
    "tied": SHARDED["sharded_full"],
    "narrowed": SHARDED["sharded_full"],
    "int8": dataclasses.replace(RECOVERIES["lora"], num_processes=2, quantize="int8"),  # not sharded, but placed too
}
NARROWED = narrowing({1: ([1], list(range(0, 64, 3))), 4: (None, list(range(7)))})


@pytest.fixture(autouse=True, scope="module")
def _one_thread_each():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@dataclass
class InTurn:
    """Several recoveries, each on a model of its own: a process takes seconds to start."""

    recoveries: dict
    data: Path
    saved: Path  # the pruned models of those that bring their blocks to where they train
    num_processes: int = 2

    def run(self, task):
        return {
            name: self._run(recovery, self._problem(recovery, task.out / name, name, task.log))
            for name, recovery in self.recoveries.items()
        }

    def _problem(self, recovery, out, name, log):
        task = mixed_problem(self.data, out, name, log=log)
        if not recovery.places_blocks:
            return task
        return dataclasses.replace(task, model=load_mapped(self.saved / name, placed(name)))

    def _run(self, recovery, task):
        with suppress(Trained):
            return recovery.run(task)


def placed(name):
    return ModelConfig(dtype="bfloat16" if name == "bfloat16" else "float32", device="cpu")


def mixed_problem(data, out, name, **options):
    plan = NARROWED if name == "narrowed" else MERGED
    task = problem(data, out, plan, tied=name == "tied", **options)
    if name == "bfloat16":
        task.model.bfloat16()
    return task


def make(data, out, log):
    return problem(data, out, log=log)


def make_mortal(data, out, log):
    """The second process is killed in its 20th micro-batch, of which 3 are of each step and 2 of each validation."""
    task = problem(data, out, log=log)
    calls = []

    def count(*_):
        calls.append(None)
        if os.environ.get("RANK") == "1" and len(calls) == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    task.model.register_forward_pre_hook(count)
    return task


def trained_here(metrics, step):
    pytest.fail("trained in the parent")


@pytest.fixture(scope="module")
def in_two(data, tmp_path_factory):
    """Results by name, all that was logged, and what the last of them raised."""
    out, saved = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("saved")
    for name in (*SHARDED, *MIXED, "dropout"):
        task = mixed_problem(data, out, name)
        checkpoint.save(task.model, task.tokenizer, saved / name, card="", config=placed(name))
    several = InTurn({**RECOVERIES, **SHARDED, **MIXED, "dropout": DROPOUT, "diverging": DIVERGING}, data, saved)
    logged = []
    with pytest.raises(UserError) as raised:
        workers.train(
            several, functools.partial(make, data, out), lambda metrics, step: logged.append({"step": step, **metrics})
        )
    del several.recoveries["diverging"]
    return several.run(problem(data, out, log=trained_here)), logged, raised.value


@pytest.mark.parametrize("name", [name for name in [*RECOVERIES, *SHARDED] if name not in ("stopped", "short")])
def test_two_processes_end_as_one(in_two, data, tmp_path, name):
    found = in_two[0][name]
    expected = RECOVERIES[name.removeprefix("sharded_")].run(problem(data, tmp_path))
    assert expected.metrics["eval_loss"] < 0.99 * expected.metrics["initial_eval_loss"]
    wanted = {**expected.metrics, "seconds": found.metrics["seconds"]}
    assert found.metrics.pop("loss") == wanted.pop("loss")
    assert found.metrics == pytest.approx(wanted, rel=1e-5)
    for row, wanted in zip(found.curve, expected.curve, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    for weight_name, weight in expected.model.state_dict().items():
        assert torch.allclose(found.model.state_dict()[weight_name], weight, atol=1e-5), weight_name


@pytest.mark.parametrize("name", MIXED)
def test_sharded_models_of_mixed_parameters(in_two, data, tmp_path, name):
    found = in_two[0][name]
    expected = dataclasses.replace(MIXED[name], sharding=False, num_processes=1).run(
        mixed_problem(data, tmp_path, name)
    )
    assert found.metrics["eval_loss"] == pytest.approx(expected.metrics["eval_loss"], rel=2e-3)
    assert expected.metrics["eval_loss"] < 0.99 * expected.metrics["initial_eval_loss"]
    for weight_name, weight in expected.model.state_dict().items():
        assert found.model.state_dict()[weight_name].dtype == weight.dtype
        assert torch.allclose(found.model.state_dict()[weight_name], weight, atol=0.02 if name == "bfloat16" else 1e-5)


def test_every_loss_is_logged_once_where_the_training_was_started(in_two):
    results, logged, _ = in_two
    expected = [row for result in results.values() for row in result.curve]
    assert logged[: len(expected)] == expected
    assert [row["step"] for row in logged[len(expected) :]] == [0, 1, 2]  # then it diverges


def test_all_processes_stop_at_the_same_step(in_two):
    assert in_two[0]["short"].metrics["num_steps"] == 1
    losses = [row["eval_loss"] for row in in_two[0]["stopped"].curve if "eval_loss" in row]
    assert losses[1] > losses[0]
    assert in_two[0]["stopped"].metrics["num_steps"] == 2


def test_an_error_of_the_training_comes_out_as_it_is(in_two, data, tmp_path):
    with pytest.raises(UserError, match="at step 3; lower recovery.learning_rate") as alone:
        DIVERGING.run(problem(data, tmp_path))
    assert str(in_two[2]) == str(alone.value)


def test_a_killed_process_ends_the_training_which_goes_on_and_ends_as_undisturbed(
    in_two, data, tmp_path, monkeypatch, caplog
):
    """With dropout, different in each process; whole models are killed below."""
    caplog.set_level(logging.INFO, "slm_pipeline")
    logged = []

    def log(metrics, step):
        logged.append((step, *metrics))

    message = "the training process recovery-1 ended with signal 9, .* the same command goes on"
    with pytest.raises(UserError, match=message):
        workers.train(DROPOUT, functools.partial(make_mortal, data, tmp_path), log)
    assert max(logged)[0] in (4, 5)
    assert caplog.text.count("step 0 of 6: validation loss") == 1  # of one process
    peaks = []
    monkeypatch.setattr(memory, "note_peak_of_others", peaks.append)
    workers.train(DROPOUT, functools.partial(make, data, tmp_path), log)
    assert caplog.text.count("step 0 of 6: validation loss") == 1  # it goes on
    assert [0.4 < peak < 20 for peak in peaks] == [True]  # two processes that have imported torch
    result = DROPOUT.run(problem(data, tmp_path, log=trained_here))
    expected = in_two[0]["dropout"]
    assert {**result.metrics, "seconds": 0} == {**expected.metrics, "seconds": 0}
    assert result.curve == expected.curve
    assert set(logged) == {(row["step"], *(name for name in row if name != "step")) for row in expected.curve}
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 0}, "recovery.num_processes=0 must be at least 1"),
        (
            {"num_processes": 4},
            "recovery.micro_batch_size=2 for each of recovery.num_processes=4 must divide recovery.batch_size=12",
        ),
        ({"sharding": True}, "recovery.sharding=true spreads the model over recovery.num_processes, which is 1"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        Full(**OPTIONS, **changes)


def test_distillation_is_not_sharded():
    with pytest.raises(UserError, match="recovery.sharding=true: recovery=distill needs every layer whole"):
        Distill(**OPTIONS, num_processes=2, sharding=True)


def on(device):
    source = random_source()
    return dataclasses.replace(source, config=dataclasses.replace(source.config, device=device))


def test_each_process_has_a_gpu_of_its_own(data, monkeypatch):
    recovery = Full(**OPTIONS, num_processes=2)
    for device in ("balanced", "cuda:0"):
        with pytest.raises(UserError, match=f"recovery.num_processes=2: .* so model.device={device} cannot be"):
            recovery.check(on(device), 4)
    recovery.check(on("auto"), 4)
    SHARDED["sharded_full"].check(on("balanced"), 4)  # so do the other stages of a model that fits no single one
    recovery.preflight(on("cpu"), data)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="recovery.num_processes=2: each process needs a GPU of its own, .* has 1"):
        recovery.preflight(on("auto"), data)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    recovery.preflight(on("auto"), data)


def test_a_job_killed_while_it_trains_leaves_no_process_and_goes_on(data, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(["river", "mill", "tree", "runs"], k=500)))
    job = [
        "model=random", "model.num_layers=6", "model.hidden_size=32", "model.intermediate_size=48", "model.device=cpu",
        "recovery=full", "tracker=jsonl", "evaluation=none", f"output_dir={tmp_path}", "calibration=text_file",
        f"calibration.path={tmp_path}/text.txt", "calibration.num_samples=4", "calibration.seq_len=64",
        f"data_dir={data}", "recovery.source=file", "recovery.path=alpaca.json", "recovery.validation_size=7",
        "recovery.max_steps=6", "recovery.num_epochs=9", "recovery.batch_size=12", "recovery.micro_batch_size=2",
        "recovery.warmup_steps=1", "recovery.eval_steps=2", "recovery.save_steps=2", "recovery.logging_steps=1",
        "recovery.learning_rate=0.001", "recovery.dtype=float32", "recovery.num_processes=2", "pictures=false",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with open(tmp_path / "stderr", "w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "slm_pipeline", *job], stdout=subprocess.DEVNULL, stderr=stderr, env=environment
        )
        deadline = time.monotonic() + 120
        while not any((tmp_path / "store" / "recover").glob("*.partial/checkpoints/*/complete.json")):
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started = psutil.Process(process.pid).children()
        assert len(started) >= 2
        process.kill()
        process.wait()
    assert psutil.wait_procs(started, timeout=60)[1] == []  # none is left
    weights, curves = [], []
    for changes in ([], ["recovery.num_processes=1"]):
        before = set((tmp_path / "runs" / "slm").glob("*"))
        outcome = run_slm(*job, *changes)
        assert outcome.status == 0, outcome.err
        (folder,) = set((tmp_path / "runs" / "slm").glob("*")) - before
        summary = json.loads((folder / "summary.json").read_text())
        weights.append(load_file(Path(summary["checkpoint"]) / "model.safetensors"))
        curves.append(json.loads((folder / "recover" / "curve.json").read_text()))
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    for name, weight in weights[1].items():
        assert torch.allclose(weights[0][name], weight, atol=1e-5), name
