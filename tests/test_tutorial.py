"""docs/tutorial.md from its first command to its last, on a random model of ten layers and texts of some words."""

from __future__ import annotations

import json
import re
import shlex
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
from conftest import run_slm
from small_pipeline import write_data

TUTORIAL = (Path(__file__).resolve().parent.parent / "docs/tutorial.md").read_text(encoding="utf-8")
TUTORIAL = TUTORIAL.replace("perplexity/bundled", "perplexity/text.txt")  # the text that SMALL has in its place
# What follows the tutorial's own words on every command line of slm; the last of two counts.
SMALL = [
    *("model=random", "model.num_layers=10", "model.hidden_size=32", "model.intermediate_size=48"),
    *("tracker=jsonl", "pictures=false", "data_dir=data", "calibration=text_file", "calibration.path=text.txt"),
    *("calibration.num_samples=8", "calibration.seq_len=32", "evaluation.perplexity.corpora=[text.txt]"),
    *("evaluation.perplexity.window=128", "evaluation.perplexity.max_tokens=1024"),
]
TRAINING = [
    *("recovery.source=file", "recovery.path=alpaca.json", "recovery.num_examples=20", "recovery.validation_size=4"),
    *("recovery.max_steps=2", "recovery.eval_steps=1", "recovery.cutoff_len=256"),  # bytes are many tokens
]
REPAIR = ["repair.calibration.num_samples=8", "repair.calibration.seq_len=32"]


def call(program: str, words: list[str]) -> str:
    """What a command prints; it must end well."""
    if program == "slm":
        small = [*SMALL, *(TRAINING if "recovery=lora" in words else []), *(REPAIR if "repair=refit" in words else [])]
        outcome = run_slm(*words, *small)
        assert outcome.status == 0, outcome.err
        return outcome.out
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [program, *words])
        import_module(f"slm_pipeline.commands.{program.removeprefix('slm-')}").main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Every command and every Python block in order, with what it printed; all of them in one folder."""
    folder = tmp_path_factory.mktemp("tutorial")
    write_data(folder / "data")
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, block in re.findall(r"```(\w+)\n(.*?)```", TUTORIAL, re.DOTALL):
            if language == "yaml":
                file = Path(block.partition("\n")[0].removeprefix("# "))
                file.parent.mkdir(exist_ok=True)
                file.write_text(block.partition("\n")[2])
            elif language == "python":
                printed = StringIO()
                with redirect_stdout(printed):
                    exec(compile(block, "docs/tutorial.md", "exec"), {})
                results.append((block, printed.getvalue()))
            elif language == "bash":
                for line in re.sub(r"\\\n\s*", "", block).splitlines():
                    program, *words = shlex.split(line)
                    results.append((line, call(program, words)))
        results.append(("", str(folder)))
    return results


def test_each_step_leaves_what_the_tutorial_says(said):
    outputs = Path(said[-1][1]) / "outputs"
    summaries = {name: json.loads((outputs / f"tutorial/{name}/summary.json").read_text()) for name in RUNS}
    assert {name: found["num_layers"] for name, found in summaries.items()} == dict.fromkeys(
        RUNS, {"dense": 10, "pruned": 8}
    )
    assert len({tuple(found["dropped"]) for found in summaries.values()}) == 1  # one plan, three ways to go on
    for name, target in RUNS.items():
        assert f"{target}/perplexity/text.txt" in summaries[name]["numbers"]
    assert (outputs / "tutorial_report/report.html").is_file()
    assert "perplexity" in (outputs / "model_card.md").read_text()
    jobs = [json.loads(file.read_text()) for file in sorted(outputs.glob("depth_or_width/*/summary.json"))]
    assert [job["method"] for job in jobs] == ["angular", "angular", "flap", "flap"]


RUNS = {"angular": "pruned", "refit": "repaired", "lora": "recovered"}


def test_what_the_commands_print_is_what_they_are_run_for(said):
    printed = dict(said)

    def of(part: str) -> str:
        (found,) = [text for command, text in printed.items() if part in command]
        return found

    assert [line.split()[:2] for line in of("evaluation=perplexity dry_run").splitlines()][:2] == [
        ["calibrate", "run"],
        ["merge", "run"],
    ]
    assert of("Plan.read").startswith("angular drops [")
    assert "reuse" in of("from_plan")
    assert all(name in of("--out outputs/tutorial_report") for name in RUNS)
    assert of("slm-study") == "4 jobs: 4 done\n"
    assert "flap" in of("--sort-by")
    assert of("generate(").startswith("The river runs past")
