"""A speedup as the target: every method finds a plan that is fast enough by the table, and not much faster."""

from __future__ import annotations

import json

import block_times as machine
import pytest
from conftest import random_source, run_slm
from problems import problem_of

from slm_pipeline.engine.statistics import collect
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import block_times
from slm_pipeline.evaluation.block_times import BlockTimes, Kind
from slm_pipeline.methods.finercut import FinerCut
from slm_pipeline.methods.joint import Joint
from slm_pipeline.methods.latency import plan_for_speedup
from slm_pipeline.methods.reverse import ReverseOrder
from slm_pipeline.methods.sleb import Sleb
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.methods.target import Speedup
from slm_pipeline.methods.wanda_sp import WandaSP
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.apply import apply
from slm_pipeline.surgery.ops import LayerSize
from slm_pipeline.surgery.plan import Plan

SIX_LAYERS = [
    "model=random", "model.architecture=llama", "model.num_layers=6", "model.hidden_size=32",
    "model.intermediate_size=48", "model.num_heads=4", "model.num_kv_heads=2", "model.vocab_size=300",
    "recovery=none", "evaluation=none",
]  # fmt: skip
SETTINGS = {"mode": "eager", "batch_size": 1, "context": 8}
PER_BLOCK = machine.PER_LAYER + machine.SLIDES + 2 * machine.PER_GROUP + 48 * machine.PER_NEURON  # 8.75
DENSE = machine.REST + 6 * PER_BLOCK  # 57.5
SAVED = {"attention": [(0, 2 * machine.PER_GROUP)], "mlp": [(0, 48 * machine.PER_NEURON)]}
TIMES = BlockTimes(DENSE, [Kind([*range(6)], {"attention": 2, "mlp": 48}, PER_BLOCK, SAVED)], "a GPU", SETTINGS)


def plan_of(method, speedup, input_ids, times=TIMES):
    source = random_source()
    model, _ = load_dense(source)
    problem = problem_of(model, source, input_ids, num_remove=1, statistics=collect(ModelView(model), input_ids))
    problem.target = Speedup(speedup)
    plan = plan_for_speedup(method, problem, times)
    assert DENSE / machine.of_model(apply(plan, model)) == pytest.approx(plan.scores["latency"]["predicted"])
    return plan


@pytest.mark.parametrize("method", [ReverseOrder(), Sleb(protect_first=0, protect_last=0), SlidingLayerMerging()])
@pytest.mark.parametrize(("speedup", "removed"), [(1.01, 1), (57.5 / 48.75, 1), (1.2, 2), (1.43, 2), (1.44, 3)])
def test_as_few_whole_layers_go_as_are_fast_enough(method, speedup, removed, input_ids):
    """Of 57.5 s a layer has 8.75: without one 48.75 s are left, without two 40, without three 31.25."""
    plan = plan_of(method, speedup, input_ids)
    assert plan.num_layers == 6 - removed
    found = plan.scores["latency"]
    assert found["predicted"] == pytest.approx(DENSE / (DENSE - removed * PER_BLOCK))
    assert (found["asked"], found["device"], found["batch_size"], found["plans"]) == (speedup, "a GPU", 1, 1)


def test_where_layers_take_different_times_one_more_goes_until_it_is_enough(input_ids):
    """The mean layer takes 5 s of 34; the first to go take 1 s each."""
    widths = {"attention": 2, "mlp": 48}
    kinds = [Kind(layers, widths, took, SAVED) for layers, took in (([0, 1, 2], 9.0), ([3, 4, 5], 1.0))]
    source = random_source()
    problem = problem_of(load_dense(source)[0], source, input_ids, num_remove=1)
    problem.target = Speedup(34 / 30)
    plan = plan_for_speedup(ReverseOrder(), problem, BlockTimes(34.0, kinds, "a GPU", SETTINGS))
    assert plan.dropped == [2, 3, 4, 5]
    assert plan.scores["latency"]["predicted"] == pytest.approx(34 / 22)
    assert plan.scores["latency"]["plans"] == 4


