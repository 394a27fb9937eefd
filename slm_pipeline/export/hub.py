"""Push a model to huggingface.co, or to what HF_ENDPOINT names, in one commit. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slm_pipeline.errors import UserError, refused_in_one_line
from slm_pipeline.export.exported import Exported

_LEFT_OUT = ("README.md",)  # the full card takes its place


def files(found: Exported, repo: str) -> dict[str, Path | bytes]:
    """What a repository gets: everything in the model's folder, with the full card; name -> file or content."""
    inside = sorted(file for file in found.folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    named = {file.relative_to(found.folder).as_posix(): file for file in inside}
    kept: dict[str, Path | bytes] = {_place(name): file for name, file in named.items() if name not in _LEFT_OUT}
    return {"README.md": f"{found.card(repo)}\n".encode(), **kept}


def _place(name: str) -> str:
    """Of a plan that lies beside the weights, as checkpoints of before have it, where it belongs."""
    return f"plan/{name}" if name in ("plan.json", "plan.safetensors") else name


def sizes(content: Mapping[str, Path | bytes]) -> dict[str, int]:
    """Bytes of each file."""
    return {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in content.items()}


def endpoint() -> str:
    """Where repositories are: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def push(content: Mapping[str, Path | bytes], repo: str, *, private: bool = False) -> str:
    """Make the repository if it is not there, and commit ``content`` to it; the commit's address.

    The token is the one that huggingface_hub finds: HF_TOKEN, or that of ``hf auth login``.

    Raises:
        UserError: there is no network, no token, or no right to write there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--repo={repo} cannot be reached: HF_HUB_OFFLINE=1 forbids it")
    api = HfApi(endpoint(), library_name="slm-pipeline")
    with refused_in_one_line(f"--repo={repo} was not pushed"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [
            CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in content.items()
        ]
        done = api.create_commit(repo, operations, commit_message="Pushed by slm-export")
    return str(done.commit_url)
