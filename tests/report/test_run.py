"""summary.md and the terminal text of one run, from a summary small enough to check by hand."""

from __future__ import annotations

import pytest
from studies import perplexity, task, with_numbers

from slm_pipeline.report.run import write_summary_md
from slm_pipeline.results.of_run import numbers_of
from slm_pipeline.show.tables import WIDTH


def test_text_holds_the_run_in_lines_that_fit_a_terminal(tmp_path, summary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "run" / "plan.json").write_text("{}")
    text = write_summary_md(tmp_path / "run", summary)
    assert text.splitlines()[:24] == [
        "first: smollm2_135m, slm, threshold 0.81, seed 7",
        "layers 30 -> 24 (-20.0%), parameters 134.5M -> 113.3M (-15.8%)",
        "",
        "Results",
        "          perplexity      average",
        "  model      (lower)  (%, higher)",
        "  chance                     50.0",
        "  dense        15.23         65.0",
        "                            +-6.4",
        "  pruned    1.23e+05",
        "",
        "Zero-shot (%, higher is better)",
        "  model    boolq   piqa  average",
        "  chance    50.0   50.0     50.0",
        "  dense     60.0   70.0     65.0",
        "          +-11.2  +-6.0    +-6.4",
        "",
        "How far the scores go",
        "  20 examples a task: +-11 points (one standard error) on a score; use evaluation=zero_shot for real",
        "    numbers",
        "",
        "How it was measured",
        "  perplexity bundled: 8184 tokens scored, windows of 1024 tokens, not overlapping, no BOS",
        "  dense: zero-shot boolq, piqa: lm-eval 0.4.13, the first 20 examples of each task, batch size 16",
    ]
    assert "0-19 {20-23} 24-25 29" in text
    assert "dropped: 26, 27, 28" in text
    assert "  merge              30.0  no         2.25  m\n" in text
    assert "  calibrate           3.2  yes        1.50  c\n" in text
    assert "checkpoint: m/model\n" in text
    assert "plan: run/plan.json\n" in text
    assert "pictures: layers.png, layers.svg\n" in text
    assert "wandb sync run/wandb/offline-run-1\n" in text
    assert summary["warnings"][0] in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()


def test_markdown_has_the_same_and_the_details(tmp_path, summary):
    write_summary_md(tmp_path, summary)
    markdown = (tmp_path / "summary.md").read_text()
    assert markdown.startswith("# first: smollm2_135m, slm, threshold 0.81, seed 7\n\nlayers 30 -> 24 (-20.0%)")
    assert "| dense  |   60.0 |  70.0 |    65.0 |\n" in markdown
    assert "| dense  | boolq              |     60 |    11.2 | %          |\n" in markdown
    assert f"```bash\n{summary['command']}\n```\n" in markdown
    assert f"- checkpoint: {tmp_path}/m/model\n" in markdown


def test_zeroed_parameters_are_in_the_checkpoint_and_not_at_work(tmp_path, summary):
    summary["sublayers"] = {"export": "stock", "attention": [3], "mlp": [], "parameters": 7_000_000}
    text = " ".join(write_summary_md(tmp_path, summary).split())
    assert "parameters 134.5M -> 113.3M (-15.8%), 106.3M of them at work (-21.0%)" in text
    assert "parameters: those at work; the checkpoint also holds those of the removed sublayers, as zeros" in text
    assert numbers_of(summary)["parameters"].value == 106_276_160
    summary["sublayers"]["export"] = "custom"  # then they are gone from the checkpoint, and counted as gone
    assert numbers_of(summary)["parameters"].value == 113_276_160
    assert "at work" not in write_summary_md(tmp_path, summary)


def test_a_linear_map_is_told_by_both_its_fits(tmp_path, summary):
    fitted = {"num_tokens": 900, "cosine_before": 0.31, "cosine_after": 1.0}
    summary["fit"] = {"fitted": fitted, "held_out": {**fitted, "num_tokens": 100, "cosine_after": 0.54}}
    text = " ".join(write_summary_md(tmp_path, summary).split())
    assert "cosine 0.31 -> 1.00 on 900 tokens fitted, 0.31 -> 0.54 on 100 held out" in text


