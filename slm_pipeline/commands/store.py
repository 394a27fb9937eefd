"""``slm-store``: what the store holds, whether it is as it was written, and what is no longer needed.

slm-store list      every result, largest first
slm-store verify    read every file and compare it with its checksum; exit status 1 if something is damaged, 0 if not:
                    what is not the store's own is named, and neither damage nor removed
slm-store clean     what no run uses; what cannot be proven unused stays and is listed with the reason
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slm_pipeline.cli import errors_in_one_line
from slm_pipeline.commands.arguments import parsed
from slm_pipeline.config import STAGES
from slm_pipeline.errors import UserError
from slm_pipeline.results.number import Number
from slm_pipeline.store.artifact import layout_faults
from slm_pipeline.store.files import remove
from slm_pipeline.store.record import read_record, result_fault
from slm_pipeline.store.users import FOLDER, Use, Users

FOREIGN = "not of this store: move it away"
_OWN_NAME = re.compile(r"[0-9a-f]+(\.partial|\.old)*")
HOUR = 3600  # seconds; temporary files that are older are of writes that were killed


@dataclass(frozen=True)
class Entry:
    """A folder of the store: a finished result, or what an interrupted job left.

    Attributes:
        state: "finished", "unfinished", "left over" of a removal that was killed, "damaged: WHY", or `FOREIGN`.
        record: what stage.json holds; empty if it is not finished.
    """

    path: Path
    stage: str
    state: str
    num_bytes: int
    age_days: float
    use: Use
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """``<stage>/<key>`` of the result that it is, or is work on."""
        return f"{self.stage}/{self.path.name.partition('.')[0]}"

    @property
    def lock(self) -> Path:
        return self.path.with_name(f"{self.path.name.partition('.')[0]}.lock")


def read_store(output_dir: Path, users: Users | None = None) -> list[Entry]:
    """Every entry below ``<output_dir>/store``, largest first; nothing that lies there makes it fail."""
    users = users or Users(output_dir)
    entries = [
        _read_entry(path, stage, users)
        for stage in STAGES
        for path in sorted((output_dir / "store" / stage).glob("*"))
        if path.suffix != ".lock" and not path.name.startswith(".")
    ]
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: -entry.num_bytes)


def _read_entry(path: Path, stage: str, users: Users) -> Entry | None:
    """None if it has been removed meanwhile."""
    sizes, newest = [], 0.0
    for folder, _, files in os.walk(path):
        for file in (Path(folder, name) for name in files):
            try:
                state = file.lstat()
            except OSError:  # a job is at work
                continue
            sizes.append(state.st_size)
            newest = max(newest, state.st_mtime)
    try:
        newest = newest or path.lstat().st_mtime
    except OSError:
        return None
    record: dict[str, Any] = {}
    if not _OWN_NAME.fullmatch(path.name):
        described = FOREIGN
    elif path.suffix:
        described = "left over" if path.suffix == ".old" else "unfinished"
    elif wrong := result_fault(path, stage, whole=False):
        described = f"damaged: {wrong}"
    else:
        described, record = "finished", read_record(path, stage)
    use = users.of(f"{stage}/{path.name.partition('.')[0]}")
    return Entry(path, stage, described, sum(sizes), (time.time() - newest) / 86400, use, record)


def reason_to_keep(entry: Entry, use: Use, *, gone: bool = False, unrecorded: bool = False) -> str | None:
    """Why an entry cannot be removed, in words; None if nobody uses it. See `Use.kept_because`."""
    if entry.state == FOREIGN:
        return FOREIGN
    return None if entry.state == "left over" else use.kept_because(gone=gone, unrecorded=unrecorded)


def clean(entries: Sequence[Entry], users: Users, *, gone: bool = False, unrecorded: bool = False) -> list[Entry]:
    """Remove those of ``entries`` that nobody uses and no job is working on; returns what was removed."""
    removed = []
    for entry in entries:
        try:
            with FileLock(entry.lock, timeout=0):
                users.refresh()  # a run notes what it uses before it asks for the lock
                if reason := reason_to_keep(entry, users.of(entry.name), gone=gone, unrecorded=unrecorded):
                    print(f"in use by now, left alone: {entry.path}: {reason}")
                    continue
                doomed = entry.path.with_name(f"{entry.path.name}.old")  # a result half deleted must not look whole
                remove(doomed)
                os.replace(entry.path, doomed)
                remove(doomed)
                removed.append(entry)
        except Timeout:
            print(f"in use, left alone: {entry.path}")
        except FileNotFoundError:  # another one cleans too
            continue
        except OSError as error:
            print(f"cannot be removed, left alone: {entry.path}: {error.strerror}")
    return removed


def sweep(store: Path) -> None:
    """Remove what killed writes have left outside the results: those in results go with the work on them."""
    for folder in (store, store / FOLDER, *(store / stage for stage in STAGES)):
        for file in folder.glob(".*.tmp"):
            try:
                if time.time() - file.lstat().st_mtime > HOUR:
                    remove(file)
            except OSError:
                continue


def verify(entries: Sequence[Entry]) -> bool:
    """Read every file of the finished results and print what is wrong with them; whether nothing is."""
    damaged, without = 0, 0
    for entry in (entry for entry in entries if entry.state == FOREIGN):
        print(f"{entry.path}: {FOREIGN}")
    results = [entry for entry in entries if entry.state != FOREIGN and not entry.path.suffix]
    for entry in results:
        if wrong := result_fault(entry.path, entry.stage, whole=True):
            damaged += 1
            print(f"{entry.path}: {wrong}")
        elif "files" not in entry.record:
            without += 1
            print(f"{entry.path}: of a version that kept no checksums; it can be read")
    whole = len(results) - damaged - without
    print(f"{len(results)} results: {whole} as they were written, {without} without checksums, {damaged} damaged")
    if damaged:
        print("the command that made a damaged result makes it again")
    return not damaged


def _line(entry: Entry, models: Mapping[str, str]) -> str:
    what = _said(entry.record, models) if entry.state == "finished" else entry.state
    runs = "run " if len(entry.use.runs) == 1 else "runs"
    return (
        f"{entry.stage:<10} {entry.path.name:<24} {_size(entry.num_bytes):>9} {entry.age_days:>6.1f} d"
        f" {len(entry.use.runs):>5} {runs}  {what}"
    )


def models_of(entries: Sequence[Entry]) -> dict[str, str]:
    """What the results call a model -> what it is, in words, as far as the store knows what made it."""
    found: dict[str, str] = {}
    for entry in entries:
        identity, result = _identity(entry.record), entry.record.get("result", {})
        if isinstance(dense := identity.get("model"), str):
            found[dense] = "dense"
        made_by = next((identity[group] for group in ("recovery", "repair", "method") if group in identity), None)
        if isinstance(made_by, str):
            layers = result.get("num_layers", {}).get("pruned") if isinstance(result.get("num_layers"), dict) else None
            words = f"{made_by}, {layers} layers" if layers is not None else made_by
            if "checkpoint" in result:
                found.setdefault(str(result["checkpoint"]), words)
            found[f"recovered:{entry.path.name}"] = words
    return found


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    identity = record.get("identity")
    return identity if isinstance(identity, dict) else {}


def _said(record: dict[str, Any], models: Mapping[str, str]) -> str:
    """What made a result, of which model, and what it is."""
    found = _identity(record)
    made_by = next((found[group] for group in ("recovery", "repair", "method") if group in found), None)
    scored = models.get(str(found["checkpoint"])) if "checkpoint" in found else None
    after = f"after {scored}" if made_by and scored else scored if "measure" in found else None
    who = " ".join(filter(None, [made_by if isinstance(made_by, str) else "", after]))
    return ": ".join(filter(None, [who, _about(record)]))


def _about(record: dict[str, Any]) -> str:
    """A few words on what a result is, from its stage.json."""
    result = record["result"]
    try:
        if "num_layers" in result:
            return f"{result['num_layers']['dense']} -> {result['num_layers']['pruned']} layers: {result['layers']}"
        if "divergence" in result:
            pruned, repaired = (result["divergence"][name]["kl"] for name in ("pruned", "repaired"))
            return f"KL from the dense model {pruned:.4g} -> {repaired:.4g} nats"
        if "num_tokens" in result and "source" in result:
            return f"{result['source']}, {result['num_samples']} x {result['seq_len']} tokens"
        if "numbers" in result:
            numbers = [Number.from_json(key, said) for key, said in result["numbers"].items()]
            return ", ".join(f"{number.below(result['label']).key} {number}" for number in numbers)
        corpora = (f"perplexity {corpus}" for corpus in result.get("perplexity", {}))
        return ", ".join([*result.get("zero_shot", {}), *corpora])  # of a version that kept all measures together
    except (LookupError, TypeError):  # another version's
        return ""


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000  # type: ignore[assignment]
    raise AssertionError


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(
        prog="slm-store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["list", "verify", "clean"])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="default: outputs")
    parser.add_argument("--stage", choices=STAGES, help="only this stage's results")
    parser.add_argument("--older-than", type=float, default=0, metavar="DAYS", help="clean: only what is older")
    parser.add_argument("--gone", action="store_true", help="clean: runs whose folders are not there were deleted")
    parser.add_argument("--unrecorded", action="store_true", help="clean: also what no run has noted that it uses")
    parser.add_argument("--yes", action="store_true", help="clean: remove; without it, only say what would be removed")
    arguments = parsed(parser)
    with errors_in_one_line():
        if not (arguments.output_dir / "store").is_dir():
            raise UserError(f"{arguments.output_dir} holds no store; name another with --output-dir")
        faults = layout_faults(arguments.output_dir / "store", STAGES)
        for fault in faults:
            print(fault)
        users = Users(arguments.output_dir)
        found = read_store(arguments.output_dir, users)
        entries = [entry for entry in found if arguments.stage in (None, entry.stage)]
        if arguments.command == "verify":
            sys.exit(0 if verify(entries) and not faults else 1)
        models = models_of(found)
        if arguments.command == "list":
            print(f"{'stage':<10} {'key':<24} {'size':>9} {'age':>8} {'used by':>10}  what it is")
            for entry in entries:
                print(_line(entry, models))
            print(f"{len(entries)} results, {_size(sum(entry.num_bytes for entry in entries))}")
        else:
            _clean(entries, users, arguments, models)


def _clean(entries: list[Entry], users: Users, arguments: argparse.Namespace, models: Mapping[str, str]) -> None:
    proofs = {"gone": arguments.gone, "unrecorded": arguments.unrecorded}
    unused = []
    for entry in (entry for entry in entries if entry.age_days >= arguments.older_than):
        reason = reason_to_keep(entry, entry.use, **proofs)
        if reason is None:
            unused.append(entry)
        elif not entry.use.runs:
            print(f"{_line(entry, models)}\n    stays: {reason}")
    if arguments.yes:
        unused = clean(unused, users, **proofs)
        users.forget({entry.name for entry in unused})
        sweep(arguments.output_dir / "store")
    for entry in unused:
        print(_line(entry, models))
    total = _size(sum(entry.num_bytes for entry in unused))
    if arguments.yes:
        print(f"removed {len(unused)} results, {total}")
    else:
        print(f"would remove {len(unused)} results that no run uses, {total}; add --yes to do it")


if __name__ == "__main__":
    main()
