"""What all commands answer: which version they are, and a shell that asks what may come next."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from unittest import mock

import pytest
from conftest import run_slm

import slm_pipeline

COMMANDS = ["analyze", "bench", "export", "fetch", "report", "store", "study"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_its_version(command, capsys):
    main = import_module(f"slm_pipeline.commands.{command}").main
    with mock.patch.object(sys, "argv", [f"slm-{command}", "--version"]), suppress(SystemExit):
        main()
    assert capsys.readouterr().out == f"slm_pipeline {slm_pipeline.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_is_for_a_terminal(command, capsys):
    main = import_module(f"slm_pipeline.commands.{command}").main
    with mock.patch.object(sys, "argv", [f"slm-{command}", "--help"]), suppress(SystemExit):
        main()
    said = capsys.readouterr().out
    assert f"slm-{command}" in said
    assert "`" not in said


def test_slm_says_its_version_and_not_hydras():
    assert run_slm("method=laco", "--version").out == f"slm_pipeline {slm_pipeline.__version__}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("slm-store ver", ["verify"]),
        ("slm-analyze pai", ["painters"]),
        ("slm-analyze similarity analysis.ta", ["analysis.tasks="]),
        ("slm-bench eff", ["efficiency"]),
    ],
)
def test_a_shell_is_told_what_may_come_next(line, words, tmp_path):
    """As the functions of ``register-python-argcomplete`` ask."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "words")
    module = f"slm_pipeline.commands.{line.split()[0].removeprefix('slm-')}"
    subprocess.run([sys.executable, "-m", module], env={**os.environ, **asked}, check=True)
    assert (tmp_path / "words").read_text().split() == words


@pytest.mark.parametrize("command", ["analyze", "bench"])
def test_help_that_nobody_reads_to_its_end_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    main = import_module(f"slm_pipeline.commands.{command}").main
    with (
        os.fdopen(writer, "w", buffering=1) as pipe,
        mock.patch.object(sys, "argv", [f"slm-{command}", "--help"]),
        mock.patch.object(sys, "stdout", pipe),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert end.value.code == 0
