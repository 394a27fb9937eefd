"""The page of a study: what is in it, that nothing in it can run, and how it behaves in a browser."""

from __future__ import annotations

import json
import os
import re
from html import unescape
from pathlib import Path

import pytest
from browser import Browser
from studies import finished, perplexity, write_run

from slm_pipeline.report.page import html
from slm_pipeline.report.plots import Picture
from slm_pipeline.report.runs_table import made_with, short_jobs
from slm_pipeline.report.study import read_study
from slm_pipeline.report.write import write_study

EVIL = "<script>document.title='hacked'</script><img src=http://192.0.2.1/x.png>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four jobs in the order of their folders: perplexity 9, none (failed), 100, 20; every text tries to run."""
    tmp_path = tmp_path_factory.mktemp("page")
    study = {"question": f"Which is {EVIL} best?", "metric": "pruned/perplexity/bundled", "x": "threshold.value"}
    results = [finished(tmp_path, 28, 9.0), f"no {EVIL}", finished(tmp_path, 20, 100.0), finished(tmp_path, 24, 20.0)]
    for job, result in enumerate(results):
        if isinstance(result, dict):
            result |= {"command": f"slm model.path='{EVIL}'", "warnings": [EVIL]}
        overrides = [f"threshold.value=0.{9 - job}", f"model.name={EVIL}{job}"]
        folder = tmp_path / "study" / str(job)
        write_run(folder, overrides, result, config={"name": EVIL, "study": study})
        steps = [{"low": 27, "high": 28, "similarity": 0.9 - job / 10, "accepted": True}]
        (folder / "plan.json").write_text(json.dumps({"threshold": 0.5, "scores": {"steps": steps}}))
    written = write_study(tmp_path / "study")
    assert [path.name for path in written.pictures] == [
        "metric.png",
        "score_by_layers.png",
        "score_by_speed.png",
        "search_traces.png",
        "layer_strips.png",
    ]
    return tmp_path / "study" / "report.html"


def test_the_page_is_one_file_and_every_text_in_it_is_escaped(page):
    html = page.read_text()
    assert html.count("<script>") == 1
    assert "<img src=http" not in html
    assert html.count("data:image/svg+xml;base64,") == html.count("<img ") == 5
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)[a-z/]", html.replace("&lt;img src=http", ""))
    assert "default-src 'none'" in unescape(html)
    assert "FAILED: no &lt;script&gt;" in html


def test_the_page_has_the_same_bytes_again(page):
    before = page.read_bytes()
    write_study(page.parent)
    assert page.read_bytes() == before


def test_the_best_run_stands_on_top(page):
    text = re.sub(r"<[^>]+>", " ", page.read_text().partition("</dl>")[0])
    assert "9.00" in text
    assert "dense model 15.23" in text
    assert "of 30, 93.3% left" in text


def rows(browser: Browser) -> list[str]:
    """The jobs as they stand, top down; those that the filter hides are not there."""
    bodies = "[...document.querySelectorAll('table.runs tbody.run')].filter(body => !body.hidden)"
    script = f"return {bodies}.map(body => body.rows[0].cells[0].dataset.value)"
    found: list[str] = browser.run(script)
    return found


