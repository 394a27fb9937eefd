"""Tables and lists of text, as people read them on a terminal, in Markdown and in a paper; CSV for programs."""

from __future__ import annotations

import csv
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slm_pipeline.errors import printable

WIDTH = 100  # columns of text that goes to no terminal, and of lines to be read
_LONGEST = 48  # of a cell in a table that has to fit
_NARROWEST = 60  # terminals that are less wide break the lines themselves
MARK = "~"  # may stand behind a number: of two that may be the same
_NUMBER = re.compile(r"[-+0-9]|\([0-9]")  # how one begins, or an interval


@dataclass(frozen=True)
class Table:
    """Cells as text. A column of numbers is set flush right. A head may have several lines, which only a terminal shows
    one below the other.

    ``bold`` holds the (row, column) of the cells to be marked in Markdown and LaTeX.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.rows)

    def markdown(self) -> str:
        """A pipe table, aligned in its source too."""
        escaped = [[markdown_escaped(cell).replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        for row, column in self.bold:
            escaped[row + 1][column] = f"**{escaped[row + 1][column]}**"
        widths = self._widths(escaped)
        right = self._flush_right()
        rule = ["-" * (width - 1) + ":" if flush else "-" * width for width, flush in zip(widths, right, strict=True)]
        return "".join(f"| {' | '.join(_pad(row, widths, right))} |\n" for row in (escaped[0], rule, *escaped[1:]))

    def text(self) -> str:
        """Aligned columns; those that do not fit beside them follow below, the first column repeated."""
        heads = [column.split("\n") for column in self.columns]
        depth = max(map(len, heads))
        above = [[*([""] * (depth - len(head))), *head] for head in heads]
        cells = [[printable(cell) for cell in row] for row in (*zip(*above, strict=True), *self.rows)]
        for column in range(len(self.columns)):  # digits stand below one another, marks hang over
            if any(row[column].endswith(MARK) for row in cells):
                for row in cells:
                    row[column] += "" if row[column].endswith(MARK) else " "
        widths, right = self._widths(cells), self._flush_right()
        there = _width()
        blocks: list[list[int]] = [[0]]
        for column in range(1, len(widths)):
            if len(blocks[-1]) > 1 and sum(widths[i] + 2 for i in [*blocks[-1], column]) > there:
                blocks.append([0])
            blocks[-1].append(column)
        lines = []
        for block in blocks:
            for row in cells:
                padded = _pad([row[i] for i in block], [widths[i] for i in block], [right[i] for i in block])
                lines.append("  " + "  ".join(padded).rstrip())
        return "".join(f"{line}\n" for line in lines if line.strip())

    def fitted(self, first: Sequence[str]) -> tuple[Table, list[str]]:
        """The columns that fit beside one another on the terminal, long cells shortened, and the heads of the others.

        Args:
            first: heads of columns that go before the others where there is no room for all.
        """
        said = [[printable(cell) for cell in row] for row in self.rows]
        rows = [[cell if len(cell) <= _LONGEST else f"{cell[: _LONGEST - 3]}..." for cell in row] for row in said]
        left, kept = _width(), list[int]()
        for column in sorted(range(len(self.columns)), key=lambda column: self.columns[column] not in first):
            cells = [*self.columns[column].split("\n"), *(row[column] for row in rows)]
            width = max(3, *map(len, cells)) + 2 + any(cell.endswith(MARK) for cell in cells)
            if width <= left:
                kept.append(column)
                left -= width
        kept.sort()
        table = Table([self.columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
        return table, [head for i, head in enumerate(self.columns) if i not in kept]

    def latex(self) -> str:
        """A ``tabular`` with booktabs' rules; "+-" becomes a plus-minus sign."""
        rows = [[latex_escaped(cell) for cell in row] for row in self.rows]
        for row, column in self.bold:
            rows[row][column] = f"\\textbf{{{rows[row][column]}}}"
        alignment = "".join("r" if flush else "l" for flush in self._flush_right())
        lines = [
            f"\\begin{{tabular}}{{{alignment}}}",
            "\\toprule",
            " & ".join(map(latex_escaped, self.columns)) + " \\\\",
            "\\midrule",
            *(" & ".join(row) + " \\\\" for row in rows),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        return "".join(f"{line}\n" for line in lines)

    @staticmethod
    def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
        return [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def _flush_right(self) -> list[bool]:
        if not self.rows:
            return [False for _ in self.columns]
        return [all(_NUMBER.match(cell) for cell in column if cell) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Lines:
    """Some lines, each a fact of its own."""

    lines: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.lines)

    def markdown(self) -> str:
        return "".join(f"- {markdown_escaped(line)}\n" for line in self.lines)

    def text(self) -> str:
        return "".join(wrapped(line, "  ") for line in self.lines)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Values in full precision, an empty cell for None, lines that end in a newline alone."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


_LATEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "''",
    "[": "{[}",  # after the end of a row, [ and * would be read as arguments of \\
    "]": "{]}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex_escaped(text: str) -> str:
    """Plain text for LaTeX; "+-" becomes a plus-minus sign."""
    parts = printable(text).split("+-")
    return "$\\pm$".join("".join(_LATEX.get(character, character) for character in part) for part in parts)


def markdown_escaped(text: str) -> str:
    """Plain text for Markdown, in one line: no HTML, no link, no code. Underscores and stars are left to be read."""
    line = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return line.replace("`", "\\`").replace("](", "]\\(").replace("][", "]\\[")


def code(text: str) -> str:
    """A span of code for Markdown, in which nothing is anything else."""
    line = printable(text)
    fence = _longer_than(line, 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def code_block(text: str, language: str = "") -> str:
    """A block of code for Markdown."""
    lines = "\n".join(map(printable, text.splitlines()))
    fence = _longer_than(lines, 3)
    return f"{fence}{language}\n{lines}\n{fence}\n"


def _longer_than(text: str, least: int) -> str:
    """Backticks enough to enclose the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _width() -> int:
    """Columns that a line has."""
    there = shutil.get_terminal_size((WIDTH, 0)).columns if sys.stdout.isatty() else WIDTH
    return max(_NARROWEST, there)


def wrapped(line: str, indent: str) -> str:
    """The line in lines that fit on the terminal and are not too long to read, save for words that are longer; further
    ones are set in."""
    lines = textwrap.wrap(
        printable(line),
        min(WIDTH, _width()),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "".join(f"{part}\n" for part in lines)


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of first appearance."""
    return list(dict.fromkeys(names))


def _pad(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [c.rjust(width) if flush else c.ljust(width) for c, width, flush in zip(row, widths, right, strict=True)]
