"""A stranger's package: each thing that can be added, in the fewest files, run to the end and shown everywhere."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import run_slm
from safetensors.torch import load_file
from wandb_files import history, nested, only, wandb_records

from slm_pipeline.analysis.token_metrics import TOKEN_METRICS
from slm_pipeline.commands import analyze
from slm_pipeline.config import plugins
from slm_pipeline.engine.similarities import SIMILARITIES

REPOSITORY = Path(__file__).resolve().parent.parent

# The files that the document shows, by their names in the package.
_BLOCK = re.compile(r"```(?:python|yaml)\n# mypackage/(\S+)\n(.*?)```", re.DOTALL)
SHOWN = {
    name: content.replace("mypackage", "stranger")
    for name, content in _BLOCK.findall((REPOSITORY / "docs/extending.md").read_text("utf-8"))
}
DISTINCT = SHOWN["distinct.py"]

PACKAGE = {
    # what its modules add to registries, it adds when it is imported
    "__init__.py": "from stranger import damp, helium, likeness, steepness",
    # a measure: two files
    "distinct.py": DISTINCT,
    "conf/measure/distinct.yaml": SHOWN["conf/measure/distinct.yaml"],
    # an operation: three files, with a method that uses it
    "damp.py": SHOWN["damp.py"],
    "damped.py": SHOWN["damped.py"],
    "conf/method/damped.yaml": SHOWN["conf/method/damped.yaml"],
    # a method: two files
    "every_third.py": '''
"""Drop every third layer."""

from dataclasses import dataclass, field
from typing import ClassVar

from slm_pipeline.methods.base import CalibrationSize, LayerRemoval, PruningProblem
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class EveryThird(LayerRemoval):
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(2, 16))
    name: ClassVar[str] = "every_third"

    def plan(self, problem: PruningProblem) -> Plan:
        return self.removal_plan(problem, self.candidates(problem.view.num_layers)[::3], scores={})
''',
    "conf/method/every_third.yaml": """
# Drop every third layer.
_target_: stranger.every_third.EveryThird
protect_first: 1
protect_last: 0
published_calibration: {num_samples: 2, seq_len: 16}
""",
    # a recovery: two files
    "louder.py": '''
"""Trains nothing: multiplies the weights of the final norm."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from slm_pipeline.config.ranges import Range
from slm_pipeline.recovery.base import Recovery, RecoveryProblem, RecoveryResult


@dataclass(kw_only=True)
class Louder(Recovery):
    factor: Annotated[float, Range(above=0, at_most=10)] = 2.0
    name: ClassVar[str] = "louder"
    num_processes: ClassVar[int] = 1

    def data_identity(self, data_dir):
        return {}

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        problem.model.model.norm.weight.data.mul_(self.factor)
        return RecoveryResult(problem.model, {"loss": "none", "num_tokens": 0, "seconds": 0.0}, [])
''',
    "conf/recovery/louder.yaml": """
# A larger final norm.
_target_: stranger.louder.Louder
factor: 3.0
""",
    # a repair: two files
    "halved.py": '''
"""What the last layer writes, halved."""

from dataclasses import dataclass
from typing import ClassVar

from slm_pipeline.repair.base import Repair, RepairProblem, extended
from slm_pipeline.surgery.ops.scale import Scale
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class Halved(Repair):
    name: ClassVar[str] = "halved"

    def repair(self, problem: RepairProblem) -> Plan:
        last = problem.plan.layer_groups[-1][0]
        return extended(problem.plan, ops=[*problem.plan.ops, Scale((last,), 0.5)])
''',
    "conf/repair/halved.yaml": """
# Half of the last layer.
_target_: stranger.halved.Halved
calibration: {source: text_file, path: text.txt, num_samples: 2, seq_len: 16}
""",
    # a similarity of the searches, and one of slm-analyze: one file
    "likeness.py": SHOWN["__init__.py"]
    + """
from slm_pipeline.analysis.token_metrics import TOKEN_METRICS, TokenMetric


def same_sign(states):
    import torch

    signs = torch.stack([state.float().sign() for state in states], dim=-2)
    return (signs @ signs.mT) / signs.shape[-1]


TOKEN_METRICS["same_sign"] = TokenMetric("same sign", "share of features of one sign, from -1 to 1", same_sign)
""",
    # an architecture: one entry
    "helium.py": '''
"""Helium's blocks are built as Llama's."""

from slm_pipeline.models.architectures import ARCHITECTURES, Architecture

