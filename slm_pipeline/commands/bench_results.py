"""What a benchmark leaves: numbers beside what is asked, as a table, as JSON and as a picture for `slm-report`."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.machine import provenance
from slm_pipeline.show.bars import bars
from slm_pipeline.show.tables import Table
from slm_pipeline.store.files import write_json

if TYPE_CHECKING:
    from slm_pipeline.jobs.job import Job

SHAPE = (  # Llama-2-7B's, with random weights
    *("model=random", "model.num_layers=32", "model.hidden_size=4096", "model.intermediate_size=11008"),
    *("model.num_heads=32", "model.num_kv_heads=32", "model.vocab_size=32000", "model.dtype=bfloat16"),
)
QUIET = ("evaluation=none", "tracker=jsonl", "pictures=false")


@dataclass(frozen=True)
class Result:
    """One number.

    Attributes:
        got: None if it was not reached; ``how`` says why.
        unit: x of a ratio of times, s, GB.
        how: what it comes from, such as the two sides of a ratio.
    """

    what: str
    got: float | None
    unit: str = "x"
    at_least: float | None = None
    at_most: float | None = None
    how: str = ""

    @property
    def asked(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g} {self.unit}"
        if self.at_least is not None:
            return f"at least {self.at_least:g} {self.unit}"
        return "" if self.at_most is None else f"at most {self.at_most:g} {self.unit}"

    @property
    def met(self) -> str:
        """yes | no, or nothing where nothing is asked."""
        if not self.asked:
            return ""
        low = self.at_least is None or (self.got is not None and self.got >= self.at_least)
        high = self.at_most is None or (self.got is not None and self.got <= self.at_most)
        return "yes" if low and high else "no"

    def cells(self) -> list[str]:
        return [self.what, self.asked, "" if self.got is None else f"{self.got:.3g} {self.unit}", self.met, self.how]


COLUMNS = ("what", "asked", "got", "met", "how")


def table(results: Iterable[Result]) -> str:
    """As Markdown."""
    return Table(COLUMNS, [result.cells() for result in results]).markdown()


def conditions(program: Sequence[str], words: Sequence[str], model: str) -> dict[str, Any]:
    """Under which a benchmark ran, as JSON: date, command, model, device, versions."""
    made = provenance.collect()
    return {
        "command": shlex.join([*program, *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": model},
        "device": made["device"],
        "versions": made["versions"],
    }


def leave(group: str, job: Job, words: Sequence[str], results: Sequence[Result]) -> None:
    """Write ``bench_<group>.json`` and its picture below ``<output_dir>/bench/<group>/<time>``, and say so."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    folder = Path(job.config.output_dir).expanduser() / "bench" / group / now
    write(group, job, words, results, folder)
    draw(group, results, folder)


def write(group: str, job: Job, words: Sequence[str], results: Sequence[Result], folder: Path) -> None:
    """Write ``bench_<group>.json`` in the place of one that has fewer results."""
    header = conditions(["slm-bench", group], words, job.source.name)
    write_json(folder / f"bench_{group}.json", header | {"results": [asdict(result) for result in results]})


def draw(group: str, results: Sequence[Result], folder: Path) -> None:
    """The picture beside it; says where both are."""
    bars([(one.what, one.got, one.unit, one.at_least or one.at_most) for one in results], folder / f"bench_{group}")
    print(f"wrote {folder / f'bench_{group}.json'}")


def read(file: Path) -> tuple[dict[str, Any], list[Result]]:
    """What `write` wrote: the conditions, and the results."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content, [Result(**result) for result in content.pop("results")]
