"""TensorBoard, MLflow and Trackio beside metrics.jsonl: each a class that begins a run, logs numbers and ends it.

Not accelerate's trackers, which do the same: they need its process state, which a job must leave to the training to
set. Tables stay in the run's folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from slm_pipeline.errors import UserError, only_warned_about
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.results.number import Number

_LONGEST = 500  # characters of a setting: what each of them takes


@dataclass(frozen=True)
class Begun:
    """The run as a service is to know it."""

    folder: Path
    project: str
    name: str
    group: str | None
    tags: list[str]
    settings: dict[str, str]  # the configuration by whole names, such as method.name


class Service(ABC):
    """A run of one of the services. `packages`: any of them will do."""

    packages: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, run: Begun) -> None: ...

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def image(self, name: str, path: Path) -> None:
        """``path``: a PNG file."""

    @abstractmethod
    def end(self, *, failed: bool) -> None: ...


class TensorBoard(Service):
    """Event files in ``<run>/tensorboard``: ``tensorboard --logdir outputs`` shows all runs."""

    packages = ("tensorboard", "tensorboardX")

    def __init__(self, run: Begun) -> None:
        try:
            board: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            board = importlib.import_module("tensorboardX")
        self._writer = board.SummaryWriter(str(run.folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in run.settings.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, path: Path) -> None:
        import numpy
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), dataformats="HWC")
        self._writer.flush()

    def end(self, *, failed: bool) -> None:
        self._writer.close()


class MLflow(Service):
    """A run of the experiment ``tracker.project``, where ``MLFLOW_TRACKING_URI`` says, or in MLflow's default place."""

    packages = ("mlflow",)

    def __init__(self, run: Begun) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(run.project)
        tags = {**({"group": run.group} if run.group else {}), **dict.fromkeys(run.tags, "true")}
        mlflow.start_run(run_name=run.name, tags=tags)
        settings = list(run.settings.items())
        for first in range(0, len(settings), 100):  # as many as it takes at once
            mlflow.log_params(dict(settings[first : first + 100]))

    def log(self, values: Mapping[str, float], step: int) -> None:
        # it refuses all of them for one name with another character, such as that of a setting of speed, 1x32+128
        self._mlflow.log_metrics({re.sub(r"[^\w.:/ -]", "_", name): value for name, value in values.items()}, step=step)

    def image(self, name: str, path: Path) -> None:
        self._mlflow.log_artifact(str(path), "pictures")

    def end(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio(Service):
    """A run of the project ``tracker.project`` on this machine: ``trackio show --project PROJECT``."""

    packages = ("trackio",)

    def __init__(self, run: Begun) -> None:
        import trackio

        self._trackio: Any = trackio
        quiet: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        config = {**run.settings, "tags": ", ".join(run.tags)}
        self._run: Any = trackio.init(run.project, run.name, group=run.group, config=config, **quiet)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Image(str(path))})

    def end(self, *, failed: bool) -> None:
        self._run.finish()


SERVICES: dict[str, type[Service]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "trackio": Trackio}


class OtherTracker(Tracker):
    """metrics.jsonl, and the same in one of `SERVICES`: ``<stage>/<metric>`` of curves, and numbers by their keys."""

    def __init__(self, kind: str, run: Begun) -> None:
        super().__init__(run.folder)
        try:
            self._service = SERVICES[kind](run)
        except Exception as error:
            self._file.close()
            reason = " ".join(str(error).split())
            raise UserError(f"{kind} did not start a run: {reason}; tracker=jsonl does without it") from error
        self._kind = kind
        self._logged: set[str] = set()

    def log(self, metrics: Mapping[str, float], *, stage: str, step: int | None = None) -> None:
        super().log(metrics, stage=stage, step=step)
        self._pass_on({f"{stage}/{name}": value for name, value in metrics.items()}, step or 0)

    def numbers(self, numbers: Iterable[Number], *, stage: str) -> None:
        numbers = list(numbers)
        super().numbers(numbers, stage=stage)
        self._pass_on({number.key: number.value for number in numbers}, 0)

    def summary(self, numbers: Mapping[str, Number]) -> None:
        found = {key: number.value for key, number in numbers.items() if key not in self._logged}
        errors = {f"{key}/stderr": one.stderr for key, one in numbers.items() if one.stderr is not None}
        self._pass_on({**found, **errors}, 0)

    def image(self, name: str, path: Path) -> None:
        with only_warned_about(f"{self._kind} lacks the picture {name}"):
            self._service.image(name, path)

    def _pass_on(self, values: Mapping[str, float], step: int) -> None:
        with only_warned_about(f"{self._kind} lacks some metrics", self._warned_about):
            self._service.log(values, step)
            self._logged |= values.keys()  # what failed is said again at the end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with only_warned_about(f"the {self._kind} run was not closed"):
            self._service.end(failed=kind is not None)
        super().__exit__(kind, error, traceback)


def check(kind: str) -> None:
    """Raise `UserError` if the package of a service is not installed."""
    packages = SERVICES[kind].packages
    if not any(importlib.util.find_spec(name) for name in packages):
        raise UserError(f"tracker={kind} needs {' or '.join(packages)}: pip install {packages[0]}, or tracker=jsonl")


def flat(settings: Any, name: str = "") -> dict[str, str]:
    """``{"method": {"name": "slm"}}`` -> ``{"method.name": "slm"}``; long values are cut."""
    if not isinstance(settings, Mapping) or not settings:
        return {name: str(settings)[:_LONGEST]}
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= flat(value, f"{name}.{key}" if name else str(key))
    return found
