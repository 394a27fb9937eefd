"""conf/ and sweeps/: everything composes, says what it is, and agrees with the code."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import random_source, run_slm
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import RangeSweep
from omegaconf import OmegaConf

from slm_pipeline import config
from slm_pipeline.config import help_page
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.job import Job, numbers_to_come, prepare
from slm_pipeline.methods.target import Floor
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

GROUPS = sorted(path.name for path in config.CONF_DIR.iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((config.CONF_DIR / group).glob("*.yaml"))]
SWEEPS = sorted((config.SWEEPS_ROOT / "sweeps").glob("*.yaml"))
AGENTS = sorted((config.SWEEPS_ROOT / "sweeps" / "wandb").glob("*.yaml"))
NEEDS_RAY = "hydra/launcher=ray needs hydra-ray-launcher: pip install 'slm-pipeline[ray]'"
LAUNCHERS = sorted((config.CONF_DIR / "hydra" / "launcher").glob("*.yaml"))
FILES = [*sorted(config.CONF_DIR.rglob("*.yaml")), *SWEEPS]
PLUG_INS = [path for group in ("method", "recovery") for path in sorted((config.CONF_DIR / group).glob("*.yaml"))]

# What an option needs beside its own name.
NEEDS = {
    ("model", "local"): ["model.path=model"],
    ("calibration", "text_file"): ["calibration.path=text.txt"],
    ("threshold", "fixed"): ["threshold.value=0.8", "pruning_ratio=none"],
    ("threshold", "published"): ["model=llama2_7b", "pruning_ratio=r35"],
    ("pruning_ratio", "layers"): ["pruning_ratio.num_layers=24"],
    ("pruning_ratio", "latency"): ["pruning_ratio.speedup=1.3"],
    ("pruning_ratio", "none"): ["threshold=fixed", "threshold.value=0.8"],
    ("method", "from_plan"): ["method.path=plan.json"],
    ("experiment", "streamline_replacement"): [
        "recovery.path=text.txt",
        "recovery.num_examples=null",
        "recovery.validation_size=1",
    ],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound_models: dict[str, Path]) -> Path:
    """A working directory with a text, a model and a plan of 30 layers; hub models have their usual depth."""
    monkeypatch.chdir(tmp_path)
    command_line.set_environment()
    (tmp_path / "text.txt").write_text(
        "The river runs past the mill and the tree.\n" * 60 + "\n" + "The mill stood still.\n" * 120
    )
    (tmp_path / "model").symlink_to(sound_models["llama_32_layers"])
    model = {"name": "smollm2_135m", "fingerprint": "x", "num_layers": 30}
    plan = Plan(model, "slm", {}, {}, [Merge((3, 4), "mean")])
    plan.write(tmp_path / "plan.json")
    monkeypatch.setattr(
        "slm_pipeline.models.source._hub",
        lambda options: dataclasses.replace(
            random_source(num_layers=32), config=options, fingerprint=f"hub:{options.repo}"
        ),
    )
    monkeypatch.setattr("slm_pipeline.data.hub.commit", lambda *_, **__: "0" * 40)
    monkeypatch.setattr("slm_pipeline.jobs.tracking._has_api_key", lambda: True)
    monkeypatch.setattr("slm_pipeline.jobs.other_trackers.check", lambda kind: None)  # whatever is installed
    return tmp_path


def job_of(overrides: list[str]) -> Job:
    with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF_DIR)):
        return prepare(config.to_config(compose("config", overrides=overrides)), "slm")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_is_checked(group, option, here):
    added = "+" if group == "measure" else ""  # they stand side by side
    job = job_of([f"{added}{group}={option}", *NEEDS.get((group, option), [])])
    if group == "measure":
        assert job.evaluation.measures[option].name == option
    if group == "model":
        assert job.config.model.name == option
        if job.config.model.source == "hub":
            assert job.config.model.repo
    if group in ("method", "recovery"):
        built = getattr(job, group)
        assert (built.name if built else "none") == option
    if group == "calibration":
        assert (job.config.calibration.num_samples, job.config.calibration.seq_len) == (10, 128)
        assert job.config.calibration.source == option
    if group == "threshold":
        assert job.threshold.floor == {"auto": None, "fixed": Floor(0.8), "published": Floor(0.68)}[option]
    if group == "pruning_ratio" and option.startswith("r"):
        assert job.config.pruning_ratio.ratio == int(option[1:]) / 100
    if group == "evaluation":
        targets = [] if option == "none" else list(config.TARGETS)
        assert job.evaluation.of == targets
    if group == "tracker":
        assert job.config.tracker.kind == ("wandb" if option == "wandb_offline" else option)


@pytest.mark.parametrize(
    ("ratio", "removed"), [("r10", 3), ("r20", 6), ("r25", 8), ("r30", 9), ("r35", 10), ("r50", 15)]
)
def test_ratio_options_remove_as_many_layers_as_the_contract_says(ratio, removed, here):
    """30 layers: ties go to even, 7.5 to 8 and 10.5 to 10."""
    assert job_of([f"pruning_ratio={ratio}"]).num_layers == 30 - removed


def test_llama2_7b_as_published(here):
    assert job_of(["model=llama2_7b", "pruning_ratio=r20"]).num_layers == 32 - 6
    assert job_of(["model=llama2_7b", "pruning_ratio=r35"]).num_layers == 32 - 11
    # The floor decides, whatever ratio it is known by.
    assert job_of(["model=llama2_7b", "pruning_ratio=r35", "threshold=published"]).num_layers is None
    assert job_of(["model=llama2_7b", "pruning_ratio=r20", "threshold=published"]).threshold.floor == Floor(0.81)


def test_seed_reaches_the_calibration_and_the_user_overrides_the_published_size(here):
    options = job_of(["seed=7", "calibration.num_samples=3"]).config.calibration
    assert (options.num_samples, options.seq_len, options.seed) == (3, 128, 7)


WITH_OPTIONS = [file for file in PLUG_INS if file.stem != "combined"]  # whose keys are its steps


@pytest.mark.parametrize("file", WITH_OPTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_plug_in_keys_and_values_are_those_of_the_code(file):
    """Keys that have a default in the code have the same in YAML, so that help and code cannot drift apart."""
    values = yaml.safe_load(file.read_text())
    values = values.get(file.parent.name, values)  # some are written from the top
    for shared in values.pop("defaults", []):
        if isinstance(shared, str) and shared != "_self_":  # and no choice of another group's
            file_of_shared = file.parent / f"{shared.partition('@')[0]}.yaml"
            values = {**yaml.safe_load(file_of_shared.read_text()), **values}
    if not values:
        assert file.stem == "none"
        return
    module, _, name = values.pop("_target_").rpartition(".")
    options = getattr(importlib.import_module(module), name)
    assert options.name == file.stem
    assert sorted(values) == sorted(field.name for field in dataclasses.fields(options))
    for field in dataclasses.fields(options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING:
            assert values[field.name] == "???"
        else:
            assert values[field.name] == (dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default)


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_says_what_it_is_and_how_to_use_it(file, here):
    comments = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    comments = [comment for comment in comments if not comment.startswith("@package")]
    assert comments[0].endswith((".", "?")) or ". " in comments[0] or "; " in comments[0]
    command = next(comment for comment in comments if comment.startswith("slm"))
    words = itertools.takewhile(
        lambda word: "=" in word or word == "-m", command.split()[1:]
    )  # then a remark may follow
    examples = {"FOLDER": "model", "FILE": "text.txt", "outputs/runs/slm/<time>/plan.json": "plan.json"}
    overrides = []
    for word in words:
        for example, given in examples.items():
            word = word.replace(example, given)
        if word != "-m":
            overrides.append(word)
    assert overrides or file.stem == "config"
    with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF_DIR)):
        composed = compose("config", overrides=overrides, return_hydra_config=True)
    group, option = file.parent.name, file.stem
    if file not in SWEEPS and group in GROUPS and group != "measure":
        assert composed.hydra.runtime.choices[group] == option


def test_the_alpaca_experiment_has_the_published_settings(here):
    published = {
        "rank": 8,
        "alpha": 16,
        "dropout": 0.05,
        "learning_rate": 1e-4,
        "num_epochs": 2.0,
        "batch_size": 64,
        "micro_batch_size": 4,
        "warmup_steps": 100,
        "cutoff_len": 256,
        "eval_steps": 100,
        "save_steps": 200,
        "validation_size": 2000,
        "split_seed": 42,
        "dtype": "bfloat16",
        "schedule": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "completion_only": True,
        "packing": False,
        "target_modules": None,
    }
    recovery = job_of(["experiment=lora_alpaca"]).recovery
    assert {name: getattr(recovery, name) for name in published} == published


def test_the_replacement_layers_published_settings(here):
    published = {
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "final_learning_rate": 0.25,  # 5e-5 at the end
        "weight_decay": 1e-3,
        "max_grad_norm": 5.0,
        "batch_size": 128,
        "cutoff_len": 2048,
        "packing": True,
        "num_epochs": 1.0,
        "warmup_steps": 18,
        "loss": "mse",
        "objective": "states",
    }
    job = job_of(["experiment=streamline_replacement", *NEEDS["experiment", "streamline_replacement"]])
    assert {name: getattr(job.recovery, name) for name in published} == published
    assert job.config.method["replacement"] is True


def swept(file: Path) -> list[list[str]]:
    """For each of a sweep's axes its overrides; of a range the first and the last."""
    params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
    axes = []
    for item in OverridesParser.create().parse_overrides([f"{name}={values}" for name, values in params.items()]):
        values = list(item.sweep_string_iterator()) if item.is_sweep_override() else [item.get_value_string()]
        if isinstance(item.value(), RangeSweep):
            values = [values[0], values[-1]]
        axes.append([f"{item.get_key_element()}={value}" for value in values])
    return axes


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_every_sweep_passes_all_checks(file, here):
    """Not every combination, of which there are hundreds: as many jobs as the longest axis has values."""
    axes = swept(file)
    for number in range(max(map(len, axes))):
        chosen = [values[number % len(values)] for values in axes]
        job = job_of([f"sweeps={file.stem}", *chosen])
        assert job.config.name == file.stem
        assert job.config.study.question


