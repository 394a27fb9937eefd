"""What is exported: the model of a run, or a model folder. Looked at before anything is loaded; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.export import model_card
from slm_pipeline.export.model_card import Base
from slm_pipeline.models import folder as model_folder
from slm_pipeline.models.json_files import read_json
from slm_pipeline.store.run_folder import RUNNING, SUMMARY
from slm_pipeline.surgery.plan import Plan, file_of

WHICH = {"recovered": "recover", "repaired": "repair", "pruned": "merge"}  # stage that made it, the last of a run first


@dataclass(frozen=True)
class Exported:
    """A model on disk and what is known of it.

    Attributes:
        folder: which ``from_pretrained`` loads.
        which: pruned, repaired or recovered; empty of a plain model folder.
        summary: summary.json of its run; empty of a plain model folder.
        description: config.json.
        base: the dense model; of a plain model folder as far as it says.
    """

    folder: Path
    which: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    base: Base = field(default_factory=lambda: Base("another model"))

    @property
    def name(self) -> str:
        """Of files and titles."""
        if not self.summary:
            return self.folder.resolve().name
        return "-".join(str(part) for part in (self.summary["model"], self.summary["method"], self.which))

    @cached_property
    def plan(self) -> Plan | None:
        """The plan that lies with the weights."""
        file = file_of(self.folder)
        return Plan.read(file) if file.is_file() else None

    def card(self, place: str, description: Mapping[str, Any] | None = None) -> str:
        """The model card: the full one of a run's model, of another folder its own.

        Args:
            place: what loads it: a repository, or a folder.
            description: config.json, where it is not that of ``folder``.
        """
        if self.summary and self.plan is not None:
            about = description or self.description
            return model_card.of_run(self.summary, self.base, self.plan, self.which, about, place)
        own = self.folder / "README.md"
        return own.read_text(encoding="utf-8") if own.is_file() else f"# {self.name}\n"

    @property
    def dtype(self) -> str:
        found = self.description.get("dtype") or self.description.get("torch_dtype") or "float32"
        return str(found).removeprefix("torch.")

    def load(self) -> tuple[Any, Any]:
        """The model on the CPU in the type of its files, and its tokenizer."""
        from slm_pipeline.models.loading import load_checkpoint, load_tokenizer

        return load_checkpoint(self.folder, self.config), load_tokenizer(self.folder)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(name=self.name, source="local", path=str(self.folder), dtype=self.dtype, device="cpu")


def find(place: Path, which: str | None = None) -> Exported:
    """What ``place`` holds: a run's folder, or a model folder.

    Args:
        which: of a run: pruned, repaired or recovered; None for the last that it made.

    Raises:
        UserError: it is neither, or the run kept no such model, or something is wrong in the model folder.
    """
    if (place / SUMMARY).is_file():
        return _of_run(place, which)
    if (place / "config.json").is_file():
        if which is not None:
            raise UserError(f"--which={which} chooses among the models of a run; {place} is a model folder")
        return _looked_at(Exported(place, ""))
    if (place / RUNNING).exists():
        raise UserError(f"{place} is a run without {SUMMARY}: it is not finished; its command goes on from there")
    raise UserError(f"{place} is neither a run's folder, which has {SUMMARY}, nor a model folder, with config.json")


def _of_run(place: Path, which: str | None) -> Exported:
    try:
        summary = read_json(place / SUMMARY)
        stages = {stage: Path(said["path"]) for stage, said in summary["stages"].items()}
    except ValueError as error:
        raise UserError(f"{place / SUMMARY} {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{place / SUMMARY} does not say where the models of this run are") from error
    made = [name for name, stage in WHICH.items() if stage in stages]
    if not made or which not in (None, *made):
        raise UserError(f"{place} made {' and '.join(made) or 'no model'}{'' if which is None else f', not {which}'}")
    which = which or made[0]
    folder = stages[WHICH[which]] / "model"
    if not folder.is_dir():
        raise UserError(
            f"{folder}, the {which} model of {place}, is not there: run its command again from the same folder, with"
            " keep=model"
        )
    return _looked_at(Exported(folder, which, summary, base=_base(place)))


def _base(run: Path) -> Base:
    """The dense model by the run's config.yaml."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return Base.of(config["model"])
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{run / 'config.yaml'}, which names the dense model, cannot be read: {error}") from error


def _looked_at(found: Exported) -> Exported:
    return replace(found, description=model_folder.look(found.folder, str(found.folder)).description)


def check_free(target: Path) -> None:
    """Raise `UserError` if something is at ``target``, or it would lie in a result of the store."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} is there already; name another with --out")
    inside = [parent for parent in target.absolute().parents if (parent / "stage.json").is_file()]
    if inside:
        raise UserError(f"{target} lies in {inside[0]}, a result of the store; name a place outside with --out")