def test_small_limits_are_called_out_and_whole_tasks_are_not(tmp_path, summary):
    warning = "20 examples a task: +-11 points (one standard error) on a score; use evaluation=zero_shot"
    assert warning in write_summary_md(tmp_path, summary)
    summary["details"]["evaluate_dense"]["zero_shot"] = {"boolq": task(60.0, 0.9, limit=None)}
    text = write_summary_md(tmp_path, summary)
    assert "use evaluation=zero_shot" not in text
    assert "dense: zero-shot boolq: lm-eval 0.4.13, all examples, batch size 16" in text


def test_settings_that_differ_are_said_for_each_model(tmp_path, summary):
    summary["metrics"]["pruned"]["perplexity"]["bundled"] = perplexity(20.0, stride=512, bos=True, split="test")
    text = write_summary_md(tmp_path, summary)
    assert "dense: perplexity bundled: 8184 tokens scored, windows of 1024 tokens, not overlapping, no BOS" in text
    scored = "windows of 1024 tokens, the last 512 tokens of each scored, BOS before each"
    assert f"pruned: perplexity bundled: test split, 8184 tokens scored, {scored}" in " ".join(text.split())


def test_a_score_that_may_be_the_dense_models_is_marked_and_none_at_0_is_no_certainty(tmp_path, summary):
    """60 +-11.2 and 75 are alike, 70 and none of twenty are not; the whole of fidelity stands beside the average."""
    scores = {"boolq": 75.0, "piqa": 0.0, "average": 37.5}
    summary["metrics"]["pruned"]["zero_shot"] = scores
    summary["details"]["evaluate_pruned"] = {"zero_shot": {"boolq": task(75.0, 9.9), "piqa": task(0.0, 0.0)}}
    summary = with_numbers(summary)
    kl = {"value": 6.66, "unit": "nats/token", "stderr": 0.271, "higher_is_better": False}
    summary["numbers"]["pruned/fidelity/bundled/kl"] = {**kl, "measured": {"measure": "fidelity", "part": "bundled"}}
    text = write_summary_md(tmp_path, summary)
    tables = text.partition("\n\n")[2].partition("How far")[0]
    assert tables.splitlines() == [
        "Results",
        "          perplexity      average          fidelity kl",
        "  model      (lower)  (%, higher)  (nats/token, lower)",
        "  chance                     50.0",
        "  dense        15.23         65.0",
        "                            +-6.4",
        "  pruned    1.23e+05         37.5                 6.66",
        "                            +-5.0              +-0.271",
        "",
        "Zero-shot (%, higher is better); ~ within noise of dense",
        "  model    boolq        piqa  average",
        "  chance    50.0        50.0     50.0",
        "  dense     60.0        70.0     65.0",
        "          +-11.2       +-6.0    +-6.4",
        "  pruned    75.0~        0.0     37.5",
        "           +-9.9   (0.0-4.8)    +-5.0",
        "",
    ]
    assert "average of pruned: within noise no better than guessing, 50.0\n" in text


def test_what_was_not_run_is_absent(tmp_path, summary):
    for key in ("metrics", "details", "threshold", "num_layers", "parameters", "layer_groups", "dropped", "checkpoint"):
        del summary[key]
    text = write_summary_md(tmp_path, {**summary, "warnings": [], "pictures": []})
    assert text.startswith("first: smollm2_135m, slm, seed 7\nnothing merged in this run\n\nStages\n")
    for word in ("Results", "measured", "Layers", "Recovery", "Warnings", "checkpoint", "picture", "W&B", "Efficiency"):
        assert word not in text
        assert word not in (tmp_path / "summary.md").read_text()


def test_a_threshold_that_may_not_be_the_highest_is_called_that(tmp_path, summary):
    hint = "threshold 0.81 reaches the pruning ratio, but a higher one may too"
    assert hint in write_summary_md(tmp_path, {**summary, "threshold_is_highest": False})
    assert hint not in write_summary_md(tmp_path, {**summary, "threshold_is_highest": True})


def test_recovery_lists_its_numbers(tmp_path, summary):
    summary["recovery"] = {"name": "lora", "options": {}, "num_tokens": 123456, "seconds": 2.0, "eval_loss": 2.34567}
    assert "Recovery\n  lora: num tokens 123456, seconds 2, eval loss 2.346\n" in write_summary_md(tmp_path, summary)


