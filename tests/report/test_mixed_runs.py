"""Whatever lies below a folder, ``slm-report`` ends in a page."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_runs import METHODS, RECOVERIES, STATES, forty, write_mixed

from slm_pipeline.commands import report
from slm_pipeline.report import documents, page
from slm_pipeline.report.study import read_study
from slm_pipeline.show import curves, strips

RUN = st.fixed_dictionaries({
    "method": st.sampled_from(METHODS), "recovery": st.sampled_from(RECOVERIES),
    "repair": st.sampled_from(("none", "rescale", "refit")), "state": st.sampled_from(STATES),
    "model": st.sampled_from(("smollm2_135m", "qwen3_4b")), "ratio": st.sampled_from((0, 10, 20, 35)),
    "seed": st.integers(0, 1), "study": st.sampled_from(("runs", "ratios")),
})  # fmt: skip


def columns_of(html: str) -> set[int]:
    """How many cells the rows of the runs' table have, its head too."""
    table = html.partition('<table class="runs">')[2].partition("</table>")[0]
    rows = re.findall(r'<tr class="run">(.*?)</tr>', table, re.DOTALL)
    head = table.count('<th scope="col"')
    return {head, *(len(re.findall(r"<t[hd][ >]", row)) for row in rows)}


@settings(max_examples=20, deadline=None)
@given(runs=st.lists(RUN, min_size=1, max_size=9))
def test_any_mixture_of_runs_ends_in_a_page(runs):
    """The pictures are drawn as always, but not written: what does that has tests of its own."""

    def save(figure, path_stem):
        path_stem.parent.mkdir(exist_ok=True)
        file = path_stem.with_suffix(".svg")
        file.write_text('<svg xmlns="http://www.w3.org/2000/svg"><defs></defs></svg>')
        return [file]

    with tempfile.TemporaryDirectory() as name, mock.patch.object(curves, "save", save):
        folder = Path(name)
        for number, run in enumerate(runs):
            write_mixed(folder, number, **run)
        words = ["slm-report", name, "--out", str(folder / "out")]
        with (
            mock.patch.object(sys, "argv", words),
            mock.patch.object(strips, "save", save),
            mock.patch.object(report, "print", create=True),
            mock.patch("slm_pipeline.errors.log.warning") as warned,
        ):
            report.main()
        assert not warned.called  # every picture was drawn
        html = (folder / "out" / "report.html").read_text()
        assert html.count('<tbody class="run') == len(runs)
        assert len(columns_of(html)) == 1
        done = sum(run["state"] == "done" for run in runs)
        assert f"{done} done" in html if done else "done" not in html.partition("</header>")[0].partition("<h1>")[2]


@pytest.fixture(scope="module")
def forty_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = forty(tmp_path_factory.mktemp("forty"))
    with mock.patch.object(page, "with_dark_colors", side_effect=page.with_dark_colors) as turned:
        with mock.patch.object(sys, "argv", ["slm-report", str(folder), "--format", "html"]):
            report.main()
        assert turned.call_count == 6
    return folder


def test_forty_runs_have_the_best_of_each_model_and_size(forty_runs):
    html = (forty_runs / "report.html").read_text()
    titles = re.findall(r"<h2>(Best [^<]*)</h2>", html)
    assert titles == [f"Best at each size: perplexity/bundled, {name}" for name in ("smollm2_135m", "qwen3_4b")]
    assert "<dt>Best run</dt>" not in html  # that would be the least pruned one
    sizes = re.findall(r'<td class="size">([^<]+)</td>', html)
    usual = ["10% less", "15% less", "25% less", "30% less"]
    assert sizes == [*usual, *usual[:2], "25% less*", "30% less"]  # the other model's run of 30 % is better than it
    study = read_study(forty_runs)
    assert len(study.runs) == 40
    assert html.count('<tr class="reason">') == sum(bool(run.reason) for run in study.runs) == 6


def test_the_terminal_says_of_forty_runs_what_a_person_needs(forty_runs):
    lines = documents.text(read_study(forty_runs)).splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("Best at each size") for line in lines) == 2
    assert "  jobs methods/32, runs/8, runs/20: interrupted" in lines
    assert lines[-1] == "All 40 runs, and how they were measured: summary.md and report.html"


@pytest.mark.browser
def test_forty_runs_on_a_phone_are_chosen_and_grouped(forty_runs):
    with Browser(500, 800, dark=True) as browser:
        browser.open(forty_runs / "report.html")
        assert browser.run("return document.documentElement.scrollWidth") == 500
        names = browser.run("return [...document.querySelector('#group').options].map(option => option.text)")
        assert names == ["nothing", "model", "method", "repair", "recovery", "pruning_ratio"]
        choose = (
            "const [query, name] = arguments; const one = document.querySelector(query);"
            " one.value = [...one.options].find(option => option.text === name).value;"
            " one.dispatchEvent(new Event('input'))"
        )
        browser.run(choose, "#group", "recovery")
        headings = (
            "return [...document.querySelectorAll('tbody.heading')].filter(b => !b.hidden).map(b => b.textContent)"
        )
        assert browser.run(headings) == [
            "recovery none (12)", "recovery lora (10)", "recovery full (9)", "recovery distill (9)",
        ]  # fmt: skip
        first = "[data-filter]"  # the model
        browser.run(choose, first, "qwen3_4b")
        assert browser.run("return document.querySelector('#count').textContent") == "6 of 40 runs"
        counted = [int(text.split("(")[1].rstrip(")")) for text in browser.run(headings)]
        assert sum(counted) == 6
        image = "return getComputedStyle(document.querySelector('figure img')).backgroundColor"
        assert browser.run(image) == "rgb(23, 24, 26)"
        assert browser.complaints() == []


def test_the_table_of_forty_runs_is_read_from_the_same_json(forty_runs):
    """A number of the page is the one of its summary.json."""
    study = read_study(forty_runs)
    run = next(run for run in study.runs if run.job == "runs/4")
    said = json.loads((run.path / "summary.json").read_text())["numbers"]["recovered/perplexity/bundled"]["value"]
    html = (forty_runs / "report.html").read_text()
    assert f'data-value="{said!r}"' in html
