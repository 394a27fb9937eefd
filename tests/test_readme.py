"""What the README shows works: its method, and every `slm` command up to the first expensive second."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import run_slm
from task_rows import TASK_ROWS

from slm_pipeline.config import plugins

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def code_block(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return block


JOB = [
    *("model=random", "model.num_layers=8", "pruning_ratio=r35", "calibration=text_file", "calibration.path=text.txt"),
    *("recovery=none", "evaluation=none", "tracker=jsonl"),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder to start from; nothing of it stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("slm_pipeline.methods.every_other", "mypackage.every_other", "mypackage"):
        sys.modules.pop(name, None)
    plugins.use([])


def write_method(code: Path, conf: Path, yaml: str) -> None:
    """The README's method, as the files of a package."""
    (conf / "method").mkdir(parents=True)
    code.mkdir(exist_ok=True)
    (code / "__init__.py").touch()
    (code / "every_other.py").write_text(code_block("python"))
    (conf / "method" / "every_other.yaml").write_text(yaml)


def write_package() -> None:
    target = "_target_: mypackage.every_other.EveryOther"
    assert target in README
    write_method(Path("mypackage"), Path("mypackage/conf"), re.sub("_target_: .*", target, code_block("yaml")))


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_the_method_in_the_readme_works(place, tmp_path, monkeypatch):
    """Inside: as if its two files lay in this package. Outside: in a package where the command starts."""
    import slm_pipeline.methods

    Path("text.txt").write_text("the mill stands by the river " * 500)
    if place == "inside":
        write_method(Path("methods"), Path("conf"), code_block("yaml"))
        methods = [*slm_pipeline.methods.__path__, str(tmp_path / "methods")]
        monkeypatch.setattr(slm_pipeline.methods, "__path__", methods)
    else:
        write_package()
    outcome = run_slm("--config-dir=conf" if place == "inside" else "plugins=[mypackage]", "method=every_other", *JOB)
    assert outcome.status == 0, outcome.err
    (summary,) = Path("outputs/runs").glob("*/*/summary.json")
    assert json.loads(summary.read_text())["dropped"] == [1, 3, 5]


def commands() -> list[list[str]]:
    """Every line of the README that starts with `slm `, its comment cut off."""
    text = README.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    slm ")]
    return [shlex.split(re.split(r"\s{3,}", line)[0])[1:] for line in lines]


def test_the_readme_has_commands():
    assert len(commands()) > 12


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands(arguments, tmp_path, monkeypatch):
    """With files of the names that they use; the hub is left out."""
    write_package()
    Path("book.txt").write_text("word " * 5000)
    Path("notes.txt").write_text("word " * 5000)
    Path("alpaca.json").write_text(
        json.dumps([{"instruction": str(i), "input": "", "output": "b"} for i in range(2100)])
    )
    Path("FOLDER").mkdir()
    for task, row in TASK_ROWS.items():
        Path(f"FOLDER/{task}.jsonl").write_text(json.dumps(row) + "\n")
    plan = {"name": "smollm2_135m", "fingerprint": "", "num_layers": 30}
    empty = {"method": "none", "options": {}, "calibration": {}, "ops": [], "format": 1}
    Path("plan.json").write_text(json.dumps({"model": plan, "layer_groups": [[i] for i in range(30)], **empty}))
    monkeypatch.setattr("slm_pipeline.models.source._hub", without_network)
    monkeypatch.setattr("slm_pipeline.models.source._local", without_network)
    monkeypatch.setattr("slm_pipeline.data.hub.commit", lambda *_, **__: "0" * 40)
    outcome = run_slm(*arguments, *([] if "--help" in arguments else ["dry_run=true"]))
    assert outcome.status == 0, outcome.err
    assert not Path("outputs").exists()


def without_network(config):
    from slm_pipeline.models.source import ModelSource

    return ModelSource(config, "elsewhere", 32, "llama")
