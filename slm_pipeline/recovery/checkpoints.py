"""What a training leaves on disk as it goes, so that a killed one ends as if it had not been."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slm_pipeline.artifacts import write_json
from slm_pipeline.recovery import collective, sharding

logger = logging.getLogger(__name__)

MARKER = "complete.json"
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
    """Put the parameters of `save_trained` back in their places."""
    kept = load_file(folder / TRAINED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(sharding.spread_like(kept[name], parameter))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; those that were not are deleted."""
    if collective.rank() == 0:
        _delete_incomplete(folder)
    collective.wait()
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _delete_incomplete(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if not _is_complete(checkpoint):
            logger.warning("%s is incomplete, an earlier attempt was stopped while writing it: deleted", checkpoint)
            shutil.rmtree(checkpoint)


def mark_complete(checkpoint: Path, progress: Progress) -> None:
    """Say that a checkpoint is whole by listing its files, so that one half deleted is not taken for whole either."""
    write_json(checkpoint / MARKER, {**asdict(progress), "files": _file_sizes(checkpoint)})


def read_progress(checkpoint: Path) -> Progress:
    """The progress stored with a complete checkpoint."""
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    del marker["files"]
    return Progress(**marker)


def _is_complete(checkpoint: Path) -> bool:
    if not (checkpoint / MARKER).is_file():
        return False
    listed: dict[str, int] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    return listed == _file_sizes(checkpoint)


def _file_sizes(checkpoint: Path) -> dict[str, int]:
    files = sorted(file for file in checkpoint.iterdir() if file.is_file() and file.name != MARKER)
    return {file.name: file.stat().st_size for file in files}