@pytest.mark.browser
def test_in_a_browser(page, tmp_path):
    with Browser(1400, 900) as browser:
        browser.requested()  # what the browser's own first page asked for
        browser.open(page)
        asked = [url for url in browser.requested() if not url.startswith(("data:", "chrome:"))]
        assert asked == [page.resolve().as_uri()[:60]]
        assert browser.run("return document.title").startswith("Which is <script>")
        assert browser.run("return document.querySelectorAll('img').length") == 5
        assert browser.run("return [...document.images].every(image => image.naturalWidth > 300)")
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")  # only the table scrolls

        header = "document.querySelector('th[data-column=\"pruned/perplexity/bundled\"]')"
        assert rows(browser) == ["0", "1", "2", "3"]
        browser.run(f"{header}.querySelector('button').click()")
        assert (rows(browser), browser.run(f"return {header}.ariaSort")) == (["0", "3", "2", "1"], "ascending")
        browser.run(f"{header}.querySelector('button').focus()")
        browser.press("\ue007")  # Enter: the keyboard does it too
        assert (rows(browser), browser.run(f"return {header}.ariaSort")) == (["2", "3", "0", "1"], "descending")
        average = "document.querySelector('th[data-column=\"num_layers\"]')"
        browser.run(f"{average}.querySelector('button').click()")
        assert browser.run(f"return {header}.ariaSort") == "none"
        assert rows(browser) == ["2", "3", "0", "1"]

        type_into = (
            "const f = document.querySelector('#filter'); f.value = arguments[0]; f.dispatchEvent(new Event('input'))"
        )
        browser.run(type_into, "FAILED")
        assert rows(browser) == ["1"]
        assert browser.run("return document.querySelector('#count').textContent") == "1 of 4 runs"
        browser.run(type_into, "")

        opened = "return [...document.querySelectorAll('tr.more')].map(row => row.hidden)"
        assert browser.run(opened) == [True] * 4
        browser.run("document.querySelector('button.opener').click()")
        assert browser.run(opened) == [False, True, True, True]
        assert EVIL in browser.run("return document.querySelector('tr.more').textContent")

        typed = {"pruned/perplexity/bundled>=20": ["2", "3"], "num_layers<25 threshold.value=0.7": ["2"], "rare": []}
        for words, left in typed.items():
            browser.run(type_into, words)
            assert rows(browser) == left
        browser.run(type_into, "")

        whole = "return document.querySelector('th[data-column=\"pruned/boolq\"]').offsetParent !== null"
        assert browser.run(whole) is True
        cell = browser.run("return document.querySelector('th[data-column=\"pruned/boolq\"]').dataset.cell")
        browser.run(f"document.querySelector('input[data-column=\"{cell}\"]').click()")
        assert browser.run(whole) is False
        assert browser.run(f"return [...document.querySelectorAll('tr.run')].every(row => row.cells[{cell}].hidden)")
        browser.run("document.querySelector('[data-columns=all]').click()")
        assert browser.run(whole) is True
        place = "return document.querySelector('th.metric').getBoundingClientRect().left"
        before = browser.run(place)
        browser.run("document.querySelector('.scroll:has(table.runs)').scrollLeft = 300")
        assert browser.run(place) == before  # the job and the metric stay

        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        assert browser.complaints() == []


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_have_their_colours(page, dark):
    with Browser(700, 900, dark=dark) as browser:
        browser.open(page)
        color = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert color == ("rgb(23, 24, 26)" if dark else "rgb(255, 255, 255)")
        assert browser.run("return document.documentElement.scrollWidth") == 700


def test_without_a_browser_the_test_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install chromium chromium-driver"):
        Browser()


def test_a_page_of_nothing_finished_is_still_a_page(sweep):
    for path in sweep.glob("*/summary.json"):
        path.unlink()
    html = write_study(sweep)
    assert html.pictures == []
    assert "4 jobs, 1 FAILED, 3 interrupted" in (sweep / "report.html").read_text()
    assert not read_study(sweep).best_runs


def test_names_questions_and_reasons_cannot_be_markup(tmp_path):
    bad = "<script>a</script>\x1b\ud800\n"
    config = {
        "name": bad,
        "study": {"question": bad, "metric": "num_layers", "x": "note", "series": [], "sort_by": None},
    }
    write_run(tmp_path / "s" / "0", [f"note={bad}0"], finished(tmp_path, 24, 20.0, warnings=[bad]), config=config)
    write_run(tmp_path / "s" / "1", [f"note={bad}1"], bad, config=config)
    write_study(tmp_path / "s")
    page, markdown = ((tmp_path / "s" / name).read_text() for name in ("report.html", "summary.md"))
    assert page.count("<script>") == 1  # its own
    assert "&lt;script&gt;a&lt;/script&gt;" in page
    assert "<script>" not in markdown.replace("`", "")
    assert "\x1b" not in page + markdown


def test_the_page_says_when_with_what_and_on_what_its_numbers_were_made(tmp_path):
    for job, (device, torch) in enumerate([("CPU x86_64", "2.13.0"), ("1 x H100", "2.13.0"), ("1 x H100", "2.12.0")]):
        made = {"versions": {"slm_pipeline": "0.1.0", "torch": torch, "numpy": "2"}, "device": device}
        folder = tmp_path / "s" / str(job)
        write_run(folder, [f"seed={job}"], finished(tmp_path, 20, 9.0, provenance=made))
        os.utime(folder / "summary.json", (86400 * (job + 1),) * 2)
    write_run(tmp_path / "s" / "3", ["seed=3"], finished(tmp_path, 20, 9.0, provenance={"versions": [3]}))  # damaged
    os.utime(tmp_path / "s" / "3" / "summary.json", (86400, 86400))
    study = read_study(tmp_path / "s")
    assert made_with(study.runs) == [
        "results from 1970-01-02 to 1970-01-04",
        "slm_pipeline 0.1.0, torch 2.13.0 (2 of 4 runs)",
        "CPU x86_64 (1 of 4 runs)",
        "1 x H100 (2 of 4 runs)",
        "slm_pipeline 0.1.0, torch 2.12.0 (1 of 4 runs)",
    ]
    assert "<li>results from 1970-01-02 to 1970-01-04</li>" in html(study, [])


