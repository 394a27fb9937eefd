"""Plugins: what one is, what it may bring, and what is said of one that does not work. In this process, and undone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_slm

from slm_pipeline.config import plugins
from slm_pipeline.config.groups import option_files
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.steps import describe_plan
from slm_pipeline.surgery import ops as surgery_ops
from slm_pipeline.surgery.ops import OPS
from slm_pipeline.surgery.ops import base as ops_base
from slm_pipeline.surgery.plan import Plan

METHOD = """
from dataclasses import dataclass, field
from typing import ClassVar

from slm_pipeline.methods.base import CalibrationSize, LayerRemoval


@dataclass(kw_only=True)
class Half(LayerRemoval):
    note: str = ""
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(2, 16))
    name: ClassVar[str] = "{name}"

    def plan(self, problem):
        return self.removal_plan(problem, self.candidates(problem.view.num_layers)[::2], scores={{}})
"""
YAML = "# Every other layer.\n_target_: {package}.half.Half\npublished_calibration: {{num_samples: 2, seq_len: 16}}\n"
JOB = [
    *("model=random", "model.num_layers=6", "calibration=text_file", "calibration.path=text.txt", "pruning_ratio=r50"),
    *("recovery=none", "evaluation=none", "tracker=jsonl", "dry_run=true"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to start from; afterwards nothing is imported from it, and no plugin is in use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file that is written twice in a second is read twice
    Path("text.txt").write_text("the mill stands by the river " * 1000)
    yield tmp_path
    forget(tmp_path)
    plugins._installed.cache_clear()
    monkeypatch.undo()
    plugins.use([])


def forget(folder: Path) -> None:
    """As in a new process: nothing of this folder is imported."""
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def write(package: str, *, option: str = "half", name: str = "half", method: str = METHOD, yaml: str = YAML) -> Path:
    """A package of this name in the working directory, with a method."""
    folder = Path(package)
    (folder / "conf" / "method").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "half.py").write_text(method.format(name=name))
    (folder / "conf" / "method" / f"{option}.yaml").write_text(yaml.format(package=package))
    return folder


def refused(*words: str) -> str:
    outcome = run_slm(*words, *JOB)
    assert (outcome.status, outcome.out) == (2, "")
    assert not Path("outputs").exists()
    return outcome.err.removeprefix("error: ").removesuffix("\n")


def test_an_option_of_a_plugin_is_one_like_ours(here):
    write("mine")
    outcome = run_slm("plugins=[mine]", "method=half", *JOB)
    assert [line.split()[:2] for line in outcome.out.splitlines()] == [["calibrate", "run"], ["merge", "run"]]
    assert "did you mean note?" in refused("plugins=[mine]", "method=half", "method.nota=1")
    assert "note" in refused("plugins=[mine]", "method=slm", "method.note=1")
    assert "as one text it is written" in refused("plugins=[mine]", "method=half", "method.note=a b,c")
    assert (
        "angular, combined, come, come_posterior, finercut, fisher_mask, flap, from_plan, half, head_importance, joint,"
        " kcm," in refused("plugins=[mine]", "method=1")
    )
    assert "half.yaml" in {file.name for file in option_files("method")}


def test_its_yaml_may_come_from_a_folder_of_the_users(here):
    folder = write("mine")
    (folder / "conf").rename("conf")
    refusal = refused("plugins=[mine]", "method=half")
    assert refusal.endswith(f"; these plugins have no conf/: mine ({here}/mine/conf)")
    assert run_slm("--config-dir=conf", "plugins=[mine]", "method=half", *JOB).status == 0
    assert "must name a class in slm_pipeline, or in a package that plugins=[...] names" in refused(
        "--config-dir=conf", "method=half"
    )


def test_a_single_file_is_a_plugin_too(here):
    write("package").rename("gone")
    Path("gone/half.py").rename("one_file.py")
    Path("conf/method").mkdir(parents=True)
    Path("conf/method/half.yaml").write_text(YAML.format(package="package").replace("package.half", "one_file"))
    assert "must name a class" in refused("--config-dir=conf", "method=half")
    assert run_slm("--config-dir=conf", "plugins=[one_file]", "method=half", *JOB).status == 0


@pytest.mark.parametrize(("words", "message"), [
    ("plugins=[nowhere]", "plugins=[nowhere] cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ("plugins=[broken]", "plugins=[broken] cannot be imported: ZeroDivisionError: division by zero"),
    ("plugins=[no_code]", "no_code has no code of its own; a plugin is a folder with an __init__.py"),
    ("plugins=[./mine]", "'./mine' is not the name of a package, such as mypackage or company.pruning"),
    ("plugins=[slm_pipeline.methods]", "plugins=[slm_pipeline.methods]: slm_pipeline.methods is of this package"),
    ("plugins=mine", "plugins=mine: plugins are a list, the same for all jobs: plugins=[mine]"),
    ("plugins=[mine],[other]", "plugins are a list, the same for all jobs"),
])  # fmt: skip
def test_what_is_no_plugin_is_said_at_once(words, message):
    Path("broken").mkdir()
    Path("broken/__init__.py").write_text("1 / 0\n")
    Path("no_code/conf").mkdir(parents=True)
    assert message in refused(words)


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "class Half: pass\n"}, "method._target_='mine.half.Half' is not the class of a method: it is not"
     " derived from slm_pipeline.methods.base.Method"),
    ({"method": METHOD.replace("def plan", "def plans")}, "is not the class of a method: it lacks plan"),
    ({"method": METHOD.replace("name: ClassVar", "title: ClassVar")}, "is not the class of a method: it has no name"),
    ({"method": "1 / 0\n"}, "method._target_='mine.half.Half' cannot be imported: ZeroDivisionError: division by zero"),
    ({"method": "import nothing_such\n"}, "method._target_='mine.half.Half' does not exist (No module named"),
    ({"method": "x = 1\n"}, "_target_='mine.half.Half' does not exist (module 'mine.half' has no attribute"),
    ({"name": "slm"}, "method._target_='mine.half.Half' calls itself 'slm', as one of slm_pipeline does"),
    ({"yaml": YAML.replace("{package}", "minecraft")}, "method._target_='minecraft.half.Half' must name a class in"),
    ({"yaml": YAML.replace("{package}.half.Half", "os.system")}, "method._target_='os.system' must name a class in"),
    ({"yaml": "_target_: {{: oops\n"}, "a YAML file cannot be read: "),
])  # fmt: skip
def test_what_is_no_method_is_said_when_it_is_chosen_and_stands_in_no_others_way(changes, message):
    write("mine", **changes)
    assert message in refused("plugins=[mine]", "method=half")
    assert run_slm("plugins=[mine]", "method=shortgpt", "method.protect_first=1", *JOB).status == 0


@pytest.mark.parametrize(("option", "taken"), [("method/slm", "slm_pipeline"), ("sweeps/methods", "slm_pipeline"),
                                               ("method/half", "the plugin mine")])  # fmt: skip
def test_no_option_has_the_name_of_another(option, taken):
    write("mine")
    file = write("other", option="other") / "conf" / f"{option}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text("seed: 1\n")
    message = f"the plugin other brings {option}.yaml, and so does {taken}; give its option another name"
    assert refused("plugins=[mine,other]") == message


def test_one_that_stands_in_a_file_is_asked_for_on_the_command_line():
    write("mine")
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/own.yaml").write_text("# @package _global_\nplugins: [mine]\n")
    assert refused("--config-dir=conf", "experiment=own").startswith("plugins=[mine] stands in a file; ")
    assert run_slm("--config-dir=conf", "experiment=own", "plugins=[mine]", *JOB).status == 0


def test_an_installed_package_is_one_by_its_entry_point(here, monkeypatch):
    Path("site/mine-1.2.dist-info").mkdir(parents=True)
    Path("site/mine-1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    entries = Path("site/mine-1.2.dist-info/entry_points.txt")
    entries.write_text("[slm_pipeline.plugins]\nwhatever = mine\n")
    write("mine").rename("site/mine")
    monkeypatch.syspath_prepend(str(here / "site"))
    plugins._installed.cache_clear()
    assert run_slm("method=half", *JOB).status == 0
    assert "half                 Every other layer. (mine)" in run_slm("--help").out
    entries.write_text("[slm_pipeline.plugins]\nwhatever = mine.gone\n")
    plugins._installed.cache_clear()
    assert refused().startswith("the entry point slm_pipeline.plugins: whatever of mine 1.2 cannot be imported: ")


def merge_key() -> str:
    """The merge's artefact of a job of the method half."""
    words = [word for word in JOB if word != "dry_run=true"]
    return describe_plan(
        command_line.compose_job(["slm"], [f"plugins=[{Path('which').read_text()}]", "method=half", *words])
    )