@pytest.mark.parametrize(("sweep", "num_jobs"), [("thresholds", 8), ("search", 1), ("similarity", 12)])
def test_a_dry_run_of_a_sweep_shows_its_jobs(sweep, num_jobs, here):
    """Of a search, one as an example."""
    outcome = run_slm("-m", f"sweeps={sweep}", "dry_run=true")
    assert outcome.status == 0, outcome.err
    assert sum(line.startswith("#") for line in outcome.out.splitlines()) == num_jobs


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_declares_its_axes_its_metric_and_its_plot_and_is_in_the_list_of_them(file):
    values = yaml.safe_load(file.read_text())
    study = values["study"]
    assert values["name"] == file.stem
    assert study["question"] == file.read_text().splitlines()[1].removeprefix("# ")
    target = study["metric"].partition("/")[0]
    assert target in values.get("evaluation", {}).get("of", config.TARGETS)
    axes = set(values["hydra"]["sweeper"]["params"])
    drawn = {study["x"], *study.get("series", [])}
    measured = {name for name in drawn if name.partition("/")[0] in config.TARGETS}
    assert drawn - measured <= axes | {"num_layers", "parameters"}
    if measured:
        first = [f"{name}={str(of).split(',')[0]}" for name, of in values["hydra"]["sweeper"]["params"].items()]
        job = job_of([f"sweeps={file.stem}", *first])
        assert measured <= numbers_to_come(job.config, job.repair, job.recovery, job.evaluation).keys()
    assert set(study) <= {field.name for field in dataclasses.fields(config.StudyConfig)}
    assert f"`{file.stem}`" in (config.SWEEPS_ROOT / "docs" / "studies.md").read_text()