ARCHITECTURES["helium"] = Architecture()
''',
    # a plot: one file
    "steepness.py": '''
"""A bar for the layers of each run."""

from slm_pipeline.report.plots import PLOTS, Picture
from slm_pipeline.show.canvas import new_figure, save


def depth(study, folder):
    found = [(run.job, run.summary["num_layers"]["pruned"]) for run in study.runs if run.summary]
    with new_figure(4, 3) as figure:
        figure.subplots().bar(*zip(*found, strict=True))
        yield Picture("how deep each run is", save(figure, folder / "depth"))


PLOTS["depth"] = depth
''',
    # a study of its own: one file
    "conf/sweeps/strange.yaml": """
# @package _global_
# What every third layer does.
defaults:
  - override /repair: halved
  - override /recovery: louder
  - override /evaluation: perplexity
  - override /measure: [perplexity, distinct]
name: strange
study:
  question: "What does every third layer do?"
  metric: pruned/distinct/pairs
evaluation:
  distinct: {prompts: [the river, a tree, old], num_tokens: 12}
hydra: {sweeper: {params: {method: "every_third,damped,reverse"}}}
""",
}

TEXT = "the river runs past the old mill and a tree " * 40
MODELS = ("dense", "pruned", "repaired", "recovered")
COMMON = [
    *("plugins=[stranger]", "model=random", "model.architecture=helium", "model.num_layers=6", "model.hidden_size=32"),
    *("model.intermediate_size=48", "calibration=text_file", "calibration.path=text.txt", "calibration.num_samples=2"),
    *("calibration.seq_len=16", "pruning_ratio=layers", "pruning_ratio.num_layers=4"),
]


def command(module: str, folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A console script in ``folder``, whose own path is not on the module path: as installed."""
    program = f"import sys; sys.argv[0] = 'slm'; from {module} import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def slm(folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return command("slm_pipeline.cli", folder, *words, check=check)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and a text."""
    folder = tmp_path_factory.mktemp("project")
    for name, content in PACKAGE.items():
        file = folder / "stranger" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content.lstrip("\n"))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def study(project: Path) -> Path:
    """The stranger's study with all that is the stranger's, each job in a process of its own."""
    slm(
        project, "-m", "sweeps=strange", *COMMON, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "evaluation.perplexity.corpora=[text.txt]", "evaluation.perplexity.window=32", "pictures=false",
        "tracker=wandb_offline",
    )  # fmt: skip
    (found,) = project.glob("outputs/sweeps/strange/*")
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_help_and_a_dry_run_know_all_of_it_without_torch(project):
    shown = slm(project, "--help", "plugins=[stranger]").stdout
    for option, comment in (
        ("every_third", "Drop every third layer."),
        ("damped", "Drop the last layers, damp those that are left."),
        ("halved", "Half of the last layer."),
        ("louder", "A larger final norm."),
        ("distinct", "How repetitive the model writes: the share of different pairs of tokens."),
    ):
        assert f"  {option:<20} {comment} (stranger)\n" in shown
    assert "  strange              What every third layer does. (stranger)\n" in shown
    words = [
        *COMMON,
        "method=damped",
        "repair=halved",
        "recovery=louder",
        "+measure=distinct",
        "evaluation.distinct.prompts=[a]",
    ]
    program = (
        f"import sys; sys.argv[1:] = {[*words, 'dry_run=true']!r}\n"
        "from slm_pipeline.cli import main; main(); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", program]
    done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True, check=True)
    *stages, torch_is_imported = done.stdout.splitlines()
    assert torch_is_imported == "False"
    assert {f"evaluate_{model}/distinct" for model in MODELS} <= {line.split()[0] for line in stages}


def test_method_recovery_and_architecture_do_what_they_say(study):
    import transformers

    third, damped, reverse = (summary_of(study / job) for job in "012")
    assert (third["method"], third["dropped"], third["layer_groups"]) == ("every_third", [1, 4], [[0], [2], [3], [5]])
    assert (damped["method"], damped["dropped"]) == ("damped", [4, 5])
    assert (reverse["method"], reverse["dropped"]) == ("reverse", [4, 5])
    for summary in (third, damped, reverse):
        assert (summary["recovery"]["name"], summary["recovery"]["options"]) == ("louder", {"factor": 3.0})
        model = transformers.AutoModelForCausalLM.from_pretrained(summary["checkpoint"])
        assert model.config.model_type == "helium"
        assert model.model.norm.weight.mean().item() == 3.0
        assert summary["repair"]["name"] == "halved"
        pruned = load_file(Path(summary["stages"]["merge"]["path"]) / "model/model.safetensors")
        for name, tensor in model.state_dict().items():
            if name.startswith("model.layers.3.") and name.endswith(("o_proj.weight", "down_proj.weight")):
                assert torch.equal(tensor, 0.5 * pruned[name])
            elif name.startswith("model.layers."):
                assert torch.equal(tensor, pruned[name])


def test_an_operation_changes_weights_and_is_named_wherever_the_plan_is(study):
    """Damped and reverse keep the same four layers."""
    summary, plain = summary_of(study / "1"), summary_of(study / "2")
    damped, whole = (load_file(Path(found["stages"]["merge"]["path"]) / "model/model.safetensors")
                     for found in (summary, plain))  # fmt: skip
    changed = {name for name, tensor in whole.items() if not tensor.equal(damped[name])}
    last = ("self_attn.o_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{i}.{name}.weight" for i in range(4) for name in last}
    for name in changed:
        torch.testing.assert_close(damped[name], 0.9 * whole[name])
    assert summary["changes"]["lines"] == ["damp of 0, 1, 2, 3"]
    assert summary["changes"]["marks"] == [{"label": "damp", "layers": [0, 1, 2, 3], "part": "whole"}]
    plan = json.loads((study / "1" / "plan.json").read_text())
    assert plan["ops"][1:-1] == [{"op": "damp", "layers": [i], "factor": 0.9} for i in range(4)]
    assert plan["ops"][-1] == {"op": "scale", "layers": [3], "factor": 0.5}  # of the repair
    assert "damp of 0, 1, 2, 3" in (study / "1" / "summary.md").read_text()
    assert "damp of 0, 1, 2, 3" in (Path(summary["checkpoint"]) / "README.md").read_text()
    (strips,) = study.rglob("layer_strips.svg")
    assert "damp" in strips.read_text()


def test_an_operation_is_read_by_its_name_and_refused_without_its_plugin(project, study):
    words = [*COMMON[1:-2], "method=from_plan", f"method.path={study / '1' / 'plan.json'}", "recovery=none"]
    words += ["evaluation=none", "dry_run=true"]
    refused = slm(project, *words, "model.architecture=llama", check=False)
    assert refused.returncode == 2
    assert "op 1 is 'damp'; this version knows correct, drop" in refused.stderr
    planned = slm(project, *COMMON[:1], *words).stdout.splitlines()
    assert [line.split()[:2] for line in planned[:2]] == [["calibrate", "reuse"], ["merge", "run"]]


def number(summary: dict[str, Any], model: str) -> float:
    return float(summary["numbers"][f"{model}/distinct/pairs"]["value"])


def test_a_measure_is_in_everything_that_a_run_leaves(study):
    run = study / "0"
    summary = summary_of(run)
    values = {f"{model}/distinct/pairs": number(summary, model) for model in MODELS}
    assert all(100 / 11 <= value <= 100 for value in values.values())  # 12 tokens are 11 pairs
    assert len(set(values.values())) > 1
    for key in values:
        said = summary["numbers"][key]
        assert (said["unit"], said["higher_is_better"], said["measured"]["measure"]) == ("%", True, "distinct")
        assert said["stderr"] > 0
    assert summary["details"]["evaluate_dense"]["distinct"]["shares"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key: value for line in lines for key, value in line.items() if "/distinct/" in key}
    assert logged == values
    assert {key: row[key] for row in history(run) for key in row if key in values} == values
    finals = [nested(r.summary.update) for r in wandb_records(run) if r.WhichOneof("record_type") == "summary"]
    final = {key: value for found in finals for key, value in found.items()}
    assert {key: final[key] for key in values} == values
    assert {f"{key} stderr" for key in values} <= final.keys()
    table = (run / "summary.md").read_text()
    assert "distinct pairs (%, higher)" in table
    assert "distinct: 12 tokens after each of 3 prompts" in table
    for value in values.values():
        assert f"{value:.1f}" in table.partition("## Results")[2].partition("##")[0]


def test_they_are_in_every_table_the_page_and_the_pictures(study):
    with open(study / "summary.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["every_third", "damped", "reverse"]
    for column in ("recovered/perplexity/text.txt", "pruned/distinct/pairs", "pruned/distinct/pairs stderr"):
        assert len({float(row[column]) for row in rows}) > 1
    assert [float(row["pruned/distinct/pairs"]) for row in rows] == [
        number(summary_of(study / job), "pruned") for job in "012"
    ]
    best = max(float(row["pruned/distinct/pairs"]) for row in rows)
    table = (study / "summary.md").read_text(encoding="utf-8")
    assert "Metric: pruned/distinct/pairs, higher is better" in table
    assert f"**{best:.1f} " in table
    assert "every_third" in table
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "What does every third layer do?" in page
    assert "every_third" in page
    assert "how deep each run is" in page
    assert "pruned/distinct/pairs" in page
    assert {"depth.png", "depth.svg"} <= {path.name for path in study.rglob("depth.*")}


def test_they_are_in_the_wandb_run(study):
    run = only(study / "0", "run")
    assert {"method=every_third", "repair=halved", "recovery=louder"} <= set(run.tags)


def records(project: Path, stage: str) -> list[dict[str, Any]]:
    """What the results of a stage are kept under."""
    files = (project / "outputs" / "store").glob(f"{stage}/*/stage.json")
    return [json.loads(file.read_text())["identity"] for file in files]


def test_the_store_names_the_package_and_its_code_in_the_keys_of_what_it_made(project, study):
    listed = command("slm_pipeline.commands.store", project, "list").stdout
    assert "every_third: 6 -> 4 layers: 0 2-3 5\n" in listed
    assert listed.count("1 run   louder after halved\n") == 3
    for method in ("every_third", "damped", "reverse"):
        assert f"1 run   halved after {method}, 4 layers\n" in listed
    assert f": distinct/pairs {number(summary_of(study / '0'), 'pruned'):.1f} +-" in listed
    (digest,) = {identity["plugins"]["stranger"] for identity in records(project, "recover")}
    assert len(digest) == 64
    assert {identity["plugins"]["stranger"] for identity in records(project, "repair")} == {digest}
    named = {identity["method"]: identity.get("plugins") for identity in records(project, "merge")}
    ours = {"stranger": digest}
    assert {name: named[name] for name in ("every_third", "damped", "reverse")} == {
        "every_third": ours, "damped": ours, "reverse": None,
    }  # fmt: skip
    of_measures = {identity["measure"]: identity.get("plugins") for identity in records(project, "evaluate")}
    assert of_measures == {"perplexity": None, "distinct": ours}


def objective(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``slm words``; the last line is what the job returned."""
    program = (
        "import sys; sys.argv[0] = 'slm'; from slm_pipeline.cli import main; from slm_pipeline.jobs import runner\n"
        "run, found = runner.run_job, []\n"
        "runner.run_job = lambda *given: found.append(run(*given))\n"
        "main(); print(found)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", program, *words]
    return subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True)


def test_a_measure_is_an_objective_and_measures_again_when_its_code_has_changed(project, study):
    """Of a job of the study, all but the stranger's measure is there afterwards."""
    words = [*COMMON, "method=reverse", "recovery=none", "evaluation=perplexity", "measure=[perplexity,distinct]"]
    words += ["evaluation.perplexity.corpora=[text.txt]", "evaluation.perplexity.window=32", "tracker=jsonl"]
    words += ["evaluation.distinct.prompts=[the river,a tree,old]", "evaluation.distinct.num_tokens=12"]
    words += ["pictures=false", "name=changed", "objective.metric=pruned/distinct/pairs"]
    whole = [f"evaluate_{model}/{label}" for model in MODELS[:2] for label in ("perplexity/text.txt", "distinct")]

    def planned() -> dict[str, str]:
        lines = (line.split() for line in slm(project, *words, "dry_run=true").stdout.splitlines())
        return {line[0]: line[1] for line in lines if line[1] in ("run", "reuse")}

    assert planned() == dict.fromkeys(["calibrate", "merge", *whole], "reuse")
    file = project / "stranger" / "distinct.py"
    try:
        file.write_text(DISTINCT.replace("100 * len(set(pairs))", "50 * len(set(pairs))"))
        again = [name for name, action in planned().items() if action == "run"]
        assert again == ["evaluate_dense/distinct", "evaluate_pruned/distinct"]
        done = objective(project, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        found = float(done.stdout.splitlines()[-1].strip("[]"))
        assert found == pytest.approx(number(summary_of(study / "2"), "pruned") / 2)
    finally:
        file.write_text(DISTINCT)


@pytest.mark.parametrize(("words", "message"), [
    (["objective.metric=pruned/distinct/pair"], "not measured by this job; it measures: ['num_layers', 'parameters',"),
    (["evaluation.distinct.num_tokens=1"], "evaluation.distinct.num_tokens=1 must be at least 2 and at most 1000"),
    (["evaluation.distinct.prompt=a"], "did you mean prompts?"),
])  # fmt: skip
def test_options_and_objective_of_a_measure_are_checked_before_anything_runs(project, words, message):
    words = ["+measure=distinct", "evaluation=perplexity", "evaluation.distinct.prompts=[a]", "recovery=none", *words]
    refused = slm(project, *COMMON, "method=reverse", *words, check=False)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert message in refused.stderr


def test_a_study_may_choose_its_measures_from_the_command_line(project):
    words = [*COMMON, "method=reverse", "recovery=none", "evaluation=perplexity", "evaluation.of=[pruned]"]
    words += ["evaluation.distinct.prompts=[a],[b]", "measure=[perplexity,distinct]"]
    lines = slm(project, "-m", *words, "dry_run=true").stdout.splitlines()
    stages = [line.split()[0] for line in lines if not line.startswith("warning")]
    one = ["calibrate", "merge", "evaluate_pruned/perplexity/bundled", "evaluate_pruned/distinct"]
    assert stages == ["#0", *one, "#1", "as", one[-1]]  # what #0 has already is said in one line


@pytest.fixture
def alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the similarity and the metric alone, for this process, which forgets them afterwards."""
    file = tmp_path / "alike" / "__init__.py"
    file.parent.mkdir()
    file.write_text(PACKAGE["likeness.py"])
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file that is written twice in a second is read twice
    with mock.patch.dict(SIMILARITIES), mock.patch.dict(TOKEN_METRICS):
        yield file
    sys.modules.pop("alike", None)
    plugins.use([])


ALIKE = ["plugins=[alike]", *(word for word in COMMON[1:] if word != "model.architecture=helium")]


def test_a_similarity_decides_a_search_and_its_code_is_in_key_and_memo(alike):
    words = [*ALIKE, "method=slm", "method.similarity=nearness", "recovery=none", "evaluation=none", "tracker=jsonl"]
    published = alike.read_text()

    def run(*more: str) -> str:
        sys.modules.pop("alike", None)  # as in a new process
        outcome = run_slm(*words, "pictures=false", *more)
        assert outcome.status == 0, outcome.err
        return outcome.out

    apart = []
    for name, factor in (("whole", 1.0), ("half", 0.5)):
        alike.write_text(published.replace("1 - (", f"1 - {factor} * ("))
        run(f"name={name}")
        (plan,) = Path("outputs/runs", name).glob("*/plan.json")
        apart.append(1 - json.loads(plan.read_text())["scores"]["steps"][0]["similarity"])
    assert 0 < apart[1] == pytest.approx(0.5 * apart[0])
    memos = [path.stem for path in Path().glob("outputs/store/calibrate/*/windows_*_official_nearness_*.jsonl")]
    assert len({name.rpartition("_")[2] for name in memos}) == 2
    alike.write_text(published)
    dry = [line.split()[:2] for line in run("dry_run=true").splitlines()]
    assert dry == [["calibrate", "reuse"], ["merge", "run"]]  # neither of these two is its code


def test_a_metric_of_its_own_is_a_map_of_the_analysis(alike, monkeypatch, capsys):
    words = ["similarity", *ALIKE[:5], "calibration=text_file", "calibration.path=text.txt"]
    words += ["analysis.metrics=[same_sign]", "hydra.run.dir=found", "calibration.num_samples=4"]
    monkeypatch.setattr(sys, "argv", ["slm-analyze", *words])
    analyze.main()
    assert "share of features of one sign, from -1 to 1" in capsys.readouterr().out
    found = json.loads(Path("found/similarity.json").read_text())
    matrix = found["maps"]["text_file"]["same_sign"]["matrix"]
    assert [row[i] for i, row in enumerate(matrix)] == pytest.approx([1.0] * 7)
    assert all(-1 <= value < 1 for i, row in enumerate(matrix) for value in row[:i])
    assert Path("found/same_sign.png").is_file()


def test_without_its_plugin_an_option_is_none(project):
    refused = slm(project, *COMMON[1:], "method=every_third", "dry_run=true", check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "method=every_third: no option of that name" in refused.stderr
