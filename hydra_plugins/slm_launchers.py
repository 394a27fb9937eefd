"""What ``hydra/launcher=slurm`` and ``slurm_local`` start. Hydra takes launchers from ``hydra_plugins`` alone.

The submitit plugin's own launchers ask ``sacct`` how a job is. Without Slurm's accounting they wait for ever for one
that was cancelled; with it, they give up the whole study because of it. These wait for every job, and a job that left
no result is a FAILED row of the study with its reason.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from omegaconf import OmegaConf, open_dict

from slm_pipeline.errors import UserError

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 30  # seconds between two questions to Slurm
_LATE_RESULT = 15  # seconds that a network file system may take to show the result of a job that has ended
_ENDED = {  # Slurm's words for a job that will not run again
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}


class _Launcher(BaseSubmititLauncher):
    """Submits all jobs of a study and waits until each has left a result or has ended without one."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        log.info("%d jobs for %s, in %s", len(job_overrides), self._EXECUTOR, self.config.hydra.sweep.dir)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        calls = [
            (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
            for number, overrides in zip(numbers, job_overrides, strict=True)
        ]
        jobs = self._submit(self._executor(), calls)
        ended = self._wait(jobs)
        return [
            self._result(job, ended.get(job.job_id, ""), number, overrides)
            for job, number, overrides in zip(jobs, numbers, job_overrides, strict=True)
        ]

    def _executor(self) -> Any:
        import submitit

        of_all = set(OmegaConf.structured(BaseQueueConf).keys())
        options = {key if key in of_all else f"{self._EXECUTOR}_{key}": value for key, value in self.params.items()}
        folder = options.pop("submitit_folder")
        options.pop("local_array_parallelism", None)
        first = {key: options.pop(key) for key in (f"{self._EXECUTOR}_max_num_timeout",) if key in options}
        try:
            executor = submitit.AutoExecutor(cluster=self._EXECUTOR, folder=folder, **first)
        except RuntimeError as error:  # no Slurm here
            raise UserError(f"hydra/launcher={self._EXECUTOR}: {error}") from error
        executor.update_parameters(**options)
        return executor

    @abstractmethod
    def _submit(self, executor: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
        """Start the jobs, or put them into the queue."""

    @abstractmethod
    def _how_they_ended(self, jobs: list[Any]) -> dict[str, str] | None:
        """Of the jobs that will not run again: how each ended, in words, by its id; None if nobody can say now."""

    def _wait(self, jobs: list[Any]) -> dict[str, str]:
        """Wait for all; how those without a result ended, by job id."""
        waiting = {job.job_id: job for job in jobs}
        ended: dict[str, str] = {}
        ended_at: dict[str, float] = {}
        asked_at, pause = float("-inf"), 1.0
        while waiting:
            now = time.monotonic()
            if now - asked_at > pause:
                found = self._how_they_ended(list(waiting.values()))
                if found is not None:
                    for job_id in waiting.keys() & ended.keys() - found.keys():  # Slurm took it back into its queue
                        del ended[job_id], ended_at[job_id]
                    for job_id, how in found.items():
                        ended[job_id] = how
                        ended_at.setdefault(job_id, now)
                asked_at, pause = time.monotonic(), min(1.5 * pause, _LONGEST_PAUSE)
            for job_id, job in list(waiting.items()):
                if job.paths.result_pickle.exists():
                    ended.pop(job_id, None)
                    del waiting[job_id]
                elif now - ended_at.get(job_id, now) > _LATE_RESULT:
                    del waiting[job_id]
            time.sleep(0.5)
        return ended

    def _result(self, job: Any, ended: str, number: int, overrides: Sequence[str]) -> JobReturn:
        from submitit.core.utils import UncompletedJobError

        where = f"{self._EXECUTOR} job {job.job_id}"
        if ended:
            reason = f"{where} {ended}"
        else:
            try:
                outcome, value = job._get_outcome_and_result()
            except Exception as error:  # whatever its result needs to be read is not there
                outcome, value = "error", f"its result cannot be read: {error}"
            if outcome == "success":
                if not isinstance(value._return_value, UncompletedJobError):
                    return value
                value = str(value._return_value)
            reason = f"{where}: {value.strip().splitlines()[-1]}"
        output = f"; its output: {os.path.relpath(job.paths.stderr)}" if job.paths.stderr.exists() else ""
        error = UserError(reason + output)
        self._record(number, overrides, error)
        return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=error)

    def _record(self, number: int, overrides: Sequence[str], error: UserError) -> None:
        from slm_pipeline.jobs.runner import record_lost_job

        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config.hydra.job):
            config.hydra.job.num = number
        record_lost_job(config, error)


class SlurmLauncher(_Launcher):
    """One array job in Slurm's queue."""

    _EXECUTOR = "slurm"

    def _submit(self, executor: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
        from submitit.core.utils import FailedJobError

        try:
            jobs = executor.map_array(self, *zip(*calls, strict=True))
        except FailedJobError as error:
            raise UserError(f"hydra/launcher=slurm: {' '.join(str(error).split())}") from error
        array = jobs[0].job_id.partition("_")[0]
        log.info("array job %s; if this command ends before them, the jobs go on: squeue -j %s", array, array)
        return jobs

    def _how_they_ended(self, jobs: list[Any]) -> dict[str, str] | None:
        command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T"]
        try:
            lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("cannot ask Slurm how the jobs are, asking again: %s", getattr(error, "stderr", "") or error)
            return None
        states = dict(line.split("|") for line in lines)
        return {
            job.job_id: f"ended without a result: {states.get(job.job_id, 'it left the queue, cancelled or lost')}"
            for job in jobs
            if states.get(job.job_id, "COMPLETED") in _ENDED
        }


class LocalLauncher(_Launcher):
    """Processes of this machine, started through the same files; ``array_parallelism`` of them at a time."""

    _EXECUTOR = "local"

    def _submit(self, executor: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
        jobs: list[Any] = []
        for call in calls:
            while sum(not job.done() for job in jobs) >= self.params["array_parallelism"]:
                time.sleep(0.2)
            jobs.append(executor.submit(self, *call))
        return jobs

    def _how_they_ended(self, jobs: list[Any]) -> dict[str, str]:
        return {job.job_id: "ended without a result: it was killed" for job in jobs if job.done()}
