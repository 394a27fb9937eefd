"""Text, Markdown, LaTeX and CSV of a table."""

from __future__ import annotations

import csv
import io
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_pipeline.errors import printable
from slm_pipeline.show.tables import Lines, Table, code, code_block, csv_text, latex_escaped, markdown_escaped


def test_a_wide_table_goes_on_below_and_pipes_are_escaped():
    table = Table(["model", "a" * 60, "b" * 60], [["x", "1", "2|3"], ["y", "", "4"]])
    assert table.text() == (
        f"  model  {'a' * 60}\n  x      {'1'.rjust(60)}\n  y\n  model  {'b' * 60}\n"
        f"  x      {'2|3'.rjust(60)}\n  y      {'4'.rjust(60)}\n"
    )
    assert "2\\|3 |\n" in table.markdown()


@pytest.mark.parametrize(("columns", "blocks", "longest"), [("80", 3, 80), ("150", 1, 100), ("20", 3, 60)])
def test_on_a_terminal_a_table_is_as_wide_as_that_and_lines_are_not_too_long_to_read(
    columns, blocks, longest, monkeypatch
):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", columns)
    table = Table(["model", "a" * 40, "b" * 40, "c" * 40], [["x", "1", "2", "3"]])
    assert table.text().count("model") == blocks
    lines = Lines(["a word and " * 30]).text().splitlines()
    assert longest - 4 <= max(map(len, lines)) <= longest


def test_bold_cells_keep_their_column_flush_right():
    table = Table(["model", "score"], [["a", "1.5"], ["b", "12.5"]], frozenset({(1, 1)}))
    assert (
        table.markdown() == "| model |    score |\n| ----- | -------: |\n| a     |      1.5 |\n| b     | **12.5** |\n"
    )
    assert "**" not in table.text()


def test_latex_has_booktabs_rules_and_aligns_numbers_right():
    table = Table(["method", "score in %"], [["come_posterior", "1.5 +-0.2"], ["b", ""]], frozenset({(0, 1)}))
    assert table.latex().splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & score in \% \\",
        r"\midrule",
        r"come\_posterior & \textbf{1.5 $\pm$0.2} \\",
        r"b &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50% & $3 #1_a {b}", r"50\% \& \$3 \#1\_a \{b\}"),
        (r"C:\x^2 ~y", r"C:\textbackslash{}x\textasciicircum{}2 \textasciitilde{}y"),
        ("a < b > c | d", r"a \textless{} b \textgreater{} c \textbar{} d"),
        ("[1]*\n2", "{[}1{]}{*} 2"),
    ],
)
def test_no_character_of_a_text_is_a_command(text, escaped):
    assert latex_escaped(text) == escaped


def test_a_table_that_fits_has_what_comes_first_and_names_the_rest():
    """Columns of 3, 58, 42 and 5 with two blanks each: of 100, what is wanted first leaves room for the last alone."""
    table = Table(["job", "b" * 58, "c" * 42, "d"], [["0", "1", "x" * 60, "12345"]])
    fitted, others = table.fitted(["job", "c" * 42])
    assert (fitted.columns, fitted.rows) == (["job", "c" * 42, "d"], [["0", "x" * 45 + "...", "12345"]])
    assert others == ["b" * 58]
    assert table.fitted([])[1] == ["c" * 42]
    assert all(len(line) <= 100 for line in fitted.text().splitlines())


def test_csv_keeps_every_digit_and_reads_back():
    rows = [['a, "b"', 0.1 + 0.2, None], ["line\nbreak", 7, "x"]]
    text = csv_text(["name", "value", "note"], rows)
    assert text.startswith('name,value,note\n"a, ""b""",0.30000000000000004,\n')
    assert list(csv.reader(io.StringIO(text)))[2] == ["line\nbreak", "7", "x"]


BAD = "<img src=x onerror=alert(1)>\n| a | [b](javascript:c) `d` \x1b[31m\u202e\ud800 ```"


def test_names_are_text_in_markdown_and_nothing_else():
    line = markdown_escaped(BAD)
    assert line == (
        "&lt;img src=x onerror=alert(1)> | a | [b]\\(javascript:c) \\`d\\` \\x1b[31m\\u202e\\ud800 \\`\\`\\`"
    )
    assert Lines([BAD]).markdown() == f"- {line}\n"
    (_, _, row) = Table(["a"], [[BAD]]).markdown().splitlines()
    assert row == f"| {line.replace('|', chr(92) + '|')} |"
    assert code("a `b` ``c") == "``` a `b` ``c ```"
    assert code("a_b") == "`a_b`"
    assert code_block("a\n```\nb", "bash") == "````bash\na\n```\nb\n````\n"


def test_control_characters_do_not_reach_a_terminal_or_break_a_row():
    (_, row) = Table(["a", "b"], [[BAD, "1"]]).text().splitlines()
    assert row.startswith("  <img src=x onerror=alert(1)> | a | [b](javascript:c) `d` \\x1b[31m\\u202e\\ud800 ```    1")
    assert "\x1b" not in Lines([BAD]).text()
    assert "\n" not in latex_escaped(BAD)


@given(st.text())
def test_any_text_is_one_safe_line(text):
    line = printable(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") for character in line)
    assert printable(line) == line
    line.encode()
    assert Table(["a"], [[text]]).markdown().count("\n") == 3
    assert "<" not in markdown_escaped(text)
