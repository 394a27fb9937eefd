"""``stage.json``: what a finished result says of itself, and whether its files are still what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_pipeline.errors import UserError
from slm_pipeline.store import checksums


def read_record(path: Path, stage: str) -> dict[str, Any]:
    """The content of a finished result's ``stage.json``.

    Raises:
        UserError: it is not there, damaged, or of another result.
    """
    try:
        record = checksums.read_sealed(path / "stage.json")
        types: dict[str, Any] = {"key": str, "result": dict, "seconds": (int, float), "peak_memory_gb": (int, float)}
        if record.get("stage") != stage or record.get("key") != path.name:
            raise ValueError("stage.json is of another result")
        if not all(isinstance(record.get(name), kind) for name, kind in types.items()):
            raise ValueError("stage.json lacks what it should hold")
        if not isinstance(record["provenance"]["versions"], dict) or not isinstance(record.get("files", {}), dict):
            raise ValueError("stage.json lacks what it should hold")
    except FileNotFoundError as error:
        raise UserError(f"{path}: stage.json is not there") from error
    except OSError as error:
        raise UserError(f"{path}: stage.json cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return record


def result_fault(path: Path, stage: str, *, whole: bool) -> str | None:
    """What is wrong with a finished result, in words; None if nothing is. See `checksums.fault`.

    Results of versions that kept no checksums are taken as they are if their JSON and tensor files may be whole.
    """
    try:
        record = read_record(path, stage)
        if "files" not in record:
            return checksums.unreadable(path)
        return checksums.fault(path, record["files"], whole=whole)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    except (ValueError, LookupError, TypeError) as error:
        return f"stage.json is damaged: {error}"
