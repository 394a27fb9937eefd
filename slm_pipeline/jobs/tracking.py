"""Where the metrics of a run go: always to ``metrics.jsonl`` in its folder, and to W&B or another service if asked."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slm_pipeline.errors import UserError, only_warned_about
from slm_pipeline.store.files import from_here

if TYPE_CHECKING:
    from slm_pipeline.config import TrackerConfig
    from slm_pipeline.results.number import Number

logger = logging.getLogger(__name__)

OTHERS = ("tensorboard", "mlflow", "trackio")  # in other_trackers.py
_LONGEST_NAME = 128  # characters, as for all of W&B's limits
_LONGEST_TAG = 64


class Tracker:
    """Writes ``<run_dir>/metrics.jsonl``: one JSON object a line, ``{"time", "stage", "step"?, <metric>: <value>...}``.

    Every line is on disk when `log` returns, so a killed run keeps what it measured. Use it as a context manager:
    leaving the block closes the run, as failed if an exception is on its way out. A line that cannot be written, and
    whatever a server does, is a warning: the numbers are in the stages' results.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._warned_about: set[str] = set()
        self._file = open(run_dir / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def log(self, metrics: Mapping[str, float], *, stage: str, step: int | None = None) -> None:
        """Record some numbers.

        Args:
            metrics: finite numbers by name; ``time``, ``stage`` and ``step`` are taken.
            stage: which stage measured them, e.g. ``"recover"``.
            step: the stage's own counter, if the numbers belong to a curve. It need not grow.

        Raises:
            ValueError: a number is NaN or infinite, or a name is taken.
        """
        self._write(metrics, stage, step)

    def _write(self, metrics: Mapping[str, float], stage: str, step: int | None) -> None:
        line: dict[str, Any] = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "stage": stage}
        if step is not None:
            line["step"] = step
        for name, value in metrics.items():
            if name in ("time", "stage", "step"):
                raise ValueError(f"a metric cannot be called {name!r}: metrics.jsonl uses that name itself")
            if not math.isfinite(value):
                raise ValueError(f"{stage}/{name} is {value}" + ("" if step is None else f" at step {step}"))
            line[name] = value if isinstance(value, int) else float(value)
        with only_warned_about("metrics.jsonl lacks a line", self._warned_about):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def numbers(self, numbers: Iterable[Number], *, stage: str) -> None:
        """Record a finished stage's numbers under their own keys, which are the same everywhere."""
        self._write({number.key: number.value for number in numbers}, stage, None)

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        """Show a table. Only servers need it: the run's folder has the same numbers in summary.json and summary.md."""

    def image(self, name: str, path: Path) -> None:
        """Show a PNG file. Only servers need it: the picture lies in the run's folder."""

    def summary(self, numbers: Mapping[str, Number]) -> None:
        """Set the final numbers, by which servers compare runs. The run's folder has them in summary.json."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with only_warned_about("metrics.jsonl was not closed"):
            self._file.close()


class WandbTracker(Tracker):
    """metrics.jsonl, and a W&B run in ``<run_dir>/wandb``. Metrics are named ``<stage>/<metric>`` there.

    A stage's curves have their own axis ``<stage>/step``: W&B drops whatever is logged at a smaller value of its one
    global step, and stages all count from zero.
    """

    def __init__(
        self,
        config: TrackerConfig,
        *,
        mode: str,
        run_dir: Path,
        name: str,
        run_config: dict[str, Any],
        group: str | None,
        tags: list[str],
        job_type: str,
    ) -> None:
        super().__init__(run_dir)
        import wandb

        self._stages_with_steps: set[str] = set()
        with ExitStack() as undo:
            undo.callback(self._file.close)
            undo.enter_context(_wandb_files_in(run_dir / "wandb"))
            try:
                self._run = wandb.init(
                    project=config.project,
                    entity=config.entity,
                    name=name,
                    group=group,
                    job_type=job_type,
                    tags=tags,
                    config=run_config,
                    # Two jobs of a study never share a run, whatever WANDB_RUN_ID says; a single run may continue one.
                    id=None if group is None else secrets.token_hex(8),
                    resume=None if group is None else "never",
                    dir=str(run_dir.absolute()),  # its service may have been started in another folder
                    mode=mode,  # type: ignore[arg-type]
                    # A job of the same process that died inside its run would otherwise get this job's metrics.
                    reinit="finish_previous",
                    settings=wandb.Settings(
                        silent=True, console="off", save_code=False, disable_code=True, disable_git=True
                    ),
                )
            except (wandb.errors.Error, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"W&B did not start a run: {reason}; tracker=jsonl does without it") from error
            self._close = undo.pop_all()
        logger.info("W&B run: %s", self._run.url if mode == "online" else from_here(Path(self._run.dir).parent))

    def log(self, metrics: Mapping[str, float], *, stage: str, step: int | None = None) -> None:
        super().log(metrics, stage=stage, step=step)
        values: dict[str, Any] = {f"{stage}/{name}": value for name, value in metrics.items()}
        with only_warned_about("W&B lacks some metrics", self._warned_about):
            if step is not None:
                if stage not in self._stages_with_steps:
                    self._stages_with_steps.add(stage)
                    self._run.define_metric(f"{stage}/step", hidden=True)
                    self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                values[f"{stage}/step"] = step
            self._run.log(values)

    def numbers(self, numbers: Iterable[Number], *, stage: str) -> None:
        numbers = list(numbers)
        super().numbers(numbers, stage=stage)
        with only_warned_about("W&B lacks some metrics", self._warned_about):
            self._run.log({number.key: number.value for number in numbers})

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        import wandb

        with only_warned_about(f"W&B lacks the table {name}"):
            self._run.log({name: wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)})

    def image(self, name: str, path: Path) -> None:
        import wandb

        with only_warned_about(f"W&B lacks the picture {name}"):
            self._run.log({name: wandb.Image(str(path))})

    def summary(self, numbers: Mapping[str, Number]) -> None:
        errors = {f"{key} stderr": number.stderr for key, number in numbers.items() if number.stderr is not None}
        with only_warned_about("W&B lacks the final numbers"):
            self._run.summary.update({**{key: number.value for key, number in numbers.items()}, **errors})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._close, only_warned_about("the W&B run was not closed"):
            self._run.finish(exit_code=0 if kind is None else 1)


def open_tracker(
    config: TrackerConfig,
    *,
    run_dir: Path,
    name: str,
    run_config: dict[str, Any],
    group: str | None,
    tags: list[str],
    job_type: str,
) -> Tracker:
    """Start tracking one run; use the result in a ``with`` statement.

    Args:
        config: the ``tracker`` group.
        run_dir: the run's folder; everything is written below it, W&B's own files too.
        name: the run's name in W&B.
        run_config: the resolved configuration, as plain containers.
        group: what W&B groups runs by, e.g. the sweep; None for a single run.
        tags: added to ``tracker.tags``.
        job_type: W&B's second grouping, e.g. the last stage that runs.

    Raises:
        UserError: see `check_tracker`; or W&B refused to start the run.
    """
    mode = check_tracker(config)
    if config.kind in OTHERS:
        from slm_pipeline.jobs.other_trackers import Begun, OtherTracker, flat

        all_tags = list(dict.fromkeys([*config.tags, *tags]))
        return OtherTracker(config.kind, Begun(run_dir, config.project, name, group, all_tags, flat(run_config)))
    if mode == "disabled":
        return Tracker(run_dir)
    return WandbTracker(
        config,
        mode=mode,
        run_dir=run_dir,
        name=_cut(name, _LONGEST_NAME, "run name"),
        run_config=run_config,
        group=None if group is None else _cut(group, _LONGEST_NAME, "group"),
        tags=list(dict.fromkeys(_cut(tag, _LONGEST_TAG, "tag") for tag in [*config.tags, *tags])),
        job_type=job_type,
    )


def check_tracker(config: TrackerConfig) -> str:
    """Make sure that the tracker can start, before anything expensive runs.

    ``WANDB_MODE=offline`` and ``WANDB_MODE=disabled`` in the environment win over ``tracker.mode``.

    Returns:
        The W&B mode: ``"online"``, ``"offline"``, or ``"disabled"`` for metrics.jsonl alone.

    Raises:
        UserError: an unknown kind or mode, its package is not installed, or online tracking without an API key.
    """
    if config.kind not in (kinds := ("jsonl", "wandb", *OTHERS)):
        raise UserError(f"tracker.kind={config.kind!r} is not one of {', '.join(kinds)}")
    if config.mode not in ("offline", "online"):
        raise UserError(f"tracker.mode={config.mode!r} is not one of offline, online")
    if config.kind in OTHERS:
        from slm_pipeline.jobs import other_trackers

        other_trackers.check(config.kind)
    if config.kind != "wandb":
        return "disabled"
    mode = _mode(config.mode)
    option = "wandb" if config.mode == "online" else "wandb_offline"
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"tracker={option} needs wandb: pip install wandb, or tracker=jsonl")
    if mode == "online" and not _has_api_key():
        raise UserError(
            "tracker=wandb needs a W&B API key: run `wandb login` or set WANDB_API_KEY, or use tracker=wandb_offline"
        )
    return mode


def _mode(configured: str) -> str:
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted == "dryrun":  # W&B's older word
        wanted = "offline"
    if wanted in ("offline", "disabled") and wanted != configured:
        logger.warning("WANDB_MODE=%s in the environment wins over tracker.mode=%s", wanted, configured)
        return wanted
    if wanted not in ("", configured):
        logger.warning("WANDB_MODE=%s in the environment is ignored: tracker.mode=%s", wanted, configured)
    return configured


def _has_api_key() -> bool:
    """Whether W&B will find credentials by itself; asks neither the user nor the server."""
    import requests  # wandb reads netrc files as requests does
    import wandb

    settings = wandb.setup().settings
    return bool(
        os.environ.get("WANDB_API_KEY")
        or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        or settings.api_key
        or requests.utils.get_netrc_auth(settings.base_url)
    )


def _cut(text: str, limit: int, what: str) -> str:
    """``text`` in the length that W&B's server takes; it would refuse the run, an offline one when it is too late."""
    if len(text) > limit:
        logger.warning("W&B takes a %s of at most %d characters; cut: %s", what, limit, text)
    return text[:limit]


@contextmanager
def _wandb_files_in(folder: Path) -> Iterator[None]:
    """Keep what W&B puts under the home directory (staged tables, caches, its own logs) in ``folder`` instead.

    Folders that the user chose in the environment are left as they are.
    """
    ours = [name for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR") if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, str(folder.resolve())))
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
