"""What ``slm-analyze`` left, on a study's page."""

from __future__ import annotations

import json
from pathlib import Path

from studies import finished, write_run

from slm_pipeline.report.analyses import read_analyses
from slm_pipeline.report.study import read_study
from slm_pipeline.report.write import write_report

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><defs></defs><path style="fill: #000000"/></svg>'


def write_analysis(folder: Path, name: str, content: str | None = None) -> None:
    folder.mkdir(parents=True)
    header = {"command": f"slm-analyze {name} 'model.path=<b>'", "model": {"name": "tiny <i>"}}
    (folder / f"{name}.json").write_text(json.dumps(header) if content is None else content)
    for stem in ("cosine", "cka") if name == "similarity" else (name,):
        (folder / f"{stem}.svg").write_text(SVG)


def test_each_analysis_below_a_folder_is_on_the_page_and_a_damaged_one_is_said(tmp_path, caplog):
    write_run(tmp_path / "runs" / "0", ["seed=1"], finished(tmp_path, 20, 9.0))
    write_analysis(tmp_path / "runs" / "0" / "inside", "painters")  # of a run: not looked into
    write_analysis(tmp_path / "store" / "calibrate" / "abc", "similarity", '{"cosine": []}')  # that of a calibration
    (tmp_path / "store" / "calibrate" / "abc" / "identity.json").write_text("{}")
    write_analysis(tmp_path / "analysis" / "similarity" / "tiny" / "t1", "similarity")
    write_analysis(tmp_path / "analysis" / "similarity" / "tiny" / "t2", "similarity")
    write_analysis(tmp_path / "analysis" / "painters" / "tiny" / "t1", "painters", "{")
    found = read_analyses(tmp_path, tmp_path / "analysis")
    assert [(one.title, one.path.name) for one in found] == [
        ("similarity of tiny <i>", "t1"), ("similarity of tiny <i>", "t2"),
    ]  # fmt: skip
    assert [[picture.title for picture in one.pictures] for one in found] == [
        ["similarity of tiny <i>: cka", "similarity of tiny <i>: cosine"]
    ] * 2
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "painters.json is cut off, or not JSON"
    ] * 2  # of each folder that was asked for
    write_report(read_study(tmp_path / "runs"), tmp_path / "out", ["html"], found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h3>similarity of tiny &lt;i&gt;</h3>") == 2
    assert page.count('<img alt="similarity of tiny &lt;i&gt;: cka" src="data:image/svg+xml;base64,') == 2
