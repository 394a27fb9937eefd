"""Every published loop decides as our search does, and the benchmark says so; what benchmarks leave."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict

import pytest
import torch

from slm_pipeline.commands import (
    bench,
    bench_efficiency,
    bench_methods,
    bench_performance,
    bench_recovery,
    bench_results,
    bench_shards,
    bench_stages,
    bench_sweep,
)
from slm_pipeline.commands.bench_results import Result
from slm_pipeline.commands.bench_stages import Cost
from slm_pipeline.config import ModelConfig
from slm_pipeline.engine import compiled
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.alternated import Spread
from slm_pipeline.evaluation.efficiency import Efficiency
from slm_pipeline.jobs import needs
from slm_pipeline.models.loading import load_dense
from slm_pipeline.models.source import describe
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.report.analyses import ANALYSES, read_analyses

TINY = [
    "model=random",
    "model.num_layers=12",
    "calibration.source=text_file",
    f"calibration.path={__file__}",
    "calibration.num_samples=3",
    "calibration.seq_len=16",
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows_of(*words):
    """The table's cells, row by row."""
    out = io.StringIO()
    with redirect_stdout(out):
        bench_methods.methods([*TINY, *words])
    lines = [line for line in out.getvalue().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_all_loops_decide_alike():
    rows = rows_of("pruning_ratio=layers", "pruning_ratio.num_layers=7", "model.num_layers=9")
    assert [row[0] for row in rows] == list(bench_methods.METHODS)
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
        bench_methods.methods(["reverse"])


def test_a_study_looks_at_each_window_once(tmp_path, monkeypatch):
    """Alone, every job evaluates all windows that it looks at; in the study, only those nobody has looked at."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "thresholds.yaml").write_text(
        "hydra: {sweeper: {params: {threshold.value: '0.95,0.8,0.7,0.6'}}}"
    )
    monkeypatch.setattr(bench_sweep.config, "SWEEPS_ROOT", tmp_path)
    words = [word for word in TINY if not word.startswith("calibration.source")]
    out = io.StringIO()
    with redirect_stdout(out):
        bench_sweep.sweep([*words, "model.num_layers=8", "calibration=text_file", "evaluation=none"])
    lines = [line for line in out.getvalue().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == ["0.95", "0.8", "0.7", "0.6", "all"]
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
        # on a busy machine so small a model's token may take next to nothing: the printed digits are relative then
        assert float(row[6]) == pytest.approx(speedup / float(row[5]), rel=2e-3, abs=2e-3)
    with pytest.raises(UserError, match="at least 2 new ones"):
        bench_efficiency.benchmark([*shape, "evaluation.efficiency.mode=eager", "evaluation.efficiency.grid=[1x8+1]"])


@pytest.mark.parametrize("asked", ["eager", "graph"])
def test_with_graphs_narrower_networks_are_compiled_too_where_a_compiler_is(asked, monkeypatch):
    def timed(model, tokenizer, setting, *, mode, **_):
        seen.append(mode)
        runs = {name: {"token_seconds": [2.0 if name == "dense" else 1.0] * 3} for name in ("dense", "own")}
        spread = {"token_speedup": asdict(Spread.of([2.0] * 3))}
        return {"token_speedup": 2.0, "spread": spread, "runs": runs, "device": "a GPU"}

    def check_compiler(option, mode, device):
        if mode == "compile" and not compilers:
            raise UserError("there is no compiler")

    seen: list[str] = []
    compilers: list[str] = []
    monkeypatch.setattr(bench_efficiency, "efficiency", timed)
    monkeypatch.setattr(Efficiency, "check", lambda *_: None)  # that there is no GPU here
    monkeypatch.setattr(Efficiency, "preflight", lambda *_: None)
    monkeypatch.setattr("slm_pipeline.evaluation.efficiency.gpus.visible", list)
    monkeypatch.setattr(bench_efficiency, "check_machine", check_compiler)
    words = ["model.num_layers=10", "model.hidden_size=32", "model.intermediate_size=1232", "model.vocab_size=1120",
             "model.num_heads=2", "model.num_kv_heads=1", f"evaluation.efficiency.mode={asked}",
             "evaluation.efficiency.grid=[1x4+3]"]  # fmt: skip
    found = list(bench_efficiency.measure_speed(words))
    assert seen == [asked] * 3
    if asked == "eager":
        assert len(found) == 3
    else:
        assert found[3].got is None
        assert found[3].what.endswith("neurons, compiled")
        assert found[3].how == "there is no compiler"
        compilers.append("g++")
        compiled = list(bench_efficiency.measure_speed(words))[3]
        assert seen[3:] == ["graph"] * 3 + ["compile"]
        assert compiled.got == pytest.approx(found[2].got)
        assert (compiled.at_least, found[2].at_least) == (0.9, 0.9)


def test_what_a_benchmark_leaves_is_on_the_page_of_a_report(tmp_path):
    rows_of("shortgpt", "pruning_ratio=layers", "pruning_ratio.num_layers=10", f"output_dir={tmp_path}")
    (found,) = read_analyses(tmp_path)
    assert found.title == "bench methods of random"
    assert found.command.startswith("slm-bench methods model=random")
    assert [picture.title for picture in found.pictures] == [found.title]
    about, results = bench_results.read(found.path / "bench_methods.json")
    assert about["versions"]["torch"] == torch.__version__
    assert [result.what for result in results] == ["shortgpt", "one-pass scores, of a forward pass"]
    assert all(result.got > 0 for result in results)
    assert {f"bench_{group}" for group in bench.GROUPS} <= set(ANALYSES)


@pytest.mark.parametrize(
    ("result", "cells"),
    [
        (Result("a", 19.96, at_least=20.0, how="b"), ["a", "at least 20 x", "20 x", "no", "b"]),
        (Result("a", 20.0, at_least=20.0), ["a", "at least 20 x", "20 x", "yes", ""]),
        (Result("a", 60.5, "s", at_most=60.0), ["a", "at most 60 s", "60.5 s", "no", ""]),
        (Result("a", None, at_most=1.5, how="why"), ["a", "at most 1.5 x", "", "no", "why"]),
        (Result("a", 0.0123, "GB"), ["a", "", "0.0123 GB", "", ""]),
    ],
)
def test_what_was_got_stands_beside_what_was_asked(result, cells):
    assert result.cells() == cells


def test_pieces_of_the_performance_table_are_put_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "_BACKEND", "eager")
    monkeypatch.setitem(bench_performance.PIECES, "sleb", lambda words: [Result("SLEB", 1.9, at_least=2.2)])
    shape = ["model.num_layers=5", "model.hidden_size=32", "model.intermediate_size=48", "model.num_heads=2",
             "model.num_kv_heads=1", "model.vocab_size=300", f"output_dir={tmp_path}",
             "calibration.seq_len=16"]  # fmt: skip
    bench_performance.performance(["slm", *shape])
    bench_performance.performance(["sleb", *shape])
    capsys.readouterr()
    bench_performance.performance(["table", *shape])
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line[:1] == "|"]
    what = ["SLM, one threshold, against the published pass", "SLM, automatic threshold, against ten halvings of it"]
    assert [line[0] for line in lines[2:]] == [
        what[0], f"{what[0]}, compiled", what[1], f"{what[1]}, compiled", "slm: the whole piece", "SLEB",
        "sleb: the whole piece",
    ]  # fmt: skip
    assert all("same decisions: yes" in line[4] for line in lines[2:4])
    assert lines[7][1:4] == ["at least 2.2 x", "1.9 x", "no"]
    assert said.count("- `slm-bench performance s") == 2
    assert said.count(f"python {'.'.join(map(str, sys.version_info[:3]))}") == 2
    with pytest.raises(UserError, match="'decoding' is no piece of this table; there are: slm, sleb, end_to_end"):
        bench_performance.performance(["decoding"])
    with pytest.raises(UserError, match="has no piece of the table"):
        bench_performance.performance(["table", f"output_dir={tmp_path / 'other'}"])


def test_what_a_piece_has_found_is_on_disk_before_it_goes_on(tmp_path, monkeypatch):
    """A machine that is taken back in the middle takes nothing along that was printed."""
    file, found = tmp_path / "bench" / "performance" / "sleb" / "bench_performance.json", []

    def piece(words):
        for number in (1.5, 2.5):
            yield Result("SLEB", number)
            found.append([result["got"] for result in json.loads(file.read_text())["results"]])

    monkeypatch.setitem(bench_performance.PIECES, "sleb", piece)
    bench_performance.performance(["sleb", f"output_dir={tmp_path}"])
    assert found == [[1.5], [1.5, 2.5]]


def test_a_search_that_cannot_be_compiled_leaves_the_other_rows(monkeypatch):
    def ours(method, problem, repeats=1):
        if method.compile:
            raise RuntimeError("Failed to find C compiler.\nSet CC | or install gcc.")
        return bench_methods.Measurement([1], 2.0, 1, 0.5)

    monkeypatch.setattr(bench_methods, "ours", ours)
    monkeypatch.setattr(bench_methods, "theirs", lambda method, problem: bench_methods.Measurement([1], 8.0, 1, 1.0))
    first, compiled_first, second, _ = bench_performance.slm([*TINY, "model.hidden_size=32", "model.num_heads=2",
        "model.num_kv_heads=1", "model.intermediate_size=48", "model.vocab_size=300"])  # fmt: skip
    assert (first.got, second.got) == (4.0, 4.0)
    assert (compiled_first.got, compiled_first.met) == (None, "no")
    assert compiled_first.how == "Failed to find C compiler. Set CC / or install gcc."


def test_a_shortlist_that_decides_otherwise_meets_nothing(monkeypatch):
    found = {None: [3, 1], 8: [3, 2]}

    def ours(method, problem, repeats=1):
        return bench_methods.Measurement(found[method.shortlist], 1.0 if method.shortlist else 4.0, 1, 0.5)

    monkeypatch.setattr(bench_methods, "ours", ours)
    monkeypatch.setattr(bench_methods, "theirs", lambda method, problem: bench_methods.Measurement([3, 1], 8.0, 1, 1.0))
    tiny = [*TINY, "model.hidden_size=32", "model.num_heads=2", "model.num_kv_heads=1", "model.intermediate_size=48",
            "model.vocab_size=300"]  # fmt: skip
    whole, few, _ = bench_performance.sleb(tiny)
    assert (whole.got, whole.met) == (2.0, "no")
    assert (few.got, few.met) == (8.0, "")
    assert few.how.endswith("same decisions: 1 of 2")
    found[8] = [3, 1]
    _, few, _ = bench_performance.sleb(tiny)
    assert (few.got, few.met) == (8.0, "yes")


def test_estimates_stand_beside_what_was_taken(tmp_path, monkeypatch):
    def run_slm(words, folder, launcher=()):
        if "method=joint" in words:
            raise UserError("slm failed: out of memory")
        peaks = {"calibrate": 2.0, "merge": 2.4, "command": 2.4}
        peaks |= {"repair": 2.5, "recover": 1.5} if "repair=refit" in words else {}
        return {stage: Cost(1.0, peak) for stage, peak in peaks.items()}

    place = needs.Place("of GPU memory", None, False)
    monkeypatch.setattr(bench_performance, "run_slm", run_slm)
    monkeypatch.setattr(needs, "need", lambda stage, job: needs.Need(2_000_000_000, place))
    text, shape = bench_performance._text([f"output_dir={tmp_path}"]), TINY[4:]
    found = list(bench_performance.memory([f"output_dir={tmp_path}", *text, "model.num_layers=4", *shape]))
    assert [(result.got, result.met) for result in found] == [
        (1.0, "yes"), (2 / 2.4, "no"), (0.8, "no"), (2 / 1.5, "no"), (1.0, "yes"), (2 / 2.4, "no"), (None, "no"),
    ]  # fmt: skip
    assert found[2].cells() == [
        "memory, this shape, ShortGPT: repair, estimate over peak", "0.85 to 1.15 x", "0.8 x", "no",
        "estimated 2.00 GB, taken 2.50",
    ]  # fmt: skip
    assert "out of memory" in found[-1].how
    both = list(bench_performance.memory([f"output_dir={tmp_path}", *text]))
    assert {result.what.split(", ")[1] for result in both} == {"7B", "1.1B"}


def test_what_two_gpus_do_is_timed_without_the_making_of_weights(tmp_path, monkeypatch):
    """Loading takes 25 seconds on either; of 264 calibration samples those that only load are taken off."""

    def run_slm(words, folder, launcher=()):
        half = 0.5 if launcher else 1.0
        number = int(next(word for word in reversed(words) if word.startswith("calibration.num_samples="))[24:])
        costs = {"calibrate": Cost(25 + half * number / 8, 1.0)}
        if number == 16:
            costs |= {"merge": Cost(65, 1.0, 40 * half), "repair": Cost(45, 1.0, 20 * half + 5)}
        return costs

    monkeypatch.setattr(bench_performance, "run_slm", run_slm)
    found = list(bench_performance.two_gpus([f"output_dir={tmp_path}", *TINY[2:]]))
    assert [(result.what.partition(", ")[2], result.how) for result in found] == [
        ("SLEB, a tenth of the layers", "40.0 and 20.0 s"), ("refit", "25.0 and 15.0 s"),
        ("calibration, 256 samples", "32.0 and 16.0 s"), ("all three", "97.0 and 51.0 s"),
    ]  # fmt: skip
    assert [result.got for result in found] == [2.0, 25 / 15, 2.0, 97 / 51]
    first = next(iter(bench_performance.two_gpus([f"output_dir={tmp_path}", *TINY[2:]])))
    assert first.got == 2.0  # what is measured is there before the rest has run

    def fails(words, folder, launcher=()):
        if "calibration.num_samples=16" in words:
            raise UserError("no NCCL")
        return {"calibrate": Cost(25, 1.0)}

    monkeypatch.setattr(bench_performance, "run_slm", fails)
    found = list(bench_performance.two_gpus([f"output_dir={tmp_path}", *TINY[2:]]))
    assert [(result.what, result.got, result.how) for result in found] == [
        ("two GPUs, SLEB and refit", None, "no NCCL"), ("two GPUs, calibration, 256 samples", None, "0.0 and 0.0 s"),
    ]  # fmt: skip


def test_a_command_that_fails_is_an_error_with_what_it_said_last(tmp_path):
    failing = [sys.executable, "-c", "import sys; print('first'); sys.exit('error: the last')"]
    with pytest.raises(UserError, match="slm method=slm failed: error: the last"):
        bench_stages.run_slm(["method=slm"], tmp_path, failing)
    assert "error: the last" in (tmp_path / "said.txt").read_text()


def test_stages_say_what_they_took(tmp_path):
    for name, result in {"merge": {}, "repair": {"seconds": 0.75}, "calibrate": {}}.items():
        path = tmp_path / "store" / name / "x" / "stage.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"stage": name, "seconds": 2.5, "peak_memory_gb": 0.5, "result": result}))
    (tmp_path / "store" / "merge" / "x" / "plan.json").write_text(json.dumps({"scores": {"seconds": 1.25}}))
    words = ["method=joint", "method.depths=2", "pruning_ratio=r35", "repair.ridges=[0.1]", "model=random"]
    assert bench_stages.around(words, "joint").source.name == "random"
    costs = bench_stages.run_slm([], tmp_path, [sys.executable, "-c", ""])
    works = {name: costs[name].work for name in ("calibrate", "merge", "repair")}
    assert works == {"calibrate": None, "merge": 1.25, "repair": 0.75}
    assert costs["command"].peak_gb == 0.5
    assert bench_stages.of_stages("joint", costs, ["merge", "repair"]) == [
        Result("joint, merge", 2.5, "s"), Result("joint, repair", 2.5, "s"),
        Result("joint, merge, peak", 0.5, "GB"), Result("joint, repair, peak", 0.5, "GB"),
    ]  # fmt: skip


def test_layers_that_share_a_shard_are_equal_and_each_is_read(tmp_path, caplog):
    caplog.set_level("INFO")
    shape = bench_shards.Shape(5, 2, 16, 24, 2, 1, 300)
    bench_shards.write(tmp_path / "dense", shape)
    config = ModelConfig(name="m", source="local", path=str(tmp_path / "dense"), dtype="bfloat16", device="stream")
    source = describe(config)
    assert bench_shards.seconds_of_a_pass(source) > 0
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert bench_performance._blocks_read(said) == 10
    assert bench_performance._blocks_read(f"{said}\na: 3 blocks read\na: 7 blocks read") == 17
    view = ModelView(load_dense(source)[0])
    first = [layer.self_attn.q_proj.weight for layer in view.layers]
    assert torch.equal(first[0], first[4])
    assert not torch.equal(first[0], first[1])


def test_distillation_is_timed_on_the_batches_that_lora_has():
    distill = bench_recovery.distillation_alike(Lora(max_steps=7, micro_batch_size=2, cutoff_len=99, rank=3))
    assert (distill.name, distill.max_steps, distill.micro_batch_size, distill.cutoff_len) == ("distill", 7, 2, 99)
