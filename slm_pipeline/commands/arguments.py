"""What the commands that take flags have in common: ``--version``, and completion in bash, zsh and fish."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import argcomplete

from slm_pipeline.cli import VERSION


def parsed(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The words of the command line, or others; answers a shell that asks what may come next, and ``--version``."""
    parser.description = help_text(parser.description)
    parser.add_argument("--version", action="version", version=VERSION)
    argcomplete.autocomplete(parser)
    return parser.parse_args(words)


def help_text(docstring: str | None) -> str:
    """A docstring for a terminal: names without the quotes that they have in code."""
    return (docstring or "").replace("``", "").strip()


def answer_shell(names: Iterable[str], options: Callable[[str], Iterable[str]]) -> None:
    """Answer a shell that asks what may come next after a command that reads its words itself; else nothing.

    Args:
        names: what the first word may be.
        options: how the words after such a name may begin.
    """

    def completer(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
        return list(options(parsed_args.name))

    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(names))
    words: Any = parser.add_argument("words", nargs="*")
    words.completer = completer
    argcomplete.autocomplete(parser)
