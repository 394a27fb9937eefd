"""Trainings that are killed, resumed, finished already, or gone bad: the same end, or an error that names the step."""

from __future__ import annotations

import json
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
from slm_pipeline.recovery import checkpoints, collective, training_loop

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
    monkeypatch.setattr(training_loop, "_summarize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_lora(folder, out)
    monkeypatch.undo()
    result = run_lora(folder, out, log=lambda metrics, step: pytest.fail("trained again"))
    assert result.curve == undisturbed[0].curve
    assert result.metrics["num_tokens"] == undisturbed[0].metrics["num_tokens"]


def test_checkpoints_half_written_or_half_deleted_are_not_taken(tmp_path, monkeypatch):
    whole, torn, unmarked = (tmp_path / f"checkpoint-{step}" for step in (9, 10, 11))
    progress = checkpoints.Progress(num_tokens=5, num_label_tokens=3, seconds=1.5, finished=True)
    for checkpoint in (whole, torn, unmarked):
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("0123")
        (checkpoint / "optimizer").write_text("4567")
        write_state(checkpoint, best=whole)
        if checkpoint != unmarked:
            checkpoints.mark_complete(checkpoint, progress)
    (torn / "optimizer").unlink()
    assert checkpoints.last_complete_checkpoint(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9"]
    assert checkpoints.read_progress(whole) == progress
    with monkeypatch.context() as another_process:
        another_process.setattr(collective, "rank", lambda: 1)
        another_process.setattr(collective, "of_first", lambda value: 12.0)
        expected = tmp_path / "checkpoint-12"  # which this node does not show yet
        assert checkpoints.last_complete_checkpoint(tmp_path) == expected
    (whole / "weights").write_text("0124")  # as many bytes
    assert checkpoints.last_complete_checkpoint(tmp_path) is None


def write_state(checkpoint: Path, best: Path | None) -> None:
    state = {"best_model_checkpoint": None if best is None else str(best)}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def test_a_checkpoint_whose_best_is_gone_is_not_gone_on_from(tmp_path, caplog):
    """Its training would end with weights that nobody has."""
    first, best, last = (tmp_path / f"checkpoint-{step}" for step in (2, 4, 6))
    for checkpoint, its_best in ((best, best), (last, best), (first, None)):
        checkpoint.mkdir()
        write_state(checkpoint, best=its_best)
        checkpoints.mark_complete(checkpoint, checkpoints.Progress())
        if checkpoint == last:
            assert best.exists()
    last.mkdir()
    write_state(last, best=best)
    checkpoints.mark_complete(last, checkpoints.Progress())
    assert not first.exists()
    assert checkpoints.last_complete_checkpoint(tmp_path) is None
    assert f"{last} is of no use without checkpoint-4, which was the best: deleted" in caplog.text


def test_a_new_best_checkpoint_that_was_never_finished_costs_nothing(folder, undisturbed, monkeypatch):
    """Killed after the files of a new best checkpoint are there and before it is marked: the one before still is."""
    out, marked = folder / "killed_at_a_mark", []

    def mark(checkpoint, progress):
        marked.append(checkpoint.name)
        if len(marked) == 3:
            raise KeyboardInterrupt
        checkpoints.mark_complete(checkpoint, progress)

    with monkeypatch.context() as patch:
        patch.setattr("slm_pipeline.recovery.watch.mark_complete", mark)
        with pytest.raises(KeyboardInterrupt):
            run_lora(folder, out)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(marked)
    result = run_lora(folder, out)
    assert result.metrics["eval_loss"] == undisturbed[0].metrics["eval_loss"]
    assert result.curve == undisturbed[0].curve


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
