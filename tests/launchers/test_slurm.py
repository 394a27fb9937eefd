"""A study through a real Slurm: one node on loopback, beside whatever Slurm this machine may have."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_slm

from slm_pipeline.report.runs import read_runs

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parent.parent.parent

SLURM_CONF = """
ClusterName=slm_test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=2
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(what: str, found: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true value of ``found``."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)
    return value


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """A Slurm of its own, found by ``SLURM_CONF``: authentication, controller, one node, no accounting."""
    daemons = ("munged", "slurmctld", "slurmd")
    programs = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in daemons}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.fail(
            f"no {', '.join(missing)} here: tests marked slurm need Debian's packages slurmctld slurmd slurm-client"
            " munge (.ci/system-packages installs them), or leave them out: -m 'not slurm'"
        )
    # Not pytest's folder: munge wants one that everybody may enter, and sockets have short names.
    with tempfile.TemporaryDirectory(prefix="slm-slurm-") as name, pytest.MonkeyPatch.context() as environment:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "munge.key").write_bytes(random.Random().randbytes(128))
        (folder / "munge.key").chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        controller_port, node_port = free_ports(2)
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=host,
                folder=folder,
                controller_port=controller_port,
                node_port=node_port,
                user=os.environ.get("USER", "root") if os.getuid() else "root",
            )
        )
        environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        files = {"socket": "munge.socket", "key-file": "munge.key", "seed-file": "seed", "pid-file": "munged.pid"}
        munge_options = [f"--{option}={folder / file}" for option, file in files.items()]
        commands = [
            [programs["munged"], "--foreground", "--force", f"--log-file={folder}/munged.log", *munge_options],
            [programs["slurmctld"], "-D"],
            [programs["slurmd"], "-D"],
        ]
        running = []
        try:
            for command in commands:
                with open(folder / "daemons.log", "a") as log:
                    running.append(subprocess.Popen(command, stdout=log, stderr=log))
                if command[0] == programs["munged"]:
                    wait_for("munge's socket", (folder / "munge.socket").exists, 30)
            try:
                wait_for("an idle node", lambda: "idle" in told("sinfo", "--noheader", "--format=%t"), 60)
            except AssertionError:
                pytest.fail("".join(path.read_text() for path in sorted(folder.glob("*.log"))))
            yield
        finally:
            subprocess.run(["scancel", f"--user={os.getuid()}"], capture_output=True)
            for daemon in reversed(running):
                daemon.terminate()
                daemon.wait(30)


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two thresholds that give different depths, each with a training of some seconds."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    words = ["river", "mill", "tree", "runs", "past", "the", "a", "old"]

    def sentence(length: int) -> str:
        return " ".join(generator.choice(words) for _ in range(length))

    (folder / "text.txt").write_text(sentence(1000))
    examples = [{"instruction": sentence(2), "input": "", "output": sentence(4)} for _ in range(30)]
    (folder / "alpaca.json").write_text(json.dumps(examples))
    return [
        "-m", "sweeps=thresholds", "threshold.value=0.9,0.5", "model=random", "model.num_layers=6",
        "model.hidden_size=32", "model.intermediate_size=48", "tracker=jsonl", f"data_dir={folder}",
        "calibration=text_file", "calibration.path=text.txt", "calibration.num_samples=2", "calibration.seq_len=32",
        "recovery=lora", "recovery.source=file", "recovery.path=alpaca.json", "recovery.validation_size=4",
        "recovery.max_steps=120", "recovery.num_epochs=100", "recovery.batch_size=2", "recovery.micro_batch_size=2",
        "recovery.warmup_steps=1", "recovery.eval_steps=20", "recovery.save_steps=20", "recovery.dtype=float32",
        "evaluation=perplexity",
        "evaluation.of=[dense,pruned,recovered]", "evaluation.perplexity.corpora=[text.txt]",
        "evaluation.perplexity.window=64",
    ]  # fmt: skip


def table(sweep: Path) -> list[dict[str, Any]]:
    """What the study found, without times and places."""
    rows = []
    for job in ("0", "1"):
        summary = json.loads((sweep / job / "summary.json").read_text())
        plan = json.loads((sweep / job / "plan.json").read_text())
        names = ("threshold", "num_layers", "parameters", "layer_groups", "metrics")
        rows.append({name: summary[name] for name in names} | {"steps": plan["scores"]["steps"]})
    return rows