def test_a_repair_says_what_it_won_and_what_the_plan_did_not_do(tmp_path, summary):
    merged = {"lines": ["of the method"], "marks": [], "idle_parameters": 0}
    summary["changes"] = merged
    summary["repair"] = {
        "name": "refit", "options": {}, "num_tokens": 52224, "num_held_out": 13312, "seconds": 12.34,
        "divergence": {"pruned": {"kl": 0.51234, "same_top_1": 0.6}, "repaired": {"kl": 0.25, "same_top_1": 0.7}},
        "changes": {**merged, "lines": ["of the method", "new weights in the last projections of 2-5"]},
    }  # fmt: skip
    text = write_summary_md(tmp_path, summary)
    section = text.partition("\nRepair\n")[2].partition("\n\n")[0]
    assert " ".join(section.split()) == (
        "refit: 52224 tokens, KL from the dense model 0.5123 -> 0.25 nats a token on text held out, 12.3 seconds"
        " new weights in the last projections of 2-5"
    )
    summary["repair"] = {"name": "rescale", "seconds": 1.0, "changes": merged}
    assert "Repair\n  rescale: 1.0 seconds\n" in write_summary_md(tmp_path, summary)


def test_unknown_standard_errors_are_left_out(tmp_path, summary):
    summary["details"]["evaluate_dense"]["zero_shot"]["piqa"]["stderr"] = None
    lines = write_summary_md(tmp_path, summary).splitlines()
    assert lines[lines.index("  dense     60.0  70.0     65.0") + 1] == "          +-11.2"
    assert "| dense  | piqa               |     70 |        | %          |" in (tmp_path / "summary.md").read_text()


def test_a_summary_of_before_numbers_had_keys_says_the_same(tmp_path, summary):
    assert write_summary_md(tmp_path, with_numbers(summary)) == write_summary_md(tmp_path, summary)
    found = numbers_of(summary)
    assert {key: number.value for key, number in found.items()} == {
        "num_layers": 24,
        "parameters": 113276160,
        "threshold": 0.81,
        "dense/boolq": 60.0,
        "dense/piqa": 70.0,
        "dense/average": 65.0,
        "dense/perplexity/bundled": 15.234,
        "pruned/perplexity/bundled": 123456.0,
        "seconds": 42.0,
    }
    assert numbers_of(with_numbers(summary)) == found
    assert found["dense/average"].stderr == pytest.approx((11.2**2 + 6.0**2) ** 0.5 / 2)
    assert [key for key, number in found.items() if number.higher_is_better] == [
        "dense/boolq", "dense/piqa", "dense/average"
    ]  # fmt: skip


def test_two_texts_with_one_file_name_are_two_numbers(tmp_path, summary):
    summary["metrics"]["pruned"]["perplexity"] = {"a/x.txt": perplexity(5.0), "b/x.txt": perplexity(6.0)}
    found = numbers_of(summary)
    assert (found["pruned/perplexity/a/x.txt"].value, found["pruned/perplexity/b/x.txt"].value) == (5.0, 6.0)


def test_efficiency_has_a_row_for_each_model(tmp_path, summary):
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 1,
        "output_len": 128,
        "num_runs": 30,
        "num_warmup": 10,
    }
    speeds = {"dense": (3.2, 40.0), "pruned": (2.5, 51.25)}
    summary["efficiency"] = {
        target: {"latency_seconds": s, "tokens_per_second": n, "weights_gb": 0.538, "peak_memory_gb": None, **settings}
        for target, (s, n) in speeds.items()
    }
    text = write_summary_md(tmp_path, summary)
    assert "Efficiency\n           tokens_per_second   latency_seconds   weights_gb\n" in text
    assert "  model   (tokens/s, higher)  (seconds, lower)  (GB, lower)\n" in text
    assert "efficiency: cpu, float32, batch size 1, 128 new tokens, mean of 20 runs after 10 to warm up\n" in text


def test_a_warning_says_which_stage_it_is_about(tmp_path, summary):
    summary["warnings"] = ["of the job", "the guard failed"]
    summary["stages"]["merge"]["warnings"] = ["the guard failed"]
    assert "Warnings\n  of the job\n  merge: the guard failed\n" in write_summary_md(tmp_path, summary)


def test_names_cannot_be_markup(tmp_path, summary):
    summary |= {"name": "<script>a</script>", "command": "slm\n```\n<b>", "warnings": ["<i>\n# title"]}
    text = write_summary_md(tmp_path, summary)
    markdown = (tmp_path / "summary.md").read_text()
    assert markdown.startswith("# &lt;script>a&lt;/script>: smollm2_135m")
    assert "- &lt;i> # title\n" in markdown
    assert "````bash\nslm\n```\n<b>\n````\n" in markdown
    assert "  <i> # title\n" in text
