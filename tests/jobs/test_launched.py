"""The whole command in two processes, as two nodes on loopback: the results of one process, and one end for all."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import own_tasks
import psutil
import pytest
import small_pipeline
import torch
from conftest import run_slm
from safetensors.torch import load_file

from slm_pipeline.machine import ranks

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


def start(command: list[str], errors: Path, **environment: str) -> subprocess.Popen:
    everything = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=errors.open("w"), text=True, env=everything
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """More than two batches of calibration text, 35 pieces of the search, 2 samples held out of the repair's 10; to be
    evaluated four batches of text, and tasks of four and five documents, answered and written."""
    data = small_pipeline.write_data(tmp_path_factory.mktemp("data"))
    own_tasks.write(data / "own")
    words = [
        word
        for word in small_pipeline.overrides(data, seq_len=64, max_steps=6, save_steps=2)
        if not word.startswith(("evaluation=", "evaluation.tasks=", "evaluation.data=", "calibration.num_samples="))
    ]
    return [
        *words, "model.device=cpu", "calibration.num_samples=70", "method=sleb", "pruning_ratio=layers",
        "pruning_ratio.num_layers=4", "repair=refit", "repair.calibration.source=text_file",
        "repair.calibration.path=text.txt", "repair.calibration.num_samples=10", "repair.calibration.seq_len=64",
        "repair.ridges=[0.1,1.0]",
        "recovery=lora", "recovery.dropout=0", "evaluation=perplexity", "evaluation.of=[pruned,recovered]",
        "evaluation.data=.", "evaluation.tasks=[boolq]", "evaluation.lm_eval.tasks=[own_tag]",
        "evaluation.lm_eval.include_path=own", "evaluation.fidelity.corpora=[text.txt]",
        "evaluation.fidelity.window=128", "evaluation.batch_size=2", "pictures=false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def broken(job, tmp_path_factory):
    """The folder and the messages of a job by two torchruns, of whose processes the second was killed in training."""
    out = tmp_path_factory.mktemp("two")
    port = free_port()
    nodes = [
        start(
            [
                "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1",
                "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "slm_pipeline", *job, f"output_dir={out}",
            ],
            out / f"stderr_{rank}",
        )
        for rank in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + 200
    while not any((out / "store" / "recover").glob("*.partial/checkpoints/*/complete.json")):
        assert nodes[0].poll() is None, (out / "stderr_0").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (second,) = psutil.Process(nodes[1].pid).children()
    second.send_signal(signal.SIGKILL)
    for node in nodes:
        node.communicate(timeout=60)
        assert node.returncode != 0
    return out, "".join((out / f"stderr_{rank}").read_text() for rank in range(2))


@pytest.fixture(scope="module")
def finished(job, broken):
    """The same again, as srun would start it; the folder, and what each said."""
    out, _ = broken
    said = []
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    tasks = [
        start(["-m", "slm_pipeline", *job, f"output_dir={out}"], out / f"task_{rank}", **slurm, SLURM_PROCID=str(rank))
        for rank in range(2)
    ]
    for rank, task in enumerate(tasks):
        output, _ = task.communicate(timeout=200)
        said.append((task.returncode, output, (out / f"task_{rank}").read_text()))
    return out, said


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    outcome = run_slm(*job, f"output_dir={out}")
    assert outcome.status == 0, outcome.err
    return out


def result(out: Path, stage: str) -> Path:
    (found,) = (path.parent for path in (out / "store" / stage).glob("*/stage.json"))
    return found


def numbers(out: Path) -> dict[str, float]:
    found = read(next(out.glob("runs/*/*/summary.json")))["numbers"]
    return {key: said["value"] for key, said in found.items()}


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_a_process_that_is_killed_ends_all_with_one_message(broken):
    _, messages = broken
    assert messages.count("error: process 1 of 2 on") == 1
    assert "ended without a word" in messages
    assert messages.count("calibrate: done") == 1


def test_the_same_command_goes_on_and_the_first_process_alone_speaks(finished):
    out, ((status, _, messages), second) = finished
    assert status == 0, messages
    assert "2 processes of srun work on this" in messages
    assert "recovery goes on from" in messages
    assert messages.count("reused, ") == 3  # calibrate, merge, repair
    assert second == (0, "", "")
    assert len(list(out.glob("runs/*/*/summary.json"))) == 1


def test_statistics_and_plan_are_those_of_one_process(finished, alone):
    two = finished[0]
    for stage in ("calibrate", "merge", "repair"):
        assert result(two, stage).name == result(alone, stage).name  # the key knows nothing of processes
    found, expected = (load_file(result(out, "calibrate") / "statistics.safetensors") for out in (two, alone))
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=1e-6, atol=1e-7), name
    found, expected = (read(result(out, "calibrate") / "similarity.json") for out in (two, alone))
    assert found["settings"] == expected["settings"]
    for row, values in zip(found["cka"], expected["cka"], strict=True):
        assert row == pytest.approx(values, abs=1e-12)
    found, expected = (read(result(out, "merge") / "plan.json") for out in (two, alone))
    assert found["scores"].pop("seconds") != expected["scores"].pop("seconds")
    for one, other in zip(found["scores"].pop("rounds"), expected["scores"].pop("rounds"), strict=True):
        assert one["removed"] == other["removed"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)
        given_up = {layer for layer, loss in other["losses"].items() if loss is None}
        assert {layer for layer, loss in one["losses"].items() if loss is None} == given_up
        for layer in one["losses"].keys() - given_up:
            assert one["losses"][layer] == pytest.approx(other["losses"][layer], rel=1e-12)
    evaluations = "num_block_evaluations"
    assert found["scores"].pop(evaluations) == pytest.approx(expected["scores"].pop(evaluations), rel=0.2)
    assert found == expected


def test_new_weights_are_those_of_one_process(finished, alone):
    found, expected = (read(result(out, "repair") / "plan.json") for out in (finished[0], alone))
    assert found["ops"] == expected["ops"]
    numbers = [plan["scores"]["repair"]["divergence"] for plan in (found, expected)]
    assert numbers[0]["pruned"]["kl"] == pytest.approx(numbers[1]["pruned"]["kl"], rel=1e-5)
    assert numbers[0]["repaired"]["kl"] < numbers[0]["pruned"]["kl"] / 2
    found, expected = (load_file(result(out, "repair") / "plan.safetensors") for out in (finished[0], alone))
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=float(1e-4 * weight.abs().max())), name


def test_a_training_that_was_broken_off_ends_as_in_one_process(finished, alone):
    found, expected = (read(result(out, "recover") / "curve.json") for out in (finished[0], alone))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    found, expected = (load_file(result(out, "recover") / "model/model.safetensors") for out in (finished[0], alone))
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-4), name
    found, expected = (numbers(out)["recovered/perplexity/text.txt"] for out in (finished[0], alone))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_models_numbers_are_those_of_one_process(finished, alone):
    """The pruned model's, which is the same in both."""
    found, expected = (
        {key: value for key, value in numbers(out).items() if key.startswith("pruned/")} for out in (finished[0], alone)
    )
    assert found.keys() == expected.keys()
    names = ["boolq", "perplexity/text.txt", "fidelity/text.txt/kl", "lm_eval/own_tag/signs/code_points,strict-match"]
    assert expected.keys() >= {f"pruned/{name}" for name in names}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "method=slm,sleb"], "torchrun starts 2 processes for one job; a study .* starts its own"),
        (["model.device=balanced"], "model.device=balanced: each process of torchrun takes a GPU of its own"),
        (["recovery.num_processes=2"], "num_processes=2: torchrun has started 2 processes, .*; leave it at 1"),
        (["recovery.micro_batch_size=4"], "=4 for each of the 2 processes of torchrun must divide .*batch_size=4"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_they_meet(job, words, message, monkeypatch, tmp_path):
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**values, "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_launched", None)
    outcome = run_slm(*job, *words, f"output_dir={tmp_path}")
    assert outcome.status == 2
    assert re.search(message, outcome.err), outcome.err