def test_keys_change_with_a_plugins_code_and_two_plugins_of_one_method_have_two(here):
    folders = [write(name) for name in ("mine", "other")]
    keys = {}
    for package in ("mine", "other", "mine"):
        Path("which").write_text(package)
        keys.setdefault(package, set()).add(merge_key())
    assert [len(of_package) for of_package in keys.values()] == [1, 1]
    assert keys["mine"] != keys["other"]
    (folders[0] / "conf" / "note.yaml").write_text("changes: nothing\n")
    Path("which").write_text("mine")
    assert {merge_key()} == keys["mine"]
    (folders[0] / "helper.py").write_text("# what half.py may use\n")
    assert {merge_key()} == keys["mine"]  # what runs was imported before
    forget(here)
    assert merge_key() not in keys["mine"]


MEASURE = """
from typing import ClassVar

from slm_pipeline.evaluation.measure import Measure


class Half(Measure):
    name: ClassVar[str] = "half"

    def identity(self, part, context):
        return {}

    def run(self, part, scored, context):
        return {}

    def numbers(self, part, found):
        return []
"""


@pytest.mark.parametrize(("group", "code", "message"), [
    ("measure", MEASURE.replace("def numbers", "def figures"), "it lacks numbers"),
    ("measure", MEASURE.replace("Half(Measure)", "Half"), "not derived from slm_pipeline.evaluation.measure.Measure"),
    ("measure", METHOD.format(name="half"), "it is not derived from slm_pipeline.evaluation.measure.Measure"),
    ("recovery", MEASURE, "it is not derived from slm_pipeline.recovery.base.Recovery"),
])  # fmt: skip
def test_an_option_is_derived_from_the_base_of_its_group(here, group, code, message):
    """Also if it happens to have all that the base asks for."""
    write("mine", yaml=YAML)
    Path("mine/half.py").write_text(code)
    Path(f"mine/conf/{group}").mkdir()
    (options := Path(f"mine/conf/{group}/half.yaml")).write_text("_target_: mine.half.Half\n")
    if group == "measure":
        options.write_text(f"# @package evaluation.half\n{options.read_text()}")
    job = [word for word in JOB if not word.startswith(f"{group}=")]
    outcome = run_slm("plugins=[mine]", f"+{group}=half" if group == "measure" else f"{group}=half", *job)
    assert (outcome.status, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert f"{group}._target_='mine.half.Half' is not the class of a {group}: " in line
    assert message in line


def test_a_measure_is_added_or_chosen_and_an_unknown_one_is_said_to_be_none(here):
    write("mine", method=MEASURE.replace("{", "{{").replace("}", "}}"), yaml="")
    Path("mine/conf/measure").mkdir()
    Path("mine/conf/measure/half.yaml").write_text("# @package evaluation.half\n_target_: mine.half.Half\n")
    words = ["plugins=[mine]", "evaluation=perplexity", "evaluation.of=[pruned]", *JOB]
    words.remove("evaluation=none")
    for chosen in ("+measure=half", "measure=[perplexity,half]"):
        stages = [line.split()[0] for line in run_slm(*words, chosen).out.splitlines()]
        assert stages[:4] == ["calibrate", "merge", "evaluate_pruned/perplexity/bundled", "evaluate_pruned/half"]
    for unknown in ("+measure=nosuch", "measure=[perplexity,nosuch]"):
        outcome = run_slm(*words, unknown)
        assert (outcome.status, outcome.out) == (2, "")
        (line,) = outcome.err.splitlines()
        allowed = "efficiency, fidelity, half, lm_eval, perplexity, zero_shot"
        assert line == f"error: measure=nosuch: no option of that name; measure is one of {allowed}"


@pytest.mark.parametrize(("words", "message"), [
    (["+measure=perplexity"], "+measure=perplexity would undo evaluation.perplexity.corpora=['bundled'], which a file"
     " sets; chosen among the others it does not: measure=[perplexity,fidelity,zero_shot,efficiency,lm_eval]"),
    (["measure=zero_shot"], "evaluation.perplexity has options and is no measure that was chosen; to choose it too:"
     " measure=[zero_shot,perplexity]"),
])  # fmt: skip
def test_nothing_that_a_file_sets_of_a_measure_is_lost_without_a_word(words, message):
    job = [word for word in JOB if word != "evaluation=none"]
    assert run_slm(*job, "evaluation=perplexity", *words).err.strip() == f"error: {message}"


OPERATION = """
from dataclasses import dataclass
from typing import ClassVar

from slm_pipeline.surgery.ops import register
from slm_pipeline.surgery.ops.drop import Drop


@register
@dataclass(frozen=True)
class Vanish(Drop):
    name: ClassVar[str] = "vanish"
"""


def test_a_checkpoint_of_an_operation_is_what_its_code_does(here, monkeypatch):
    monkeypatch.setattr(ops_base, "OPS", ops := {**OPS})
    monkeypatch.setattr(surgery_ops, "OPS", ops)
    write("mine")
    contents = []
    for code in (OPERATION, OPERATION, f"{OPERATION}# changed\n"):
        Path("mine/__init__.py").write_text(code)
        forget(here)
        ops.pop("vanish", None)
        plugins.use(["mine"])
        op = ops["vanish"]((2,))
        contents.append(Plan({"name": "m", "fingerprint": "f", "num_layers": 4}, "half", {}, None, ops=[op]).content())
    assert contents[0] == contents[1] != contents[2]
    plugins.use([])
    with pytest.raises(UserError, match=r"mine\.Vanish is of no plugin"):
        Plan({"name": "m", "fingerprint": "f", "num_layers": 4}, "half", {}, None, ops=[op]).content()


def test_code_that_nobody_can_follow_is_refused():
    with pytest.raises(UserError, match=r"config\.test_plugins\.write is of no plugin; name its package: plugins="):
        plugins.code_of(write)
    assert plugins.code_of(plugins.use) == {}


def test_the_folder_where_one_starts_is_looked_at_last_and_only_for_a_plugin(here):
    Path("json.py").write_text("1 / 0\n")
    write("mine")
    run_slm("method=slm", *JOB)
    assert str(here) not in sys.path
    run_slm("plugins=[mine]", *JOB)
    assert sys.path[-1] == str(here)
