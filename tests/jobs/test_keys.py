"""What each result's key depends on: changing X changes the keys of Y and of no other.

Nothing is run. A merge that is looked at is taken as finished with a plan that changes nothing but what a row says, so
that what follows is seen to depend on the plan alone.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_folders
import own_tasks
import pytest
from omegaconf import OmegaConf, open_dict
from task_rows import TASK_ROWS

from slm_pipeline import config
from slm_pipeline.config import TARGETS, plugins
from slm_pipeline.config.groups import build
from slm_pipeline.jobs import command_line
from slm_pipeline.jobs.job import Job, prepare
from slm_pipeline.jobs.stages.merge import checkpoint_id
from slm_pipeline.jobs.steps import steps
from slm_pipeline.machine import gpus, provenance
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan

# The job: refit, then LoRA on 30 examples of a file, every measure, on random weights.
JOB = [
    "model=random", "model.num_layers=6", "model.hidden_size=32", "tracker=jsonl", "data_dir=data",
    "calibration=text_file", "calibration.path=calibration.txt", "calibration.num_samples=4", "calibration.seq_len=32",
    "repair=refit", "repair.calibration.num_samples=4", "repair.calibration.seq_len=32",
    "recovery.source=file", "recovery.path=alpaca.json", "recovery.validation_size=4", "recovery.batch_size=4",
    "recovery.micro_batch_size=2", "evaluation=zero_shot", "evaluation.data=.", "evaluation.tasks=[piqa,boolq]",
    "evaluation.perplexity.corpora=[first.txt,second.txt]", "evaluation.perplexity.window=64",
    "evaluation.fidelity.corpora=[first.txt]", "evaluation.fidelity.window=64", "evaluation.efficiency.enabled=true",
    "evaluation.lm_eval.tasks=[both,sums]", "evaluation.lm_eval.include_path=tasks",
]  # fmt: skip

PERPLEXITY = {"perplexity/first.txt", "perplexity/second.txt"}
FIDELITY = {"fidelity/first.txt"}  # of the dense model there is none
TASKS = {"piqa", "boolq"}
LM_EVAL = {"lm_eval/both", "lm_eval/sums"}
EFFICIENCY = {"efficiency"}
PARTS = PERPLEXITY | FIDELITY | TASKS | LM_EVAL | EFFICIENCY


def scores(parts: Iterable[str], targets: Iterable[str] = TARGETS) -> set[str]:
    """The stages that measure these parts."""
    return {
        f"evaluate_{target}/{part}"
        for target in targets
        for part in parts
        if not (target == "dense" and part.startswith("fidelity"))
    }


NOTHING: set[str] = set()
MERGE = {"merge"}
CALIBRATION = {"calibrate", "merge"}
RECOVERY = {"recover"} | scores(PARTS, ["recovered"])
REPAIR = {"repair"} | scores(PARTS, ["repaired"]) | RECOVERY
TEXT = CALIBRATION | REPAIR  # the repair's own text is the calibration's, unless something else is said
ALL = CALIBRATION | REPAIR | scores(PARTS)


@dataclass(frozen=True)
class Row:
    """An option, another value, and the stages whose keys that changes.

    Attributes:
        given: options that are set before and after.
        along: options that the new value needs.
    """

    option: str
    value: Any
    changes: set[str]
    given: Mapping[str, Any] = field(default_factory=dict)
    along: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([f"{self.option}={self.value}", *(f"{key}={value}" for key, value in self.given.items())])


NO_SIZES = dict.fromkeys(
    f"model.{name}"
    for name in (
        "architecture", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size",
        "seed",
    )
)  # fmt: skip
LOCAL = {**NO_SIZES, "model.source": "local", "model.path": "model"}
HUB = {**NO_SIZES, "model.source": "hub", "model.repo": "somebody/model"}
FIXED = {"threshold.kind": "fixed", "threshold.value": 0.8, "pruning_ratio.ratio": None}
LATENCY = {"pruning_ratio.of": "latency", "pruning_ratio.ratio": None, "pruning_ratio.speedup": 1.3}
FROM_HUB = {"recovery.source": "hub", "recovery.path": None}

TABLE = [
    Row("name", "other", NOTHING),
    Row("seed", 7, TEXT),
    Row("seed", 7, RECOVERY, given={"calibration.seed": 1}),
    Row("plugins", ["another_package"], NOTHING),
    Row("stages", ["merge", "evaluate"], NOTHING),
    Row("force", ["merge"], NOTHING),
    Row("keep", "plan", NOTHING),
    Row("dry_run", True, NOTHING),
    Row("pictures", False, NOTHING),
    Row("study.question", "Which?", NOTHING),
    Row("study.metric", "num_layers", NOTHING),
    Row("study.x", "threshold", NOTHING),
    Row("study.series", ["method"], NOTHING),
    Row("study.sort_by", "num_layers", NOTHING),
    Row("objective.metric", "num_layers", NOTHING),
    Row("objective.direction", "maximize", NOTHING),
    Row("objective.max_layers", 4, NOTHING, given={"objective.metric": "num_layers"}),
    Row("output_dir", "elsewhere", NOTHING),
    Row("data_dir", "copy", NOTHING),
    Row("tracker.kind", "wandb", NOTHING),
    Row("tracker.mode", "online", NOTHING),
    Row("tracker.project", "other", NOTHING),
    Row("tracker.entity", "somebody", NOTHING),
    Row("tracker.tags", ["a"], NOTHING),
    #
    Row("model.name", "other", NOTHING),
    Row("model.source", "local", ALL, along=LOCAL),
    Row("model.repo", "somebody/other", ALL, given=HUB),
    Row("model.revision", "v2", ALL, given=HUB),
    Row("model.path", "copy_of_model", NOTHING, given=LOCAL),
    Row("model.path", "other_model", ALL, given=LOCAL),
    Row("model.dtype", "bfloat16", ALL),
    Row("model.dtype", "bfloat16", ALL, given=LOCAL),
    Row("model.device", "cpu", NOTHING),
    Row("model.device", "cuda", scores(EFFICIENCY), given={**LOCAL, "model.device": "cpu"}),
    Row("model.device", "cuda", ALL, given={"model.device": "cpu"}),  # random weights are drawn there
    Row("model.device", "cuda:1", NOTHING, given={"model.device": "cuda"}),
    Row("model.trust_remote_code", True, NOTHING, given=LOCAL),
    Row("model.published_thresholds", {"r20": 0.5}, NOTHING),
    Row("model.published_thresholds", {"r20": 0.5}, MERGE, given={
        "model.published_thresholds": {"r20": 0.6}, "threshold.kind": "published"}),
    Row("model.architecture", "qwen3", ALL),
    Row("model.num_layers", 8, ALL),
    Row("model.hidden_size", 64, ALL),
    Row("model.intermediate_size", 64, ALL),
    Row("model.num_heads", 2, ALL),
    Row("model.num_kv_heads", 1, ALL),
    Row("model.vocab_size", 400, ALL),
    Row("model.seed", 7, ALL),
    #
    Row("calibration.source", "bundled", TEXT, along={"calibration.path": None}),
    Row("calibration.path", "first.txt", TEXT),
    Row("calibration.path", "../copy/calibration.txt", NOTHING),
    Row("calibration.num_samples", 5, CALIBRATION),
    Row("calibration.seq_len", 16, CALIBRATION),
    Row("calibration.sampling", "contiguous", CALIBRATION),
    Row("calibration.seed", 7, TEXT),
    Row("calibration.bos", True, TEXT),
    Row("calibration.bos", False, NOTHING),  # a Llama needs none
    Row("calibration.seed", 7, REPAIR, given={"calibration.sampling": "contiguous"}),
    #
    Row("method.merge_rule", "mean", MERGE),
    Row("method.similarity", "logits_kl", MERGE),
    Row("method.protect_first", 2, MERGE),
    Row("method.protect_last", 2, MERGE),
    Row("method.max_window", 2, MERGE),
    Row("method.compile", True, MERGE),
    Row("method.published_calibration", {"num_samples": 5, "seq_len": 16}, NOTHING),
    Row("threshold.kind", "fixed", MERGE, along=FIXED),
    Row("threshold.value", 0.7, MERGE, given=FIXED),
    Row("threshold.refine", 6, MERGE),
    Row("threshold.refine", 6, NOTHING, given=FIXED),
    Row("threshold.exhaustive", True, MERGE),
    Row("threshold.exhaustive", True, NOTHING, given=FIXED),
    Row("pruning_ratio.of", "parameters", MERGE),
    Row("pruning_ratio.ratio", 0.5, MERGE),
    Row("pruning_ratio.speedup", 1.5, MERGE, given=LATENCY),
    Row("pruning_ratio.batch_size", 2, MERGE | {"time_blocks"}, given=LATENCY),
    Row("pruning_ratio.context", 64, MERGE | {"time_blocks"}, given=LATENCY),
    Row("pruning_ratio.mode", "compile", MERGE | {"time_blocks"}, given=LATENCY),
    Row("pruning_ratio.num_layers", 4, MERGE, given={"pruning_ratio.ratio": None, "pruning_ratio.num_layers": 5}),
    #
    Row("repair.ridges", [0.1], REPAIR),
    Row("repair.reads", [0.1], REPAIR),
    Row("repair.weighting", "none", REPAIR),
    Row("repair.target", "own_output", REPAIR),
    Row("repair.shares", [0.25], REPAIR),
    Row("repair.sublayers", "mlp", REPAIR),
    Row("repair.choice", "projection", REPAIR),
    Row("repair.prior", "own_output", REPAIR),
    Row("repair.least_gain", 0.1, REPAIR),
    Row("repair.held_out", 0.25, REPAIR),
    Row("repair.calibration.source", "bundled", REPAIR, along={"repair.calibration.path": None}),
    Row("repair.calibration.path", "first.txt", REPAIR),
    Row("repair.calibration.path", "../copy/calibration.txt", NOTHING),
    Row("repair.calibration.num_samples", 5, REPAIR),
    Row("repair.calibration.seq_len", 16, REPAIR),
    Row("repair.calibration.sampling", "contiguous", REPAIR),
    Row("repair.calibration.seed", 7, REPAIR),
    Row("repair.calibration.bos", True, REPAIR),
    #
    Row("recovery.source", "bundled", RECOVERY, along={"recovery.path": None}),
    Row("recovery.path", "other.json", RECOVERY),
    Row("recovery.path", "../copy/alpaca.json", NOTHING),
    Row("recovery.repo", "somebody/other", RECOVERY, given=FROM_HUB),
    Row("recovery.revision", "v2", RECOVERY, given=FROM_HUB),
    Row("recovery.num_examples", 20, RECOVERY),
    Row("recovery.validation_size", 5, RECOVERY),
    Row("recovery.split_seed", 7, RECOVERY),
    Row("recovery.learning_rate", 0.02, RECOVERY),
    Row("recovery.schedule", "cosine", RECOVERY),
    Row("recovery.final_learning_rate", 0.1, RECOVERY, given={"recovery.schedule": "cosine"}),
    Row("recovery.weight_decay", 0.1, RECOVERY),
    Row("recovery.max_grad_norm", 2.0, RECOVERY),
    Row("recovery.num_epochs", 3.0, RECOVERY),
    Row("recovery.max_steps", 200, RECOVERY),
    Row("recovery.budget_tokens", 1000, RECOVERY),
    Row("recovery.max_minutes", 5.0, RECOVERY),
    Row("recovery.early_stopping", 2, RECOVERY),
    Row("recovery.batch_size", 8, RECOVERY),
    Row("recovery.micro_batch_size", 4, RECOVERY),
    Row("recovery.warmup_steps", 2, RECOVERY),
    Row("recovery.cutoff_len", 128, RECOVERY),
    Row("recovery.packing", True, RECOVERY),
    Row("recovery.completion_only", False, RECOVERY),
    Row("recovery.eval_steps", 3, RECOVERY),
    Row("recovery.save_steps", 3, RECOVERY),
    Row("recovery.logging_steps", 3, RECOVERY),
    Row("recovery.gradient_checkpointing", True, RECOVERY),
    Row("recovery.dtype", "float32", RECOVERY),
    Row("recovery.num_processes", 2, RECOVERY),
    Row("recovery.sharding", True, RECOVERY, given={"recovery.num_processes": 2}),
    Row("recovery.rank", 4, RECOVERY),
    Row("recovery.alpha", 8, RECOVERY),
    Row("recovery.dropout", 0.1, RECOVERY),
    Row("recovery.target_modules", ["q_proj"], RECOVERY),
    Row("recovery.use_dora", True, RECOVERY),
    Row("recovery.quantize", "nf4", RECOVERY),
    Row("recovery.use_rslora", True, RECOVERY),
    #
    Row("evaluation.of", ["dense", "pruned"], NOTHING),
    Row("evaluation.data", "other_tasks", scores(TASKS)),
    Row("evaluation.data", "../copy", NOTHING),
    Row("evaluation.tasks", ["boolq"], NOTHING),
    Row("evaluation.tasks", ["piqa", "boolq", "arc_easy"], scores(["arc_easy"])),
    Row("evaluation.limit", 1, scores(TASKS | LM_EVAL)),
    Row("evaluation.batch_size", 2, scores(TASKS | LM_EVAL)),
    Row("evaluation.perplexity.corpora", ["second.txt"], NOTHING),
    Row("evaluation.perplexity.corpora", ["first.txt", "second.txt", "third.txt"], scores(["perplexity/third.txt"])),
    Row("evaluation.perplexity.window", 32, scores(PERPLEXITY)),
    Row("evaluation.perplexity.stride", 16, scores(PERPLEXITY)),
    Row("evaluation.perplexity.bos", True, scores(PERPLEXITY)),
    Row("evaluation.perplexity.bos", False, NOTHING),
    Row("evaluation.perplexity.max_tokens", 100, scores(PERPLEXITY)),
    Row("evaluation.perplexity.batch_size", 1, scores(PERPLEXITY)),
    Row("evaluation.fidelity.corpora", [], NOTHING),
    Row("evaluation.fidelity.corpora", ["first.txt", "third.txt"], scores(["fidelity/third.txt"])),
    Row("evaluation.fidelity.window", 32, scores(FIDELITY)),
    Row("evaluation.fidelity.bos", True, scores(FIDELITY)),
    Row("evaluation.fidelity.max_tokens", 100, scores(FIDELITY)),
    Row("evaluation.fidelity.batch_size", 1, scores(FIDELITY)),
    Row("evaluation.zero_shot.tasks", ["piqa"], NOTHING),
    Row("evaluation.zero_shot.data", "other_tasks", scores(TASKS)),
    Row("evaluation.zero_shot.limit", 1, scores(TASKS)),
    Row("evaluation.zero_shot.batch_size", 2, scores(TASKS)),
    Row("evaluation.lm_eval.tasks", ["sums", "signs"], scores(["lm_eval/signs"])),
    Row("evaluation.lm_eval.num_fewshot", 1, scores(LM_EVAL)),
    Row("evaluation.lm_eval.include_path", "../copy/tasks", NOTHING),
    Row("evaluation.lm_eval.include_path", "../own_tasks_elsewhere", NOTHING),  # whose data lie there too
    Row("evaluation.lm_eval.apply_chat_template", True, scores(LM_EVAL)),
    Row("evaluation.lm_eval.gen_kwargs", {"max_gen_toks": 3}, scores(LM_EVAL)),
    Row("evaluation.lm_eval.limit", 1, scores(LM_EVAL)),
    Row("evaluation.lm_eval.batch_size", 2, scores(LM_EVAL)),
    Row("evaluation.efficiency.enabled", False, NOTHING),
    Row("evaluation.efficiency.batch_size", 2, scores(EFFICIENCY)),
    Row("evaluation.efficiency.output_len", 8, scores(EFFICIENCY)),
    Row("evaluation.efficiency.num_runs", 12, scores(EFFICIENCY)),
    Row("evaluation.efficiency.num_warmup", 2, scores(EFFICIENCY)),
    Row("evaluation.efficiency.prompt", "Once", scores(EFFICIENCY)),
    Row("evaluation.efficiency.prompt", "Once", NOTHING, given={"evaluation.efficiency.prompt_len": 8}),
    Row("evaluation.efficiency.prompt_len", 8, scores(EFFICIENCY)),
    Row("evaluation.efficiency.mode", "compile", scores(EFFICIENCY)),
    Row("evaluation.efficiency.grid", ["2x8"], scores(["efficiency/2x8"])),
    Row("evaluation.efficiency.beside_dense", False, scores(EFFICIENCY)),
]  # fmt: skip

# Files of the data folder whose content changes. The two texts are read by two measures, the second by one.
FILES = {
    "calibration.txt": TEXT,
    "alpaca.json": RECOVERY,
    "first.txt": scores(["perplexity/first.txt", "fidelity/first.txt"]),
    "second.txt": scores(["perplexity/second.txt"]),
    "piqa.jsonl": scores(["piqa"]),
    "boolq.jsonl": scores(["boolq"]),
    "tasks/data/colours_test.jsonl": scores(["lm_eval/both"]),
    "tasks/data/more_colours_train.jsonl": scores(["lm_eval/both"]),
    "tasks/data/sums_test.jsonl": scores(["lm_eval/sums"]),
    "tasks/colours.yaml": scores(["lm_eval/both"]),
    "tasks/both.yaml": scores(["lm_eval/both"]),
    "tasks/sums.yaml": scores(["lm_eval/sums"]),
    "tasks/signs.yaml": NOTHING,
    "tasks/prompts.py": scores(LM_EVAL),
    "other.json": NOTHING,
}


@dataclass(frozen=True)
class Finished(Artifact):
    """A result that is taken as made."""

    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return True

    def record(self) -> dict[str, Any]:
        return {"result": self.result}


def keys(job: Job, layer: int = 3) -> dict[str, str]:
    """The key of each stage's result, the merge being finished with the plan that drops a layer."""
    made = Plan({"name": "x", "fingerprint": "x", "num_layers": 6}, "slm", {}, {}, [Drop((layer,))])
    results: dict[str, Artifact] = {}
    for step in steps(job):
        identity = step.stage.identity(job, results)
        assert identity is not None
        made_here = Finished(job.store, step.stage.stage, identity)
        checkpoint = {"merge": checkpoint_id(job, made), "repair": made_here.key}.get(step.stage.name)
        results[step.stage.name] = replace(made_here, result={"checkpoint": checkpoint})
    return {name: artifact.key for name, artifact in results.items()}


