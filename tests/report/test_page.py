"""The page of a study: what is in it, that nothing in it can run, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import Browser
from studies import finished, write_run

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
    assert "default-src &#x27;none&#x27;" in html or "default-src 'none'" in html
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
    bodies = "[...document.querySelectorAll('table.runs tbody')].filter(body => !body.hidden)"
    script = f"return {bodies}.map(body => body.rows[0].cells[1].textContent)"
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
        browser.run("document.querySelector('td.opener button').click()")
        assert browser.run(opened) == [False, True, True, True]
        assert EVIL in browser.run("return document.querySelector('tr.more').textContent")

        cells = "return [...document.querySelectorAll('table.runs .detail')].filter(c => c.offsetParent).length"
        shown = browser.run(cells)
        browser.run("document.querySelector('#details').click()")
        assert (browser.run(cells) == 0) == (shown > 0)

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