@pytest.mark.parametrize("file", AGENTS, ids=lambda path: path.stem)
def test_what_the_wandb_agent_starts_passes_all_checks(file, here):
    """The agent puts the values that it chose in the place of ``${args_no_hyphens}``; they are those of our sweep."""
    values = yaml.safe_load(file.read_text())
    program, *words, place = values["command"]
    assert (program, place) == ("slm", "${args_no_hyphens}")
    parameters = [[f"{name}={value}" for value in given["values"]] for name, given in values["parameters"].items()]
    assert parameters == swept(config.SWEEPS_ROOT / "sweeps" / file.name)
    job = job_of([*words, *(chosen[-1] for chosen in parameters)])
    assert values["metric"]["name"] in numbers_to_come(job.config, job.repair, job.recovery, job.evaluation)


def test_what_a_search_shares_names_its_storage(here):
    """Trials go to the same storage only if their numbers can be compared."""

    def name(*overrides: str) -> str:
        with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF_DIR)):
            composed = compose("config", overrides=["sweeps=search", *overrides], return_hydra_config=True)
        return str(composed.hydra.sweeper.study_name)

    assert name() == name("output_dir=elsewhere", "tracker=jsonl", "hydra.sweeper.n_trials=5")
    others = ["recovery=lora", "data_dir=texts", "evaluation.limit=7", "calibration.seq_len=64"]
    assert len({name(), *map(name, others)}) == 5