def test_a_picture_that_is_gone_or_has_no_svg_does_not_cost_the_page(sweep, tmp_path, caplog):
    (tmp_path / "drawn.png").write_bytes(b"\x89PNG")
    pictures = [Picture("gone", [tmp_path / "gone.png", tmp_path / "gone.svg"]), Picture("empty", [])]
    page = html(read_study(sweep), [*pictures, Picture("drawn", [tmp_path / "drawn.png"])])
    assert re.findall(r'<img alt="(\w+)" src="data:image/(\w+)', page) == [("drawn", "png")]
    assert "no picture gone on the page: FileNotFoundError" in caplog.text
    assert "no picture empty on the page: ValueError" in caplog.text


def test_jobs_are_called_by_what_tells_them_apart():
    jobs = [
        "sweeps/ratios/2026-11-27_00-34-11-102122/3", "sweeps/ratios/2026-11-27_00-34-11-102122/4",
        "runs/slm/2026-11-27_00-34-11-102122", "runs/slm/2026-11-28_10-00-00-000001",
        "a/2026-11-27_00-34-11-102122", "b/a/2026-11-27_00-34-11-999999", "2026-11-27_00-34-11-102122",
        "runs/4", "methods/29", "sweeps/ratios/3",
    ]  # fmt: skip
    assert short_jobs(jobs) == [
        "ratios/3", "ratios/4", "slm 11-27 00:34:11", "slm 11-28 10:00:00", "a", "b/a", "2026-11-27_00-34-11-102122",
        "runs/4", "methods/29", "sweeps/ratios/3",
    ]  # fmt: skip
    same = ["runs/slm/2026-11-27_00-34-11-1", "runs/slm/2026-11-27_00-34-11-2"]
    assert short_jobs(same) == same


def test_what_does_not_apply_or_was_not_measured_has_a_look_of_its_own(tmp_path):
    recovered = finished(tmp_path, 20, 30.0)
    recovered["metrics"]["recovered"] = {"perplexity": {"bundled": perplexity(25.0)}}
    config = {"recovery": {"rank": 8}}
    write_run(tmp_path / "s" / "0", ["method=slm", "recovery.rank=8"], recovered, config=config)
    config = {"recovery": {"rank": 4}}
    write_run(tmp_path / "s" / "1", ["method=laco", "recovery.rank=4"], recovered, config=config)
    write_run(tmp_path / "s" / "2", ["method=mka"], finished(tmp_path, 20, 20.0), config={"recovery": {}})
    write_run(tmp_path / "s" / "3", ["method=flap"], "why", config={"recovery": {}})
    page = html(read_study(tmp_path / "s"), [])
    third, fourth = page.partition('data-value="2"')[2].split('<tr class="more"')[0:3:2]
    assert third.count('title="does not apply"') == 1
    assert '<td class="number metric" data-value="20.0">20.00<small>pruned</small></td>' in third
    assert fourth.count("<small>") == 0


def test_what_all_runs_have_alike_or_few_have_comes_after_the_results(tmp_path):
    for job in range(4):
        options = [
            f"method={'slm' if job % 2 else 'laco'}",
            *(f"method.a{i}={job}" for i in range(12 if job < 2 else 0)),
        ]
        write_run(tmp_path / "s" / str(job), options, finished(tmp_path, 20 + job, 9.0 + job), config={"name": "s"})
    page = html(read_study(tmp_path / "s"), [])
    heads = re.findall(r'<th scope="col"[^>]*data-column="([^"]*)"( hidden)?', page)
    assert [name for name, _ in heads[:3]] == ["job", "pruned/perplexity/bundled", "method"]
    shown = [name for name, hidden in heads if not hidden]
    assert "num_layers" in shown
    assert "pruned/average" not in shown  # of each run 55.0
    assert [name for name, hidden in heads[-8:] if hidden] == [f"method.a{i}" for i in range(4, 12)]
