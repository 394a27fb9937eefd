"""Every published loop decides as our search does, and the benchmark says so."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest

from slm_pipeline.commands import bench, bench_efficiency, bench_sweep
from slm_pipeline.errors import UserError

TINY = [
    "model=random",
    "model.num_layers=12",
    "calibration.source=text_file",
    f"calibration.path={__file__}",
    "calibration.num_samples=3",
    "calibration.seq_len=16",
]


def rows_of(*words):
    """The table's cells, row by row."""
    out = io.StringIO()
    with redirect_stdout(out):
        bench.methods([*TINY, *words])
    lines = [line for line in out.getvalue().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_all_loops_decide_alike():
    rows = rows_of("pruning_ratio=layers", "pruning_ratio.num_layers=8", "model.num_layers=10")
    assert [row[0] for row in rows] == list(bench.METHODS)
    for name, _, _, _, _, blocks_theirs, blocks_ours, _, _, same in rows:
        assert name in ("slm", "laco") or same == "yes"  # those look for a threshold in their own way
        if name != "replaceme":  # it walks twice more where the published code keeps all activations
            assert float(blocks_ours) <= float(blocks_theirs)


@pytest.mark.parametrize("name", ["slm", "laco"])
def test_at_a_given_threshold_slm_and_laco_decide_alike_too(name):
    rows = rows_of(name, "threshold=fixed", "threshold.value=0.9", "pruning_ratio=none")
    assert [(row[0], row[-1]) for row in rows] == [(name, "yes")]


@pytest.mark.parametrize(
    "words",
    [
        ["come", "method.run_length=3", "method.repeat=allow", "method.min_largest_share=0.8", "method.tokens=last",
         "method.power=2"],
        ["come", "method.official_gqa=true", "method.repeat=when_needed", "pruning_ratio.num_layers=2"],
        ["come_posterior", "method.repeat=allow", "model.architecture=qwen3", "method.granularity=4"],
        ["finercut", "method.objective=jensen_shannon", "pruning_ratio.num_layers=5"],
        ["finercut", "method.objective=euclidean", "pruning_ratio.num_layers=5"],
        ["mka", "method.pairs=last"],
        ["mka", "method.official=true"],
    ],
)  # fmt: skip
def test_options_of_ours_are_options_of_theirs(words):
    shape = ["pruning_ratio=layers", "pruning_ratio.num_layers=4", "model.num_layers=6", "model.num_kv_heads=2"]
    assert rows_of(*shape, *words)[0][-1] == "yes"


def test_parameters_may_be_counted():
    assert rows_of("sleb", "pruning_ratio=r20", "pruning_ratio.of=parameters")[0][-1] == "yes"


def test_unknown_names():
    with pytest.raises(UserError, match="'reverse' has no published loop to compare with; there are: slm, laco"):
        bench.methods(["reverse"])


def test_a_study_looks_at_each_window_once():
    """Alone, every job evaluates all windows that it looks at; in the study, only those nobody has looked at."""
    words = [word for word in TINY if not word.startswith("calibration.source")]
    out = io.StringIO()
    with redirect_stdout(out):
        bench_sweep.sweep([*words, "calibration=text_file", "evaluation=none"])
    lines = [line for line in out.getvalue().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["0.95", "0.9", "0.85", "0.8", "0.75", "0.7", "0.65", "0.6", "all"]
    windows = [(int(row[2]), int(row[3])) for row in rows]
    assert windows[0][0] == windows[0][1] > 0  # the first finds nothing
    assert all(shared <= alone for alone, shared in windows)
    assert windows[-1] == tuple(map(sum, zip(*windows[:-1], strict=True)))
    assert windows[-1][1] < windows[-1][0]
    assert int(rows[-1][5]) < int(rows[-1][4])


def test_speed_stands_beside_what_it_could_be():
    """Widths are the multiple of 64 next to as many parameters as two of ten layers have."""
    out = io.StringIO()
    shape = ["model.num_layers=10", "model.hidden_size=32", "model.intermediate_size=1232", "model.vocab_size=1120"]
    with redirect_stdout(out):
        bench_efficiency.benchmark(
            [*shape, "model.num_heads=2", "model.num_kv_heads=1", "evaluation.efficiency.mode=eager",
             "evaluation.efficiency.grid=[2x4+3]", "evaluation.efficiency.num_runs=2",
             "evaluation.efficiency.num_warmup=0"]
        )  # fmt: skip
    lines = [line for line in out.getvalue().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    per_layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 1232 + 2 * 32
    read = 10 * per_layer + 32 + 32 * 1120
    neurons = 64 * round((1232 - 2 * per_layer * 10 // 10 // (10 * 96)) / 64)
    bytes_saved = 10 * 96 * (1232 - neurons)
    assert [(row[0], row[1], row[5]) for row in rows] == [
        ("r20, 2 layers", "2x4+3", "1.250"), ("r35, 4 layers", "2x4+3", "1.667"),
        (f"width, {neurons} neurons", "2x4+3", f"{read / (read - bytes_saved):.3f}"),
    ]  # fmt: skip
    for row in rows:
        speedup = float(row[4].split()[0])
        assert float(row[6]) == pytest.approx(speedup / float(row[5]), abs=2e-3)
    with pytest.raises(UserError, match="at least 2 new ones"):
        bench_efficiency.benchmark([*shape, "evaluation.efficiency.mode=eager", "evaluation.efficiency.grid=[1x8+1]"])
