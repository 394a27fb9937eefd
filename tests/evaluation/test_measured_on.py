"""Speed and memory belong to the machine that showed them; scores are the same on any."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import run_slm
from speeds import measured_speed

from slm_pipeline.evaluation import efficiency, perplexity
from slm_pipeline.machine import gpus, memory


@pytest.fixture
def with_gpus(tmp_path, monkeypatch):
    """A function of the models of this machine's GPUs, as the driver lists them, and of those that may be used."""

    def pretend(models, visible):
        monkeypatch.setattr(gpus, "models", lambda: models)
        monkeypatch.setattr(gpus, "visible", lambda: visible)

    return pretend


def test_the_machine_is_its_device(with_gpus):
    with_gpus([], [])
    on_cpu = efficiency.machine("auto")
    assert on_cpu["cpu"]
    assert on_cpu["number"] >= 1
    assert "torch" not in on_cpu  # other versions are warned about
    with_gpus(["H100", "H100"], ["0", "1"])
    on_gpu = efficiency.machine("auto")
    assert (on_gpu["gpu"], on_gpu["number"]) == (["H100"], 1)
    assert on_gpu == efficiency.machine("cuda:1")
    assert efficiency.machine("balanced")["number"] == 2
    assert efficiency.machine("cpu") == on_cpu
    with_gpus(["A100", "A100"], ["0", "1"])
    assert efficiency.machine("auto") != on_gpu
    with_gpus(["H100", "A100"], ["0"])
    first = efficiency.machine("auto")
    with_gpus(["H100", "A100"], ["1"])
    assert efficiency.machine("auto") != first


def test_asking_takes_no_torch():
    code = "from slm_pipeline.evaluation.efficiency import machine; machine('auto')"
    code += "; import sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"


def test_scores_are_shared_and_speed_is_not(tmp_path, monkeypatch):
    calls = []

    def scored(*_, **__):
        calls.append("scores")
        about = {"num_tokens": 3, "window": 16, "stride": None, "bos": False, "split": "file"}
        return {"perplexity": 7.0, "nll": 2.0, **about}

    def timed(*_, **__):
        calls.append("speed")
        with memory.measured():
            pass
        return measured_speed("d", tokens_per_second=1.0)

    monkeypatch.setattr(perplexity, "perplexity", scored)
    monkeypatch.setattr(efficiency, "efficiency", timed)
    (tmp_path / "text.txt").write_text("word " * 200)

    def run(name, machine, enabled=True, *more):
        calls.clear()
        monkeypatch.setattr(efficiency, "machine", lambda device: {"cpu": machine})
        outcome = run_slm(
            "model=random", "stages=[evaluate]", "evaluation=none", "evaluation.of=[dense]", "pictures=false",
            f"evaluation.perplexity.corpora=[{tmp_path}/text.txt]", "evaluation.perplexity.window=16",
            f"evaluation.efficiency.enabled={enabled}", f"output_dir={tmp_path}/out", f"name={name}", *more,
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        (file,) = (tmp_path / "out" / "runs" / name).glob("*/summary.json")
        summary = json.loads(file.read_text())
        assert summary["metrics"]["dense"]["perplexity"][f"{tmp_path}/text.txt"]["perplexity"] == 7.0
        assert ("efficiency" in summary) == enabled
        return list(calls)

    assert run("first", "A") == ["scores", "speed"]
    assert run("again", "A") == []
    assert run("elsewhere", "B") == ["speed"]
    assert run("scores_alone", "C", False) == []
    assert run("forced", "B", True, "force=[evaluate]") == ["scores", "speed"]
