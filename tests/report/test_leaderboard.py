"""The best at each size, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies import finished, perplexity, with_speedup, write_run

from slm_pipeline.report import documents
from slm_pipeline.report.leaderboard import Board, label, leaderboards
from slm_pipeline.report.study import Study, read_study


def write(folder: Path, job: int, method: str, removed: float, value: float, seed: int = 0, **changes: Any) -> None:
    """A run that took so many percent of the parameters, with this perplexity in the end."""
    model = changes.pop("model", "tiny")
    done = finished(folder, 20, value, model=model)
    done["parameters"] = {"dense": 1000, "pruned": round(1000 - 10 * removed)}
    if (recovered := changes.pop("recovered", None)) is not None:
        done["metrics"]["recovered"] = {"perplexity": {"bundled": perplexity(recovered)}}
    if window := changes.pop("window", None):
        done["metrics"]["pruned"]["perplexity"]["bundled"]["window"] = window
    write_run(
        folder / "s" / str(job),
        [f"method={method}", f"ratio={removed}", f"seed={seed}", f"model={model}"],
        done,
        **changes,
    )


def shown(study: Study, board: Board) -> dict[int, list[tuple[str, float, bool]]]:
    return {
        size.removed: [(label(study, one.choice), round(one.choice.metric.value, 3), one.ties) for one in size.places]
        for size in board.sizes
    }


def test_each_size_has_its_best_with_the_last_model_of_every_run(tmp_path):
    write(tmp_path, 0, "slm", 19.0, 30.0)  # 19 and 21.4 % are of one size
    write(tmp_path, 1, "laco", 21.4, 90.0, recovered=25.0)
    write(tmp_path, 2, "mka", 30.0, 70.0)
    write_run(tmp_path / "s" / "3", ["method=flap", "ratio=30.0", "seed=0"], "out of memory")
    study = read_study(tmp_path / "s")
    assert study.metric == "recovered/perplexity/bundled"
    assert [getattr(study.outcome(i), "key", None) for i in range(4)] == [
        "pruned/perplexity/bundled", "recovered/perplexity/bundled", "pruned/perplexity/bundled", None,
    ]  # fmt: skip
    (board,) = leaderboards(study)
    assert shown(study, board) == {
        20: [("laco, 21.4", 25.0, False), ("slm, 19", 30.0, False)],
        30: [("mka, 30", 70.0, False)],
    }


def test_terminal_and_markdown_name_the_best_last_models_as_the_page_does(tmp_path):
    """Where the metric is about recovered models, those that no recovery followed are in the table of the best too."""
    write(tmp_path, 0, "slm", 20.0, 20.0)
    write(tmp_path, 1, "laco", 20.0, 90.0, recovered=25.0)
    study = read_study(tmp_path / "s")
    said = documents.text(study).partition("\nRuns\n")[0]
    assert [line.split() for line in said.splitlines()[-3:]] == [
        ["size", "perplexity/bundled", "run", "model", "job"],
        ["20%", "less", "1.", "20.00", "slm", "pruned", "0"],
        ["2.", "25.00", "laco", "recovered", "1"],
    ]
    assert "the last model of each run" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in documents.markdown(study).splitlines()]
    assert ["20% less", "1.", "**20.00**", "slm", "pruned", "0"] in rows
    metric = next(row for row in rows if row[:1] == ["job"]).index("recovered/perplexity/bundled")
    assert [row[metric] for row in rows if row[:1] in (["0"], ["1"])] == ["20.00 pruned", "**25.00**"]  # as on the page


def test_seeds_are_one_place_and_what_is_within_noise_ties(tmp_path):
    """Means 21 and 23 +-1.41 of two each; 300 is far from both even by Student's t for one degree of freedom."""
    for seed, (slm, laco, mka) in enumerate([(20.0, 22.0, 299.5), (22.0, 24.0, 300.5)]):
        for method, value in (("slm", slm), ("laco", laco), ("mka", mka)):
            write(tmp_path, 3 * seed + ("slm", "laco", "mka").index(method), method, 20.0, value, seed)
    study = read_study(tmp_path / "s")
    (board,) = leaderboards(study)
    assert shown(study, board) == {20: [("slm", 21.0, False), ("laco", 23.0, True), ("mka", 300.0, False)]}
    assert [len(place.choice.runs) for place in board.sizes[0].places] == [2, 2, 2]