@pytest.mark.parametrize(
    ("method", "unit"),
    [
        (WandaSP(allocation="global", export="custom", massive=None), machine.PER_GROUP),
        (WandaSP(allocation="uniform", export="custom", massive=None), 6 * machine.PER_NEURON),
        (FinerCut(export="custom"), 48 * machine.PER_NEURON),
    ],
)
@pytest.mark.parametrize("speedup", [1.1, 1.5])
def test_methods_that_count_parameters_are_asked_until_time_is_right(method, unit, speedup, input_ids):
    found = plan_of(method, speedup, input_ids).scores["latency"]
    seconds, budget = found["seconds"]["pruned"], DENSE / speedup
    assert budget - max(unit, 0.01 * budget) <= seconds <= budget
    assert found["plans"] <= 6


@pytest.mark.parametrize(("export", "unit"), [("stock", 6 * machine.PER_NEURON), ("custom", machine.PER_NEURON)])
@pytest.mark.parametrize("speedup", [1.1, 1.5])
def test_joint_counts_time_in_the_place_of_parameters(export, unit, speedup, input_ids):
    method = Joint(export=export, swaps=2, transfers=2, massive=None)
    found = plan_of(method, speedup, input_ids.repeat(3, 1)).scores["latency"]
    seconds, budget = found["seconds"]["pruned"], DENSE / speedup
    assert budget - unit <= seconds <= budget
    assert found["plans"] == 1


def test_where_widths_take_next_to_no_time_a_plan_is_found_all_the_same(input_ids):
    """Half of a network's neurons save 1 % of what they do to the narrowest, as on a GPU that waits for launches."""
    saved = {"attention": [(1, 0.01), (0, 2.0)], "mlp": [(24, 0.06), (0, 6.0)]}
    times = BlockTimes(DENSE, [Kind([*range(6)], {"attention": 2, "mlp": 48}, PER_BLOCK, saved)], "a GPU", SETTINGS)
    source = random_source()
    model, _ = load_dense(source)
    problem = problem_of(model, source, input_ids.repeat(3, 1), statistics=collect(ModelView(model), input_ids))
    problem.target = Speedup(1.2)
    plan = plan_for_speedup(Joint(swaps=0, massive=None, depths=2), problem, times)
    assert plan.num_layers == 4  # 1.18 times as fast with one less, and neurons save 0.3 s
    assert plan.scores["latency"]["predicted"] == pytest.approx(DENSE / 40)
    problem.target = Speedup(1.15)
    method = WandaSP(allocation="uniform", export="custom", sublayers="mlp", massive=None)
    found = plan_for_speedup(method, problem, times).scores["latency"]
    assert (found["predicted"] >= 1.15, found["plans"] <= 6) == (True, True)


def test_what_parts_cost_is_read_from_the_table():
    saved = {"attention": [(1, 0.75), (0, 2.0)], "mlp": [(24, 3.0), (12, 4.8), (0, 6.0)]}
    times = BlockTimes(50.0, [Kind([0, 1], {"attention": 2, "mlp": 48}, 8.75, saved)], "a GPU", SETTINGS)
    sizes = [LayerSize(attention=10, mlp=20, heads=2, neurons=48, per_head=5, per_neuron=1)] * 2
    price = times.prices(sizes)[1]
    assert (price.attention, price.mlp, price.other) == (2_000_000_000_000, 6_000_000_000_000, 750_000_000_000)
    assert (price.per_head, price.per_neuron) == (750_000_000_000, round(4.8e12 / 36))
    assert (price.heads, price.neurons) == (2, 48)


def test_a_method_that_cannot_remove_what_is_guessed_is_asked_for_the_most_that_it_can(input_ids):
    """Without all but one neuron of each layer 57.5 - 6 * 47 / 8 = 22.25 s are left: 2.584 times as fast. Networks are
    faster to lose than the mean parameter, so that more of them is guessed than there is."""
    method = WandaSP(allocation="uniform", export="custom", sublayers="mlp", massive=None)
    found = plan_of(method, 2.57, input_ids).scores["latency"]
    assert (found["predicted"], found["plans"]) == (pytest.approx(57.5 / 22.25), 1)
    with pytest.raises(UserError, match="2.58 times as fast, and then .* may be removed have 27072"):
        plan_of(method, 2.6, input_ids)


