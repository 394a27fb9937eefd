"""One command of each kind that the documents show is run, on models and texts of a few numbers and words.

That all the others are understood is in test_documents.py; those of the tutorial run in test_tutorial.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
from conftest import run_slm
from model_folders import save
from shown_commands import COMMANDS, RUN
from small_pipeline import write_data

SEVERAL = ("slm-analyze", "slm-bench", "slm-export", "slm-store", "slm-study")  # what they do is their second word


def test_every_kind_of_command_is_here():
    """Of programs that do several things each of them; what is elsewhere has bundled models, or a GPU in mind."""

    def kinds(commands):
        return {tuple(shlex.split(command)[: 1 + command.startswith(SEVERAL)]) for command in commands}

    assert set(RUN) <= set(COMMANDS)
    benchmarks = ("recovery", "sweep", "efficiency", "repair", "disk", "performance")
    elsewhere = {("slm-fetch",), *(("slm-bench", name) for name in benchmarks)}
    assert kinds(COMMANDS) - kinds(RUN) == elsewhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them are started, with what they name."""
    found = tmp_path_factory.mktemp("commands")
    data = write_data(found / "data")
    (data / "book.txt").write_text((data / "text.txt").read_text())
    save(found / "model", "llama", intermediate_size=64)
    return found


def called(command: str, folder: Path) -> list[str]:
    """The command's words with names of what is there; ``RUN`` is the last single run that kept a model."""
    runs = [path.parent for path in folder.glob("outputs/runs/slm/*/model_card.md")]
    names = {"model.path=FOLDER": "model.path=model", "evaluation.data=FOLDER": "evaluation.data=.", "FOLDER": "padded"}
    names |= {"DIR": "outputs/sweeps/first", "RUN": str(max(runs, default="none yet"))}
    words = [names.get(word, word) for word in [*shlex.split(command), *RUN[command]]]
    if "analysis.plans=plan.json" in words:
        shutil.copyfile(min(runs) / "plan.json", folder / "plan.json")
    return [word.replace("dir=DIR", "dir=outputs/sweeps/first") for word in words]


def said(program: str, words: list[str]) -> str:
    """What the command prints; it must end well."""
    if program == "slm":
        outcome = run_slm(*words)
        assert outcome.status == 0, outcome.err
        return outcome.out
    printed, status = StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [program, *words])
        try:
            import_module(f"slm_pipeline.commands.{program.removeprefix('slm-')}").main()
        except SystemExit as end:
            status = end.code
    assert not status, printed.getvalue()
    return printed.getvalue()


def test_one_command_of_each_kind_ends_well(folder, monkeypatch):
    """One after the other in one folder, as somebody who tries them all."""
    monkeypatch.chdir(folder)
    for command in RUN:
        program, *words = called(command, folder)
        printed = said(program, words)
        assert printed, command
        assert not re.search("would fail|FAILED", printed), command