@pytest.mark.parametrize("launcher", [path.stem for path in LAUNCHERS])
def test_every_launcher_is_one_that_hydra_starts(launcher, here):
    from hydra.core.plugins import Plugins

    with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF_DIR)):
        composed = compose("config", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    options = OmegaConf.to_container(composed.hydra.launcher)
    if launcher == "ray":  # which the tests do without: 400 MB
        assert options["_target_"] == "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
        outcome = run_slm("-m", "hydra/launcher=ray", "seed=1,2")
        assert (outcome.status, outcome.err.splitlines()[-1]) == (2, f"error: {NEEDS_RAY}")
    else:
        assert options["_target_"] in Plugins.instance().class_name_to_class
    assert OmegaConf.missing_keys(composed.hydra.launcher) == set()


def test_help_lists_every_option_with_its_first_comment():
    text = run_slm("--help").out
    assert text.strip() == help_page.text().strip()
    for group, option in OPTIONS:
        section = text.split(f"\n{group}=\n")[1].split("\n\n")[0]
        (line,) = [line for line in section.splitlines() if line.split()[0] == option]
        assert len(line.split()) > 2
    for file in [*SWEEPS, *LAUNCHERS]:
        assert f"\n  {file.stem} " in text
    for key in ("name", "seed", "stages", "force", "keep", "dry_run", "pictures", "output_dir", "data_dir"):
        assert f"\n  {key}=" in text


def test_help_lists_what_is_the_users_own(tmp_path, monkeypatch):
    """Studies in ./sweeps, which count before the shipped ones, and the options of --config-dir."""
    monkeypatch.chdir(tmp_path)
    for name, comment in (("sweeps/thresholds", "My thresholds."), ("mine/method/my_slm", "SLM as I like it.")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.yaml").write_text(f"# {comment}\nname: x\n")
    lines = [" ".join(line.split()) for line in run_slm("--config-dir", "mine", "--help").out.splitlines()]
    assert "thresholds My thresholds. (sweeps/thresholds.yaml)" in lines
    assert len([line for line in lines if line.startswith("thresholds ")]) == 1
    assert "my_slm SLM as I like it. (mine/method/my_slm.yaml)" in lines
    assert "my_slm SLM" not in run_slm("--help").out


NEW_METHOD = """
from dataclasses import dataclass, field
from typing import ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, Method, PruningProblem
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan


@dataclass(kw_only=True)
class DropTop(Method):
    keep_last: int = 1
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(4, 32))
    name: ClassVar[str] = "drop_top"

    def __post_init__(self) -> None:
        if self.keep_last < 0:
            raise UserError(f"method.keep_last={self.keep_last} must be at least 0")

    def plan(self, problem: PruningProblem) -> Plan:
        depth = problem.view.num_layers
        end = depth - self.keep_last
        dropped = list(range(end - problem.target.remove, end))
        return self.new_plan(problem, ops=[Drop(tuple(dropped))])
"""


def test_a_new_method_is_one_python_file_and_one_yaml(here, monkeypatch):
    import slm_pipeline.methods

    (here / "methods").mkdir()
    (here / "methods" / "drop_top.py").write_text(NEW_METHOD)
    (here / "conf" / "method").mkdir(parents=True)
    (here / "conf" / "method" / "drop_top.yaml").write_text(
        "_target_: slm_pipeline.methods.drop_top.DropTop\n"
        "keep_last: 1\n"
        "published_calibration: {num_samples: 4, seq_len: 32}\n"
    )
    monkeypatch.setattr(slm_pipeline.methods, "__path__", [*slm_pipeline.methods.__path__, str(here / "methods")])
    monkeypatch.setattr("slm_pipeline.jobs.summary._draw", lambda *_: [])
    overrides = [
        "--config-dir=conf", "model=random", "model.num_layers=6", "pruning_ratio=r35",
        "calibration=text_file", "calibration.path=text.txt", "recovery=none", "evaluation=none", "tracker=jsonl",
        "method=drop_top",
    ]  # fmt: skip
    try:
        outcome = run_slm(*overrides)
        assert outcome.status == 0, outcome.err
        (summary,) = Path("outputs/runs").glob("*/*/summary.json")
        summary = json.loads(summary.read_text())
        assert (summary["method"], summary["dropped"]) == ("drop_top", [3, 4])
        assert summary["layer_groups"] == [[0], [1], [2], [5]]
        assert summary["calibration"]["num_tokens"] == 4 * 32
        assert "method.keep_last=-1 must be at least 0" in run_slm(*overrides, "method.keep_last=-1").err
    finally:
        sys.modules.pop("slm_pipeline.methods.drop_top", None)


@pytest.mark.parametrize(
    "file", [file for file in PLUG_INS if file.parent.name == "method"], ids=lambda path: path.stem
)
def test_every_method_says_whose_calibration_size_it_has(file):
    (line,) = (line for line in file.read_text().splitlines() if "published_calibration:" in line)
    assert re.search(r"# (ours|the authors'|as come: the authors')", line)
    narrower = ("flap", "wanda_sp", "nystrom", "obs", "fisher_mask", "head_importance", "kcm")
    theirs_are_larger = ("angular", "replaceme", "shortgpt", "mka")
    assert ("# ours; " in line) == (file.stem in (*theirs_are_larger, "finercut", *narrower))


def test_joint_brings_its_repair_alone_and_as_a_step(here):
    """Unless another is asked for; the step is where it belongs."""
    step = ["method=combined", "method@method.second=joint"]
    alone, job = job_of(["method=joint"]), job_of(step)
    assert [type(found.repair).__name__ for found in (alone, job)] == ["Refit", "Refit"]
    assert [of.method.name for of in job.method.steps.values()] == ["slm", "joint"]
    assert job.config.method["second"].keys() == {*alone.config.method, "share"}
    assert job_of([*step, "repair=none"]).repair is None


def test_several_methods_read_as_much_text_as_the_one_that_reads_most(here):
    def size(*overrides):
        calibration = job_of(["method=combined", *overrides]).config.calibration
        return calibration.num_samples, calibration.seq_len

    assert size() == (128, 128)  # Wanda-sp's; SLM's are 10 x 128
    assert size("method@method.first=come") == (9, 2048)
    assert size("method@method.first=come", "method.second.published_calibration.num_samples=500") == (500, 128)
    assert size("calibration.num_samples=3") == (3, 128)


def test_several_options_of_a_group_are_refused_in_a_file_too(here):
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "both.yaml").write_text(
        "# @package _global_\n# Both.\ndefaults:\n  - override /method: [slm, flap]\n"
    )
    outcome = run_slm("--config-dir", str(here / "conf"), "experiment=both", "dry_run=true")
    assert outcome.status == 2
    assert "a file chooses several options of method" in outcome.err
    outcome = run_slm("method=[slm,flap]", "dry_run=true")
    assert "methods in turn are method=combined with its steps" in outcome.err
    outcome = run_slm("method=combined", "method@method.first=none", "dry_run=true")
    assert "method@method.first=none: none takes no part of a target, so it cannot be a step" in outcome.err


def test_a_users_own_yaml_may_have_three_steps(here):
    (here / "conf" / "method").mkdir(parents=True)
    (here / "conf" / "method" / "three.yaml").write_text(
        "# Three.\ndefaults:\n  - /method@depth: angular\n  - /method@mlp: flap\n  - /method@heads: flap\n  - _self_\n"
        "_target_: slm_pipeline.methods.combined.Combined\ndepth: {share: 0.5}\nmlp: {share: 0.3, sublayers: mlp}\n"
        "heads: {share: null, sublayers: attention}\n"
        'published_calibration: {num_samples: "${largest_calibration:num_samples}", seq_len: 64}\n'
    )
    outcome = run_slm("--config-dir", str(here / "conf"), "method=three", "dry_run=true")
    assert (outcome.status, outcome.err) == (0, "")
    outcome = run_slm("--config-dir", str(here / "conf"), "method=three", "method.mlp.sublayers=both", "dry_run=true")
    assert "method.heads (flap) cannot come after method.mlp (flap): both narrow the same sublayers" in outcome.err


def test_a_threshold_whose_ratio_is_inferred_is_said_so(here, caplog):
    assert job_of(["model=llama2_7b", "pruning_ratio=r35", "threshold=published"]).threshold.floor == Floor(0.68)
    assert "that 0.68 goes with pruning_ratio=r35 is inferred from the names in the authors' scripts" in caplog.text
    caplog.clear()
    assert job_of(["model=llama2_13b", "pruning_ratio=none", "threshold=published"]).threshold.floor == Floor(0.72)
    assert "inferred" not in caplog.text
