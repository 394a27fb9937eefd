"""What W&B wrote, read back record by record from the offline log as it lies on disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def wandb_records(run_dir: Path) -> list[Any]:
    """The protobuf records of the one offline run in ``run_dir``.

    The file is a LevelDB log: 7 bytes of header, then blocks of 32 KiB holding pieces of (checksum, length, kind),
    kind being whole, first, middle or last.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    wandb.teardown()  # the service writes the end of the file after finish() has returned
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, position, parts = [], 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The logged rows without W&B's own ``_step``, ``_runtime`` and ``_timestamp``."""
    rows = [nested(r.history.item) for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "history"]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def nested(items: Any) -> dict[str, Any]:
    """W&B's flat (path, JSON) pairs as dictionaries in dictionaries."""
    result: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = json.loads(item.value_json)
    return result


def only(run_dir: Path, kind: str) -> Any:
    (found,) = [getattr(r, kind) for r in wandb_records(run_dir) if r.WhichOneof("record_type") == kind]
    return found
