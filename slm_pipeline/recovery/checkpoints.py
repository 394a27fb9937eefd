"""What a training leaves on disk as it goes, so that a killed one ends as if it had not been."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from slm_pipeline.recovery import collective, sharding
from slm_pipeline.store import checksums
from slm_pipeline.store.files import remove, write_json

logger = logging.getLogger(__name__)

MARKER = "complete.json"
STATE = "trainer_state.json"
TRAINED = "trained.safetensors"


@dataclass
class Progress:
    """What the Trainer does not count itself, kept with every checkpoint.

    Attributes:
        num_tokens: input tokens trained on, without padding.
        num_label_tokens: those among them that bore loss.
        seconds: training and validation time of all attempts.
        finished: whether nothing remains to be trained.
    """

    num_tokens: int = 0
    num_label_tokens: int = 0
    seconds: float = 0.0
    finished: bool = False


def save_trained(model: nn.Module, folder: Path) -> None:
    """Keep the parameters that require gradients. All processes take part, the first one writes."""
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = sharding.whole(parameter.detach())
            if collective.rank() == 0:
                trained[name] = value.cpu().contiguous()
    if collective.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained, folder / TRAINED)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the parameters of `save_trained` back in their places, each in the type that it has there."""
    with torch.no_grad(), safe_open(folder / TRAINED, framework="pt") as kept:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(sharding.spread_like(kept.get_tensor(name), parameter))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint from which a training can go on; those that are not whole are deleted.

    Whole means that every file fits its checksum, and that the checkpoint which was best so far is there too.
    """
    last = -1
    if collective.rank() == 0:
        _delete_incomplete(folder)
        last = max(map(_step, folder.glob("checkpoint-*")), default=-1)
    last = int(collective.of_first(last))  # other nodes may know the folder as it was a while ago
    return None if last < 0 else folder / f"checkpoint-{last}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _delete_incomplete(folder: Path) -> None:
    for checkpoint in folder.glob("*"):  # there are folders of other trainings too
        if checkpoint.name.startswith("checkpoint-") and (wrong := _fault(checkpoint)):
            logger.warning("%s is not whole, %s: deleted", checkpoint, wrong)
            remove(checkpoint)
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step):
        best = _best(checkpoint)
        if best is not None and not (folder / best).is_dir():
            logger.warning("%s is of no use without %s, which was the best: deleted", checkpoint, best)
            remove(checkpoint)


def _fault(checkpoint: Path) -> str | None:
    if not checkpoint.name.removeprefix("checkpoint-").isdecimal() or not checkpoint.is_dir():
        return "not a checkpoint"
    if not (checkpoint / MARKER).is_file():
        return "an earlier attempt was stopped while writing it"
    try:
        read_progress(checkpoint)
        files = checksums.read_sealed(checkpoint / MARKER)["files"]
        return checksums.fault(checkpoint, files, whole=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return str(error)


def _best(checkpoint: Path) -> str | None:
    """Name of the checkpoint that had the best validation loss when this one was written, None if none had."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return Path(state["best_model_checkpoint"]).name if state["best_model_checkpoint"] else None


def mark_complete(checkpoint: Path, progress: Progress) -> None:
    """Say that a checkpoint is whole by listing its files with their checksums, then delete all but it and the best.

    In this order, so that the best one so far is there as long as the last whole one may need it.
    """
    (checkpoint / MARKER).unlink(missing_ok=True)
    write_json(checkpoint / MARKER, checksums.sealed({**asdict(progress), "files": checksums.describe(checkpoint)}))
    kept = (checkpoint.name, _best(checkpoint))
    for other in list(checkpoint.parent.glob("checkpoint-*")):
        if other.name not in kept:
            remove(other)


def read_progress(checkpoint: Path) -> Progress:
    """The progress stored with a complete checkpoint."""
    marker = checksums.read_sealed(checkpoint / MARKER)
    del marker["files"]
    return Progress(**marker)
