"""Trainings that are killed, resumed, finished already, or gone bad: the same end, or an error that names the step."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recovery.conftest import run_lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slm_pipeline.config import CONF_DIR
from slm_pipeline.errors import UserError
from slm_pipeline.recovery import checkpoints, training

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from recovery.conftest import run_lora
torch.set_num_threads(1)
def log(metrics, step):
    if step == 6 and "loss" in metrics:
        os.kill(os.getpid(), signal.SIGKILL)
run_lora(Path(sys.argv[1]), Path(sys.argv[2]), log)
"""


def test_killed_and_run_again_ends_as_undisturbed(folder, undisturbed, caplog):
    """The kill is in the second epoch, the last checkpoint in the first."""
    out = folder / "killed"
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], CONF_DIR.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), str(out)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    logged = []
    with caplog.at_level(logging.INFO):
        result = run_lora(folder, out, log=lambda metrics, step: logged.append({"step": step, **metrics}))
    assert f"recovery goes on from {out}/checkpoints/checkpoint-4" in caplog.text
    expected = undisturbed[0]
    assert logged == expected.curve  # the steps of the first attempt too
    assert {**result.metrics, "seconds": 0} == {**expected.metrics, "seconds": 0}
    assert result.curve == expected.curve
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], weight), name


@pytest.mark.parametrize(("save_steps", "stop", "resumed_from"), [(5, 6, 5), (4, 9, 8)])
def test_resumes_at_an_epochs_end_and_in_its_middle(folder, undisturbed, caplog, save_steps, stop, resumed_from):
    def interrupt(metrics, step):
        if step == stop and "loss" in metrics:
            raise KeyboardInterrupt

    out = folder / f"interrupted_at_{stop}"
    with pytest.raises(KeyboardInterrupt):
        run_lora(folder, out, interrupt, save_steps=save_steps)
    with caplog.at_level(logging.INFO):
        result = run_lora(folder, out, save_steps=save_steps)
    assert f"recovery goes on from {out}/checkpoints/checkpoint-{resumed_from}" in caplog.text
    for name, weight in undisturbed[0].model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], weight), name
    assert result.metrics["num_tokens"] == undisturbed[0].metrics["num_tokens"]


def test_a_finished_training_is_not_trained_again(folder, undisturbed):
    out = folder / "undisturbed"
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    again = run_lora(folder, out, log=lambda metrics, step: pytest.fail("trained again"))
    assert torch.equal(again.model.lm_head.weight, undisturbed[0].model.lm_head.weight)
    assert torch.equal(
        again.model.model.layers[0].mlp.up_proj.weight, undisturbed[0].model.model.layers[0].mlp.up_proj.weight
    )
    assert all(weight.dtype == torch.float32 for weight in adapter.values())


def test_killed_after_the_last_step(folder, undisturbed, monkeypatch):
    """All steps done, results not written: nothing is trained beyond the last step."""
    out = folder / "killed_at_the_end"
    monkeypatch.setattr(training, "_summarize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_lora(folder, out)
    monkeypatch.undo()
    result = run_lora(folder, out, log=lambda metrics, step: pytest.fail("trained again"))
    assert result.curve == undisturbed[0].curve
    assert result.metrics["num_tokens"] == undisturbed[0].metrics["num_tokens"]


def test_checkpoints_half_written_or_half_deleted_are_not_taken(tmp_path):
    whole, torn, unmarked = (tmp_path / f"checkpoint-{step}" for step in (9, 10, 11))
    for checkpoint in (whole, torn, unmarked):
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("0123")
        (checkpoint / "optimizer").write_text("4567")
    progress = checkpoints.Progress(num_tokens=5, num_label_tokens=3, seconds=1.5, finished=True)
    checkpoints.mark_complete(whole, progress)
    checkpoints.mark_complete(torn, progress)
    (torn / "optimizer").unlink()
    assert checkpoints.last_complete_checkpoint(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9"]
    assert checkpoints.read_progress(whole) == progress
    (whole / "weights").write_text("012")
    assert checkpoints.last_complete_checkpoint(tmp_path) is None


def test_loss_gone_bad_names_the_step(folder, tmp_path):
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+; lower recovery.learning_rate \(1e\+30 now\)"):
        run_lora(folder, tmp_path / "training", learning_rate=1e30, warmup_steps=0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="validation loss is nan at step 0"):
        run_lora(folder, tmp_path / "start", model=model)


def test_gradient_gone_bad_is_never_applied(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.layers[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("inf"),))
    with pytest.raises(UserError, match="the gradient is (nan|inf) at step 1"):
        run_lora(folder, tmp_path, model=model)
    weights = dict(model.named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())