def test_other_models_and_other_ways_of_measuring_have_boards_of_their_own(tmp_path):
    write(tmp_path, 0, "slm", 20.0, 30.0)
    write(tmp_path, 1, "laco", 20.0, 31.0)
    write(tmp_path, 2, "slm", 20.0, 10.0, model="large")
    write(tmp_path, 3, "mka", 20.0, 20.0, window=2048)
    boards = leaderboards(read_study(tmp_path / "s"))
    assert [(board.model, "2048" in board.how) for board in boards] == [
        ("tiny", False),
        ("large", False),
        ("tiny", True),
    ]
    assert [len(board.sizes[0].places) for board in boards] == [2, 1, 1]


def test_a_folder_whose_weights_changed_is_another_model(tmp_path):
    """One name, two fingerprints; a run that says none is not taken for either of them."""
    for job, (method, value, weights) in enumerate(
        [("slm", 30.0, "a"), ("laco", 40.0, "a"), ("mka", 9.0, "b"), ("come", 50.0, None), ("flap", 8.0, "b")]
    ):
        done = finished(
            tmp_path, 20, value, model="mine", method=method, **({"fingerprint": weights} if weights else {})
        )
        write_run(tmp_path / "s" / str(job), [f"method={method}"], done)
    study = read_study(tmp_path / "s")
    assert [len({study.models[i] for i in runs}) for runs in ((0, 1), (2, 4), (0, 2, 3))] == [1, 1, 3]
    assert study.models[3] == "mine (unknown)"
    boards = leaderboards(study)
    assert [(board.model, board.sizes[0].places[0].choice.metric.value) for board in boards] == [
        (study.models[0], 30.0), (study.models[2], 8.0), (study.models[3], 50.0),
    ]  # fmt: skip
    assert {winner.best.metric.value for winner in study.winners} == {30.0, 8.0, 50.0}


def test_a_run_of_before_is_of_the_only_model_of_its_name(tmp_path):
    for job, changes in enumerate([{"fingerprint": "a"}, {}]):
        write_run(tmp_path / "s" / str(job), [f"method=m{job}"], finished(tmp_path, 20, 20.0 + job, **changes))
    (board,) = leaderboards(read_study(tmp_path / "s"))
    assert (board.model, len(board.sizes[0].places)) == ("smollm2_135m", 2)


def test_a_label_has_what_its_model_depends_on(tmp_path):
    """Not how it was measured, nor a recovery that did not run, nor a threshold that the method has not."""
    told = [
        ["method=slm", "threshold.value=0.7", "recovery=lora", "evaluation=quick", "model.path=/m"],
        ["method=flap", "threshold.value=0.8", "recovery=none", "evaluation=full", "model.path=/n"],
    ]
    for job, (words, threshold) in enumerate(zip(told, (0.7, None), strict=True)):
        write_run(tmp_path / "s" / str(job), words, finished(tmp_path, 20 + job, 20.0, threshold=threshold))
    study = read_study(tmp_path / "s")
    assert set(study.varied) == {word.partition("=")[0] for word in told[0]}
    (board,) = leaderboards(study)
    assert {label(study, place.choice) for size in board.sizes for place in size.places} == {
        "slm, threshold.value=0.7", "flap",
    }  # fmt: skip


def test_a_run_over_its_budget_competes_with_nobody(tmp_path):
    write(tmp_path, 0, "slm", 20.0, 30.0, config={"objective": {"max_layers": 10}})
    write(tmp_path, 1, "laco", 20.0, 40.0)
    study = read_study(tmp_path / "s")
    assert [name for name, *_ in shown(study, leaderboards(study)[0])[20]] == ["laco"]


def test_the_speeds_of_two_devices_have_boards_of_their_own(tmp_path):
    """One recovered on a CPU, one only pruned, on a GPU: no number of either model is of two devices."""
    for job, (device, target) in enumerate([("cpu", "recovered"), ("cpu", "recovered"), ("H100", "pruned")]):
        done = with_speedup(finished(tmp_path, 24, 20.0), 1.5 + job, device)
        speed = done["numbers"].pop("pruned/efficiency/speedup")
        done["numbers"][f"{target}/efficiency/speedup"] = speed
        write_run(tmp_path / "s" / str(job), [f"method=m{job}"], done)
    study = read_study(tmp_path / "s", metric="recovered/efficiency/speedup")
    boards = leaderboards(study)
    assert [[place.choice.runs for size in board.sizes for place in size.places] for board in boards] == [
        [(1,), (0,)],
        [(2,)],
    ]