def to_make(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """The stages whose results are not those of before."""
    return {name for name, key in after.items() if before.get(name) != key}


@pytest.fixture(scope="module")
def composed() -> Callable[..., Any]:
    """A function of overrides beside those of `JOB`: the whole configuration, composed once."""
    known: dict[tuple[str, ...], Any] = {}

    def compose(*overrides: str) -> Any:
        if overrides not in known:
            command_line.set_environment()
            arguments = SimpleNamespace(config_dir=None, config_name=None)
            with command_line.config_loader(arguments):
                known[overrides] = command_line.composed_of(arguments, [*JOB, *overrides])
            with open_dict(known[overrides]):
                del known[overrides].hydra  # the greatest part of it
        return known[overrides]

    return compose


@pytest.fixture
def job_of(composed: Callable[..., Any], here: None) -> Callable[..., Job]:
    """A function of options and their values: the job of `JOB` with these, checked."""

    def prepared(*options: Mapping[str, Any], overrides: Iterable[str] = ()) -> Job:
        configuration = copy.deepcopy(composed(*overrides))
        for key, value in (pair for some in options for pair in some.items()):
            OmegaConf.update(configuration, key, value, merge=False, force_add=True)
        return prepare(config.to_config(configuration), "slm")

    return prepared


def write_data(folder: Path) -> None:
    """All data of `JOB`."""
    folder.mkdir()
    for name in ("calibration", "first", "second", "third"):
        (folder / f"{name}.txt").write_text(f"The {name} mill stands by the river. " * 40)
    examples = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(30)]
    for name, some in (("alpaca", examples), ("other", examples[1:])):
        (folder / f"{name}.json").write_text(json.dumps(some))
    (folder / "other_tasks").mkdir()
    for task in ("piqa", "boolq", "arc_easy"):
        row = json.dumps(TASK_ROWS[task]) + "\n"
        (folder / f"{task}.jsonl").write_text(row * 2)
        (folder / "other_tasks" / f"{task}.jsonl").write_text(row * 3)
    own_tasks.write(folder / "tasks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sound_models: dict[str, Path]) -> Path:
    """Holds all that the table names; not to be changed."""
    root = tmp_path_factory.mktemp("keys")
    write_data(root / "data")
    shutil.copytree(root / "data", root / "copy")
    own_tasks.write(root / "own_tasks_elsewhere")
    for name, sound in (("model", "llama"), ("copy_of_model", "llama"), ("other_model", "llama_other_seed")):
        model_folders.copy(sound_models[sound], root / name)
    (root / "another_package.py").write_text("")
    return root


@pytest.fixture
def here(folder: Path, sound_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder to work in, a hub that has every revision, and a machine that shows none of its two GPUs."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    snapshots = {None: sound_models["llama"], "v2": sound_models["llama_other_seed"]}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, revision, **_: snapshots[revision] / file)
    monkeypatch.setattr("slm_pipeline.data.hub.commit", lambda repo, *_, revision: f"commit of {revision}")
    monkeypatch.setattr("slm_pipeline.jobs.tracking._has_api_key", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpus, "models", lambda: ["H100", "H100"])
    yield
    plugins.use([])


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_an_option_changes_the_keys_of_what_depends_on_it_and_of_no_other(row, job_of, monkeypatch):
    if "cuda" in str(row.value):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    before = job_of(row.given)
    after = job_of(row.given, {row.option: row.value}, row.along)
    assert before.config != after.config
    assert to_make(keys(before), keys(after)) == row.changes


@pytest.mark.parametrize(
    ("option", "value", "changes"),
    [
        ("method.first.share", 0.3, MERGE),
        ("method.second.share", 0.5, NOTHING),  # what the null stands for
        ("method.first.merge_rule", "mean", MERGE),
        ("method.second.massive", 5.0, MERGE),
        ("method.first.published_calibration.num_samples", 5, MERGE),
        ("method.first.published_calibration.seq_len", 5, NOTHING),
        ("threshold.refine", 6, MERGE),
        ("calibration.seq_len", 16, CALIBRATION),
    ],
)
def test_of_several_methods_every_options_of_a_step(option, value, changes, job_of):
    overrides = ("method=combined", "pruning_ratio=r50")
    before, after = job_of(overrides=overrides), job_of({option: value}, overrides=overrides)
    assert to_make(keys(before), keys(after)) == changes


def test_another_method_as_a_step_changes_the_key_of_the_merge(job_of):
    jobs = [
        job_of(overrides=("method=combined", "pruning_ratio=r50", f"method@method.first={name}"))
        for name in ("slm", "laco")
    ]
    assert to_make(*map(keys, jobs)) == MERGE
    assert keys(job_of(overrides=("pruning_ratio=r50",)))["merge"] != keys(jobs[0])["merge"]


def options(values: Any, prefix: str = "") -> Iterator[str]:
    """The whole names of a dataclass's options."""
    for option in fields(values):
        value = getattr(values, option.name)
        yield from options(value, f"{prefix}{option.name}.") if is_dataclass(value) else [f"{prefix}{option.name}"]


def test_the_table_has_every_option_of_the_job(job_of):
    job = job_of()
    groups = ("method", "repair", "recovery", "evaluation")
    known = {name for name in options(job.config) if name not in groups}
    known |= {*options(job.evaluation.options, "evaluation.")}
    known |= {*options(job.repair, "repair.")}
    for key, plug_in in [("method", job.method), ("recovery", job.recovery)] + [
        (f"evaluation.{name}", measure) for name, measure in job.evaluation.measures.items()
    ]:
        known |= {f"{key}.{option.name}" for option in fields(plug_in)}
    assert known == {row.option for row in TABLE}
    assert {measure.name for measure in job.evaluation.active} == {
        file.stem for file in (config.CONF_DIR / "measure").glob("*.yaml")
    }
    assert {step.stage.name for step in steps(job)} == ALL


def another(value: Any) -> Any:
    """Another value of an option, allowed or not."""
    if isinstance(value, list):
        return [*value, "x"]
    if value is None or isinstance(value, bool):
        return not value
    return value + ("x" if isinstance(value, str) else 1)


def plug_ins(group: str) -> list[str]:
    names = {file.stem for file in (config.CONF_DIR / group).glob("*.yaml")}
    return sorted(names - {"none", "from_plan", "combined"})  # these have no options of their own


@pytest.mark.parametrize("name", plug_ins("method"))
def test_every_option_of_a_method_is_in_the_key_of_its_merge(name):
    values: Any = OmegaConf.to_container(OmegaConf.load(config.CONF_DIR / "method" / f"{name}.yaml"))
    values = values.get("method", values)  # some are written from the top
    values.pop("defaults", None)
    method = build(values, group="method")
    unseen = set()
    for option in fields(method):
        changed = copy.copy(method)
        value = getattr(method, option.name)
        setattr(changed, option.name, {} if is_dataclass(value) else another(value))
        if changed.options() == method.options():
            unseen.add(option.name)
    assert unseen == {"published_calibration"}  # a default of calibration's own options


@pytest.mark.parametrize("name", plug_ins("repair"))
def test_every_option_of_a_repair_is_in_its_key(name, composed, here):
    repair = build(OmegaConf.to_container(composed(f"repair={name}").repair, resolve=True), group="repair")
    for option in fields(repair):
        if option.name != "calibration":  # see the table
            changed = copy.copy(repair)
            setattr(changed, option.name, another(getattr(repair, option.name)))
            assert changed.identity(Path("data")) != repair.identity(Path("data")), option.name


def test_another_repair_of_the_same_options_is_another_and_none_lets_the_recovery_begin_at_the_merge(job_of):
    refit, rescale, none = (keys(job_of(overrides=[f"repair={name}"])) for name in ("refit", "rescale", "none"))
    assert to_make(refit, rescale) == REPAIR
    assert to_make(refit, none) == RECOVERY
    assert none.keys() == ALL - {"repair"} - scores(PARTS, ["repaired"])


@pytest.mark.parametrize("name", plug_ins("recovery"))
def test_every_option_of_a_recovery_is_in_its_key(name, composed, here):
    configuration: Any = OmegaConf.to_container(composed(f"recovery={name}").recovery)
    recovery = build({**configuration, "source": "bundled", "path": None}, group="recovery")
    of_data = {"source", "path", "repo", "revision"}  # see the table
    for option in fields(recovery):
        if option.name not in of_data:
            changed = copy.copy(recovery)
            setattr(changed, option.name, another(getattr(recovery, option.name)))
            assert changed.identity(None) != recovery.identity(None), option.name


@pytest.mark.parametrize("file", FILES)
def test_what_is_in_a_file_changes_the_keys_of_what_reads_it(file, job_of, tmp_path):
    write_data(tmp_path / "data")
    path = tmp_path / "data" / file
    where = {"data_dir": str(tmp_path / "data")}
    before = keys(job_of(where))
    os.utime(path, (0, 0))
    assert keys(job_of(where)) == before
    text = path.read_text()
    path.write_text(changed(text, path.suffix))
    assert to_make(before, keys(job_of(where))) == FILES[file]


def changed(text: str, suffix: str) -> str:
    """Another content of the same kind."""
    if suffix == ".json":
        return json.dumps(json.loads(text)[::-1])
    if suffix == ".jsonl":
        return text + text.splitlines()[0] + "\n"
    return text + {".yaml": "description: Answer.\n", ".py": "# more\n", ".txt": "One word more."}[suffix]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_model_in_the_same_folder_changes_every_key(file, job_of, tmp_path, sound_models):
    model = model_folders.copy(sound_models["llama"], tmp_path / "model")
    there = {**LOCAL, "model.path": str(model)}
    before = keys(job_of(there))
    (model / "README.md").write_text("What people read.")
    assert keys(job_of(there)) == before
    if file == "model.safetensors":
        model_folders.edit_weights(model, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    elif file == "config.json":
        model_folders.edit_json(model, rms_norm_eps=1e-3)
    else:
        (model / file).write_text((model / file).read_text() + " ")
    assert to_make(before, keys(job_of(there))) == ALL


def test_another_plan_changes_the_keys_of_what_follows_it_and_not_the_dense_models(job_of):
    job = job_of()
    assert to_make(keys(job), keys(job, layer=4)) == REPAIR | scores(PARTS, ["pruned"])


def test_of_one_checkpoint_what_is_compared_with_the_dense_model_depends_on_that_too(job_of, monkeypatch):
    monkeypatch.setitem(globals(), "checkpoint_id", lambda *_: "the same")
    other = to_make(keys(job_of()), keys(job_of({"model.seed": 7})))
    assert other & scores(PARTS, ["pruned"]) == scores(FIDELITY | EFFICIENCY, ["pruned"])


@pytest.mark.parametrize(
    ("package", "changes"),
    [("lm_eval", scores(TASKS | LM_EVAL)), ("torch", NOTHING), ("transformers", NOTHING), ("tokenizers", NOTHING)],
)
def test_another_version_changes_the_keys_of_tasks_if_it_is_lm_evals_and_else_none(
    package, changes, job_of, monkeypatch
):
    before = keys(job_of())
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.9" if name == package else version(name))
    monkeypatch.setattr(provenance, "versions", provenance.versions.__wrapped__)  # which are looked up once
    assert to_make(before, keys(job_of())) == changes


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("calibrate", CALIBRATION),
        ("merge", MERGE),
        ("repair", REPAIR),
        ("recover", RECOVERY),
        ("evaluate", scores(PARTS)),
    ],
)
def test_another_version_of_a_stage_changes_its_keys(module, changes, job_of, monkeypatch):
    before = keys(job_of())
    monkeypatch.setattr(f"slm_pipeline.jobs.stages.{module}.VERSION", 99)
    assert to_make(before, keys(job_of())) == changes


@pytest.mark.parametrize(
    ("measure", "parts"),
    [
        ("perplexity", PERPLEXITY),
        ("fidelity", FIDELITY),
        ("zero_shot", TASKS),
        ("lm_eval", LM_EVAL),
        ("efficiency", EFFICIENCY),
    ],
)
def test_another_version_of_a_measure_changes_its_keys(measure, parts, job_of, monkeypatch):
    job = job_of()
    before = keys(job)
    monkeypatch.setattr(type(job.evaluation.measures[measure]), "version", 99)
    assert to_make(before, keys(job)) == scores(parts)


def test_another_machine_changes_the_keys_of_speed_alone(job_of, monkeypatch):
    before = keys(job_of())
    monkeypatch.setattr("slm_pipeline.evaluation.efficiency._cpu_model", lambda: "another")
    assert to_make(before, keys(job_of())) == scores(EFFICIENCY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    on_gpu = {**LOCAL, "model.device": "cuda"}
    before = keys(job_of(on_gpu))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert keys(job_of(on_gpu)) == before
    monkeypatch.setattr(gpus, "models", lambda: ["A100", "A100"])
    assert to_make(before, keys(job_of(on_gpu))) == scores(EFFICIENCY)


def test_a_method_that_reads_no_text_and_has_no_floor_depends_on_neither(job_of):
    def with_reverse(*given: Mapping[str, Any]) -> dict[str, str]:
        return keys(job_of(*given, overrides=["method=reverse"]))

    before = with_reverse()
    assert to_make(before, with_reverse({"calibration.seed": 7})) == {"calibrate"} | REPAIR
    assert to_make(before, with_reverse({"seed": 7})) == {"calibrate"} | REPAIR
    assert to_make(before, with_reverse({"threshold.refine": 7})) == NOTHING
    assert to_make(before, with_reverse({"pruning_ratio.ratio": 0.5})) == MERGE
    assert to_make(before, with_reverse({"model.seed": 7})) == ALL
    assert to_make(before, keys(job_of())) == MERGE


def test_another_recovery_of_the_same_options_is_another(job_of):
    full, lora = (keys(job_of(overrides=[f"recovery={name}"])) for name in ("full", "lora"))
    assert to_make(full, lora) == RECOVERY