def test_a_study_on_slurm_survives_a_requeue_and_a_cancelled_job(slurm, study, tmp_path, monkeypatch):
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    assert run_slm(*study, f"output_dir={tmp_path}/local").status == 0
    (local,) = (tmp_path / "local" / "sweeps").glob("*/*")
    expected = table(local)
    assert [row["num_layers"]["pruned"] for row in expected] == [5, 3]

    monkeypatch.chdir(tmp_path)
    command = [
        sys.executable, "-m", "slm_pipeline", *study, "output_dir=cluster", "hydra/launcher=slurm",
        "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1",
    ]  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "cluster" / "store"
    ids = wait_for("the queue", lambda: told("squeue", "--noheader", "--array", "--format=%i").split())
    assert [job_id.partition("_")[2] for job_id in sorted(ids)] == ["0", "1"]

    def job_in_training(number: int) -> str:
        """The id of a job that is in its recovery, past the first checkpoint."""
        (job_id,) = (job_id for job_id in ids if job_id.endswith(f"_{number}"))
        metrics = f"cluster/sweeps/*/*/{number}/metrics.jsonl"
        step = '"stage": "recover", "step": 40'
        wait_for("its step", lambda: [path for path in tmp_path.glob(metrics) if step in path.read_text()])
        return job_id

    first = job_in_training(0)
    subprocess.run(["scancel", "--signal=USR2", first], check=True)  # as before a preemption
    second = job_in_training(1)
    number = told("squeue", "--noheader", f"--jobs={second}", "--format=%A").strip()
    processes = [line.split() for line in told("scontrol", "listpids", number).splitlines()[1:]]
    assert processes
    subprocess.run(["scancel", second], check=True)
    for process_id, _, step, *_ in processes:
        if step == "0":  # Slurm itself kills it seconds later, when it may have ended
            os.kill(int(process_id), signal.SIGKILL)
    wait_for("the requeued job", lambda: first in told("squeue", "--array", "--states=PENDING", "--format=%i").split())
    (sweep,) = (tmp_path / "cluster" / "sweeps").glob("*/*")
    assert read_runs(sweep)[0].status == "queued"
    subprocess.run(["scontrol", "update", f"JobId={first}", "StartTime=now"], check=True)  # else in two minutes

    try:
        _, errors = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
    assert launcher.returncode == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "ended without a result: CANCELLED" in line
    summary = (sweep / "summary.md").read_text()
    assert "2 jobs, 1 done, 1 FAILED" in summary
    assert "ended without a result: CANCELLED" in summary
    log = (sweep / "0" / "slm.log").read_text()
    assert "recover: continues" in log  # the same job again, from its last checkpoint
    assert log.count("step 0 of 120") == log.count("step 120 of 120") == 1
    assert json.loads((sweep / "0" / "summary.json").read_text())["stages"]["merge"]["reused"]
    assert [path.suffix for path in store.glob("recover/*") if path.is_dir()].count(".partial") == 1

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    (new,) = set((tmp_path / "cluster" / "sweeps").glob("*/*")) - {sweep}
    log = (new / "1" / "slm.log").read_text()
    assert "recover: continues" in log
    assert "step 0 of 120" not in log
    reused = json.loads((new / "0" / "summary.json").read_text())["stages"]
    assert all(stage["reused"] for stage in reused.values())
    assert not list(store.glob("*/*.partial"))
    assert table(new) == expected


def test_srun_starts_one_job_in_two_processes(slurm, tmp_path, monkeypatch):
    """Two batches of text, of which each process has one; the same windows are merged."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(["river", "mill", "tree", "runs"], k=5000)))
    command = [
        sys.executable, "-m", "slm_pipeline", "model=random", "model.num_layers=6", "tracker=jsonl", "pictures=false",
        "calibration=text_file", f"calibration.path={tmp_path}/text.txt", "calibration.num_samples=9",
        "calibration.seq_len=1024", "method=slm", "threshold=fixed", "threshold.value=0.9",
        "pruning_ratio=none", "stages=[calibrate,merge]", "keep=plan",
    ]  # fmt: skip
    srun = ["srun", "--ntasks=2", *command, f"output_dir={tmp_path}/two"]
    outcome = subprocess.run(srun, capture_output=True, text=True, timeout=200)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr.count("2 processes of srun work on this") == outcome.stderr.count("merge: done") == 1
    assert run_slm(*command[3:], f"output_dir={tmp_path}/one").status == 0
    two, one = (
        json.loads(next(tmp_path.glob(f"{name}/store/merge/*/plan.json")).read_text()) for name in ("two", "one")
    )
    for row, expected in zip(two["scores"].pop("steps"), one["scores"].pop("steps"), strict=True):
        assert row.pop("similarity") == pytest.approx(expected.pop("similarity"), rel=1e-12)
        assert row == expected
    assert two["scores"].pop("seconds") != one["scores"].pop("seconds")
    assert two == one