@pytest.mark.parametrize(
    ("method", "speedup", "why"),
    [
        (Sleb(), 3.0, r"of 6 layers at least 3 must be left \(2 protected and one more\), which is 1.84 times as fast"),
        (FinerCut(), 1.1, "what is gone stays as zeros, which take as long; use method.export=custom"),
        (ReverseOrder(), 12.0, "embeddings and head alone take 8.7% of the time"),
        (WandaSP(allocation="uniform", export="custom"), 11.0, "times as fast, and then .* parameters cannot go"),
    ],
)
def test_what_is_out_of_reach_is_said_with_what_is_not(method, speedup, why, input_ids):
    with pytest.raises(UserError, match=f"speedup={speedup:g} is out of reach of method={method.name} .* {why}"):
        plan_of(method, speedup, input_ids)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruning_ratio=latency"], "needs pruning_ratio.speedup, as 1.3"),
        (["pruning_ratio=r20", "pruning_ratio.of=latency"], "takes pruning_ratio.speedup alone, no ratio"),
        (["pruning_ratio=none", "pruning_ratio.of=latency"], "needs pruning_ratio.speedup, as 1.3"),
        (["pruning_ratio.speedup=1.3"], "pruning_ratio.speedup=1.3 does nothing with pruning_ratio.of=layers"),
        (["pruning_ratio.mode=graph"], "pruning_ratio.mode=graph does nothing with pruning_ratio.of=layers"),
        (["pruning_ratio=latency", "pruning_ratio.speedup=1"], "pruning_ratio.speedup=1.0 must lie in (1, 1000]"),
        (["pruning_ratio=latency", "pruning_ratio.speedup=2", "method=none"], "method=none takes no pruning ratio"),
        (["pruning_ratio=latency", "pruning_ratio.speedup=2", "pruning_ratio.mode=fast"], "mode='fast' is not one of"),
        (["pruning_ratio=latency", "pruning_ratio.speedup=2", "pruning_ratio.mode=graph", "model.device=cpu"],
         "pruning_ratio.mode=graph replays a CUDA graph, and model.device=cpu is the CPU here"),
        (["pruning_ratio=latency", "pruning_ratio.speedup=2", "model.num_layers=1", "method=wanda_sp"],
         "pruning_ratio.of=latency times a model without some of its layers; this one has only one"),
        (["pruning_ratio=latency", "pruning_ratio.speedup=2", "threshold=fixed", "threshold.value=0.8",
          "method=slm"],
         "a fixed threshold alone decides how much is removed"),
        (["model.architecture=opt", "pruning_ratio=latency", "pruning_ratio.speedup=2", "pruning_ratio.context=2040"],
         "pruning_ratio.context=2040 and 17 new tokens: the model has 2048 positions"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_runs(overrides, message, tmp_path):
    outcome = run_slm(*SIX_LAYERS, "dry_run=true", "method=reverse", f"output_dir={tmp_path}", *overrides)
    assert outcome.status == 2
    assert message in outcome.err


def test_a_job_times_blocks_once_and_says_what_was_asked_and_what_is_predicted(tmp_path, monkeypatch):
    timed = []

    def pretended(*args, **kwargs):
        timed.append(1)
        return machine.pretended(*args, **kwargs)

    monkeypatch.setattr(block_times, "alternate", pretended)
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the mill and the tree.\n" * 90)
    job = [
        *SIX_LAYERS, "pictures=false", f"output_dir={tmp_path}/out", "pruning_ratio=latency",
        "calibration=text_file", f"calibration.path={text}", "calibration.num_samples=2", "calibration.seq_len=16",
        "pruning_ratio.speedup=1.3", "tracker=jsonl", "pruning_ratio.context=8", "name=one",
    ]  # fmt: skip
    outcome = run_slm(*job, "method=reverse")
    assert outcome.status == 0, outcome.err
    (run,) = (tmp_path / "out" / "runs" / "one").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_layers"]["pruned"] == 4
    assert summary["numbers"]["predicted_speedup"]["value"] == pytest.approx(DENSE / 40)
    assert summary["pruning_ratio"]["asked"] == {"speedup": 1.3}
    assert "asked a speedup of 1.3, predicted 1.44" in (run / "summary.md").read_text()
    assert Plan.read(run / "plan.json").scores["latency"]["plans"] == 1
    before = len(timed)
    both = [*job, "method=combined", "name=both"]
    assert "time_blocks          reuse" in run_slm(*both, "dry_run=true").out
    outcome = run_slm(*both)
    assert outcome.status == 0, outcome.err
    assert len(timed) == before
    (run,) = (tmp_path / "out" / "runs" / "both").iterdir()
    latency, model = json.loads((run / "summary.json").read_text())["latency"], Plan.read(run / "plan.json")
    assert 1.3 <= latency["predicted"] <= 1.34
    assert {op.name for op in model.ops} >= {"resize"}
    assert model.num_layers < 6
