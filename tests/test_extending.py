"""A stranger's package: each thing that can be added, in the fewest files, run to the end and shown everywhere."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_files import only

REPOSITORY = Path(__file__).resolve().parent.parent

(NEARNESS,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/extending.md").read_text("utf-8"), re.DOTALL)

PACKAGE = {
    # what its modules add to registries, it adds when it is imported
    "__init__.py": "from stranger import helium, likeness, steepness",
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
    # a similarity of the searches, and one of slm-analyze: one file
    "likeness.py": NEARNESS
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
  - override /recovery: louder
  - override /evaluation: perplexity
name: strange
study: {question: "What does every third layer do?"}
hydra: {sweeper: {params: {method: "every_third,reverse"}}}
""",
}

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
    (folder / "text.txt").write_text("the river runs past the old mill and a tree " * 40)
    return folder


@pytest.fixture(scope="module")
def study(project: Path) -> Path:
    """The stranger's study with its method, recovery, architecture and plot, each job in a process of its own."""
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
    for option, comment in (("every_third", "Drop every third layer."), ("louder", "A larger final norm.")):
        assert f"  {option:<20} {comment} (stranger)\n" in shown
    assert "  strange              What every third layer does. (stranger)\n" in shown
    program = (
        f"import sys; sys.argv[1:] = {[*COMMON, 'method=every_third', 'recovery=louder', 'dry_run=true']!r}\n"
        "from slm_pipeline.cli import main; main(); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", program]
    done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_method_recovery_and_architecture_do_what_they_say(study):
    import transformers

    third, reverse = summary_of(study / "0"), summary_of(study / "1")
    assert (third["method"], third["dropped"], third["layer_groups"]) == ("every_third", [1, 4], [[0], [2], [3], [5]])
    assert (reverse["method"], reverse["dropped"]) == ("reverse", [4, 5])
    for summary in (third, reverse):
        assert (summary["recovery"]["name"], summary["recovery"]["options"]) == ("louder", {"factor": 3.0})
        model = transformers.AutoModelForCausalLM.from_pretrained(summary["checkpoint"])
        assert model.config.model_type == "helium"
        assert model.model.norm.weight.mean().item() == 3.0


def test_they_are_in_every_table_the_page_and_the_pictures(study):
    with open(study / "summary.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["every_third", "reverse"]
    scored = {name for name in rows[0] if "perplexity" in name and "recovered" in name}
    assert len(scored) == 1
    assert len({row[name] for row in rows for name in scored}) == 2
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "What does every third layer do?" in page
    assert "every_third" in page
    assert "how deep each run is" in page
    assert {"depth.png", "depth.svg"} <= {path.name for path in study.rglob("depth.*")}
    assert "every_third" in (study / "summary.md").read_text(encoding="utf-8")


def test_they_are_in_the_wandb_run(study):
    run = only(study / "0", "run")
    assert {"method=every_third", "recovery=louder"} <= set(run.tags)


def test_the_store_names_the_package_and_its_code_in_the_keys_of_what_it_made(project, study):
    listed = command("slm_pipeline.commands.store", project, "list").stdout
    assert "every_third: 6 -> 4 layers: 0 2-3 5\n" in listed
    assert listed.count("runs  louder\n") == 2
    store = project / "outputs" / "store"
    inputs = {stage: [json.loads(file.read_text()) for file in store.glob(f"{stage}/*/stage.json")]
              for stage in ("merge", "recover")}  # fmt: skip
    (digest,) = {record["identity"]["plugins"]["stranger"] for record in inputs["recover"]}
    assert len(digest) == 64
    named = {record["identity"]["method"]: record["identity"].get("plugins") for record in inputs["merge"]}
    assert named == {"every_third": {"stranger": digest}, "reverse": None}


def test_a_similarity_decides_a_search_and_its_code_is_in_key_and_memo(project):
    words = [*COMMON, "method=slm", "method.similarity=nearness", "recovery=none", "evaluation=none", "tracker=jsonl"]
    apart = []
    code = project / "stranger" / "likeness.py"
    published = code.read_text()
    for name, factor in (("whole", 1.0), ("half", 0.5)):
        code.write_text(published.replace("1 - (", f"1 - {factor} * ("))
        slm(project, *words, f"name={name}", "pictures=false")
        (plan,) = project.glob(f"outputs/runs/{name}/*/plan.json")
        apart.append(1 - json.loads(plan.read_text())["scores"]["steps"][0]["similarity"])
    assert 0 < apart[1] == pytest.approx(0.5 * apart[0])
    memos = [path.stem for path in project.glob("outputs/store/calibrate/*/windows_*_official_nearness_*.jsonl")]
    assert len({name.rpartition("_")[2] for name in memos}) == 2
    code.write_text(published)
    dry = [line.split()[:2] for line in slm(project, *words, "dry_run=true").stdout.splitlines()]
    assert dry == [["calibrate", "reuse"], ["merge", "run"]]  # neither of these two is its code


def test_a_metric_of_its_own_is_a_map_of_the_analysis(project):
    words = ["similarity", *COMMON[:6], "calibration=text_file", "calibration.path=text.txt", "--metric", "same_sign"]
    done = command("slm_pipeline.commands.analyze", project, *words, "calibration.num_samples=4")
    assert "share of features of one sign, from -1 to 1" in done.stdout
    found = json.loads((project / "outputs/analysis/similarity/similarity.json").read_text())
    matrix = found["maps"]["text_file"]["same_sign"]["matrix"]
    assert [row[i] for i, row in enumerate(matrix)] == pytest.approx([1.0] * 7)
    assert all(-1 <= value < 1 for i, row in enumerate(matrix) for value in row[:i])
    assert (project / "outputs/analysis/similarity/same_sign.png").is_file()


def test_without_its_plugin_an_option_is_none(project):
    refused = slm(project, *COMMON[1:], "method=every_third", "dry_run=true", check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Could not find 'method/every_third'" in refused.stderr
