"""What the commands that take flags have in common: ``--version``, and completion in bash, zsh and fish."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import argcomplete

from slm_pipeline.cli import VERSION


def parsed(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The words of the command line, or others; answers a shell that asks what may come next, and ``--version``."""
    parser.add_argument("--version", action="version", version=VERSION)
    argcomplete.autocomplete(parser)
    return parser.parse_args(words)
