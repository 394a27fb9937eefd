"""What the documents say of one another and of the package holds: links, names, the method, and every command."""

from __future__ import annotations

import json
import re
import shlex
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import run_slm
from shown_commands import COMMANDS, DOCUMENTS, REPOSITORY, RUN, commands_of
from task_rows import TASK_ROWS

import slm_pipeline
from slm_pipeline.config import ModelConfig, plugins
from slm_pipeline.jobs import command_line, study
from slm_pipeline.models.source import ModelSource


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_has_one(document):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert missing == []


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == slm_pipeline.__version__
    newest = re.search(r"^## \[.*?\].*$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert slm_pipeline.__version__ in newest[0]


def test_the_citation_has_what_its_format_asks_for():
    """CFF 1.2.0: what must be there, of the software and of each reference, and persons' or entities' names."""
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert [reference["doi"] for reference in citation["references"]] == [
        "10.48550/arXiv.2502.19159",
        "10.48550/arXiv.2510.15304",
    ]
    for work in (citation, *citation["references"]):
        assert {"title", "authors", "type"} <= work.keys()
        assert all(author.keys() in ({"name"}, {"given-names", "family-names"}) for author in work["authors"])


def test_the_targets_of_make_that_documents_name_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for target in re.findall(r"\bmake ([a-z-]+)(?=`|  )", document.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"


def test_the_readme_is_one_that_people_read_to_the_end():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 200


# What documents show of a package called mypackage, by the names of its files.
_FILES = re.compile(r"```(?:python|yaml)\n# mypackage/(\S+)\n(.*?)```", re.DOTALL)
SHOWN = dict(_FILES.findall((REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")))
EVERY_OTHER = (SHOWN["every_other.py"], SHOWN["conf/method/every_other.yaml"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to start from; nothing of it stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if re.match(r"mypackage\b|slm_pipeline\.methods\.every_other", name)]:
        del sys.modules[name]
    plugins.use([])


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_the_method_that_the_documents_show_works(place, here, monkeypatch):
    """Inside: as if its two files lay in this package. Outside: in a package where the command starts."""
    import slm_pipeline.methods

    code, option = EVERY_OTHER
    write(here, {"text.txt": "the mill stands by the river " * 500})
    if place == "inside":
        option = option.replace("mypackage.", "slm_pipeline.methods.")
        write(here, {"methods/every_other.py": code, "conf/method/every_other.yaml": option})
        monkeypatch.setattr(slm_pipeline.methods, "__path__", [*slm_pipeline.methods.__path__, str(here / "methods")])
    else:
        write(here / "mypackage", {"__init__.py": "", "every_other.py": code, "conf/method/every_other.yaml": option})
    outcome = run_slm(
        "--config-dir=conf" if place == "inside" else "plugins=[mypackage]", "method=every_other", "model=random",
        "model.num_layers=8", "pruning_ratio=r35", "calibration=text_file", "calibration.path=text.txt",
        "recovery=none", "evaluation=none", "tracker=jsonl",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (summary,) = Path("outputs/runs").glob("*/*/summary.json")
    assert json.loads(summary.read_text())["dropped"] == [1, 3, 5]


def test_commands_are_found_wherever_they_stand(tmp_path):
    document = tmp_path / "document.md"
    document.write_text(
        "    slm a=1 \\\n        b=2              said beside it\n    slm-store list; slm-store verify   both\n"
        "text `slm c=1\nd=2`, `slm -m ...`, `slm-report`\n```bash\nslm-report DIR\n```\n    $ slm e=1\n"
    )
    assert commands_of(document) == [
        *("slm a=1 b=2", "slm-store list", "slm-store verify", "slm-report DIR", "slm e=1", "slm c=1 d=2"),
    ]
    assert {shlex.split(command)[0] for command in COMMANDS} == {
        *("slm", "slm-analyze", "slm-bench", "slm-export", "slm-fetch", "slm-report", "slm-store", "slm-study"),
    }


class Understood(BaseException):
    """A command was read and checked; what it does comes next."""


def stop_after(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    function = getattr(module, name)

    def stopping(*given: Any, **named: Any) -> None:
        function(*given, **named)
        raise Understood

    monkeypatch.setattr(module, name, stopping)


def write_files(folder: Path) -> None:
    """What the commands name: a package, texts, rows, plans, folders."""
    option = EVERY_OTHER[1].replace("mypackage.every_other", "mypackage.mine")
    mine = {"mine.py": EVERY_OTHER[0], "conf/method/mine.yaml": option}
    write(folder / "mypackage", {**SHOWN, **mine, "__init__.py": ""})
    write(folder, dict.fromkeys(("book.txt", "notes.txt", "WIKITEXT2"), "word " * 5000))
    rows = json.dumps([{"instruction": str(i), "input": "", "output": "b"} for i in range(2100)])
    write(folder, {"alpaca.json": rows, "INSTRUCTIONS/rows.json": rows})
    write(folder / "FOLDER", {f"{task}.jsonl": json.dumps(row) + "\n" for task, row in TASK_ROWS.items()})
    model = {"name": "smollm2_135m", "fingerprint": "", "num_layers": 30}
    empty = {"method": "none", "options": {}, "calibration": {}, "ops": [], "format": 1}
    plan = json.dumps({"model": model, "layer_groups": [[i] for i in range(30)], **empty})
    write(folder, dict.fromkeys(("plan.json",), plan))


def without_network(config: ModelConfig) -> ModelSource:
    return ModelSource(config, "elsewhere", 32, "llama")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in RUN])
def test_every_command_that_a_document_shows_is_understood(command, here, monkeypatch):
    """With files of the names that it uses, up to the first expensive second; the hub is left out. Those of `RUN` go on
    to their end in test_commands.py."""
    write_files(here)
    monkeypatch.setattr("slm_pipeline.models.source._hub", without_network)
    monkeypatch.setattr("slm_pipeline.models.source._local", without_network)
    monkeypatch.setattr("slm_pipeline.data.hub.commit", lambda *_, **__: "0" * 40)
    monkeypatch.setattr("slm_pipeline.machine.gpus.check_device", lambda *_: None)
    monkeypatch.setattr("slm_pipeline.jobs.command_line.find_spec", lambda _: True)  # Ray, which the tests do without
    monkeypatch.setattr(study, "jobs", lambda *given, jobs=study.jobs: jobs(*given)[:2])  # test_conf.py composes all
    program, *words = shlex.split(command)
    if program == "slm":
        outcome = run_slm(*words, *([] if words[0].startswith("--") else ["dry_run=true"]))
        assert outcome.status == 0, outcome.err
    else:
        module = import_module(f"slm_pipeline.commands.{program.removeprefix('slm-')}")
        last_check = {"slm-analyze": (module, "_prepare"), "slm-bench": (command_line, "compose_job")}
        stop_after(monkeypatch, *last_check.get(program, (module, "parsed")))
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(Understood), redirect_stdout(StringIO()):
            module.main()
    assert not Path("outputs").exists()
