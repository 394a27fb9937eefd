"""Similarity maps of a model on texts of unequal length against states computed one text at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch

from slm_pipeline.analysis import cka, similarity
from slm_pipeline.analysis.similarity import Settings, Text
from slm_pipeline.engine import statistics
from slm_pipeline.engine.blocks import BlockRunner
from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import byte_tokenizer
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

LENGTHS = [5, 12, 1, 7, 7, 3, 9, 2, 11, 4]


@pytest.fixture
def text() -> Text:
    generator = torch.Generator().manual_seed(2)
    return Text("tiny", [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS], {})


def states_alone(view, text):
    """[L + 1][text] of [tokens, d] float64, each text run by itself."""
    runners = [BlockRunner(view, sequence[None]) for sequence in text.sequences]
    return [[runner.states[i][0].double() for runner in runners] for i in range(view.num_layers + 1)]


def rows_alone(states, features, unit_length):
    if unit_length:
        states = [[tokens / tokens.norm(dim=-1, keepdim=True) for tokens in layer] for layer in states]
    if features == "mean_pooled":
        return [torch.stack([tokens.mean(dim=0) for tokens in layer]) for layer in states]
    return [torch.cat(layer) for layer in states]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "opt", "gpt_neox", "qwen3"])
def test_padding_has_no_effect(any_model, text, monkeypatch):
    monkeypatch.setattr(similarity, "MAX_BATCH_TOKENS", 40)  # batches of three or so
    view = ModelView(any_model)
    states = states_alone(view, text)
    for features, unit_length in (("mean_pooled", True), ("mean_pooled", False), ("tokens", True), ("tokens", False)):
        settings = Settings(features=features, minibatch=10, unit_length=unit_length)
        if features == "tokens":  # all in one minibatch, whose order does not matter
            settings = Settings(features=features, minibatch=40, unit_length=unit_length)
        maps, counts = similarity.measure(view, text, settings)
        rows = rows_alone(states, features, unit_length)
        expected = torch.tensor([[cka.cka(x, y) for y in rows] for x in rows])
        torch.testing.assert_close(maps["cka"].float(), expected, rtol=0, atol=2e-4)
        cosines = [[torch.cosine_similarity(torch.cat(x), torch.cat(y), dim=-1).mean() for y in states] for x in states]
        torch.testing.assert_close(maps["cosine"], torch.tensor(cosines, dtype=torch.float64), rtol=0, atol=1e-5)
        assert counts["num_tokens"] == sum(LENGTHS)
        assert counts["num_rows"] == (10 if features == "mean_pooled" else sum(LENGTHS))
        assert counts["num_minibatches"] == 1


def test_flattened_rows_are_whole_texts(tiny_llama, input_ids):
    view = ModelView(tiny_llama[0])
    many = torch.cat([input_ids, input_ids.flip(1)])
    settings = Settings(features="flattened", minibatch=6, estimator="biased", kernel="rbf", unit_length=False)
    maps, _ = similarity.measure(view, Text("six", list(many), {}), settings)
    states = BlockRunner(view, many).states
    assert maps["cka"].shape == (7, 7)
    expected = cka.cka(states[1].flatten(1), states[4].flatten(1), "biased", "rbf")
    assert float(maps["cka"][1, 4]) == pytest.approx(expected, abs=1e-5)


def test_only_the_metrics_asked_for(tiny_llama, text):
    maps, counts = similarity.measure(ModelView(tiny_llama[0]), text, Settings(metrics=("cosine",)))
    assert list(maps) == ["cosine"]
    assert counts == {"num_sequences": 10, "num_tokens": sum(LENGTHS)}


def test_a_state_much_longer_than_others_is_all_that_raw_cka_sees():
    """What a massive activation of the first token does: every layer that has it looks like every other."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(16, 8, 64, generator=generator) for _ in range(2)]
    direction = torch.randn(64, generator=generator)
    for state in states:
        state[:, 0] += 1000 * direction
    raw, scaled = (
        cka.cka(*similarity.sample_rows(states, features="tokens", unit_length=unit_length))
        for unit_length in (False, True)
    )
    assert raw > 0.999
    assert scaled < 0.8


def test_tokens_are_shuffled_alike_in_every_state():
    states = [torch.arange(24.0).view(2, 12, 1), torch.arange(24.0).view(2, 12, 1) + 100]
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 5:] = False
    first, second = similarity.sample_rows(states, real, unit_length=False)
    assert sorted(first.flatten().tolist()) == list(range(17))
    assert first.flatten().tolist() != list(range(17))
    assert torch.equal(second, first + 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(minibatch=11), "tiny: 10 rows are fewer than analysis.minibatch=11; give it more text"),
        (Settings(features="tokens", minibatch=62), "tiny: 61 rows are fewer than analysis.minibatch=62"),
        (
            Settings(features="flattened", minibatch=4),
            "tiny: --features=flattened needs texts of one length, these have 1 to 12 tokens; --max-tokens=1 cuts",
        ),
        (Settings(minibatch=3), "the unbiased estimator of HSIC needs at least 4 rows, not 3"),
    ],
)
def test_texts_that_do_not_do(tiny_llama, text, settings, message):
    with pytest.raises(UserError, match=message):
        similarity.measure(ModelView(tiny_llama[0]), text, settings)


def test_states_that_are_not_finite(tiny_llama, text):
    model, _ = tiny_llama
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the states after layer 3 are not finite on tiny"):
        similarity.measure(ModelView(model), text, Settings(minibatch=5))


def test_the_calibration_pass_gives_the_same_cka(tiny_llama, monkeypatch):
    view = ModelView(tiny_llama[0])
    input_ids = torch.randint(0, 256, (12, 30), generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(statistics, "MAX_BATCH_TOKENS", 150)
    alignment = similarity.TokenAlignment()
    found = statistics.collect(view, input_ids, alignment)
    maps, _ = similarity.measure(view, Text("same", list(input_ids), {}), Settings(features="tokens", minibatch=256))
    torch.testing.assert_close(found.cosine.double(), maps["cosine"], rtol=0, atol=1e-6)
    torch.testing.assert_close(alignment.result(), maps["cka"], rtol=0, atol=1e-4)  # 360 rows are one minibatch
    settings = alignment.settings()
    json.dumps(settings)
    assert (settings["features"], settings["num_rows"], settings["num_minibatches"]) == ("tokens", 360, 1)


def test_a_calibration_of_three_tokens_has_no_cka(tiny_llama):
    alignment = similarity.TokenAlignment()
    statistics.collect(ModelView(tiny_llama[0]), torch.tensor([[1, 2, 3]]), alignment)
    assert alignment.result().isnan().all()
    assert similarity.map_summary(alignment.result())["matrix"] == [[None] * 7] * 7


def plan_of(windows, num_layers=6, dropped=()):
    merges = [Merge(tuple(range(low, high + 1)), "mean") for low, high in windows]
    model = {"name": "random", "fingerprint": "", "num_layers": num_layers}
    return Plan(model, "slm", {}, {}, [*merges, *([Drop(tuple(dropped))] if dropped else [])])


def block_map(embeddings=0.1):
    """Layers 0 to 2 and 3 to 5 are patches."""
    values = torch.full((7, 7), 0.5, dtype=torch.float64)
    values[1:4, 1:4] = values[4:, 4:] = 0.9
    values[0] = values[:, 0] = embeddings
    return values.fill_diagonal_(1)


def test_summary_of_maps_made_by_hand():
    undefined = block_map().index_fill(0, torch.tensor([2]), math.nan).index_fill(1, torch.tensor([2]), math.nan)
    maps = {"one": {"cka": block_map()}, "two": {"cka": 1 - block_map()}, "three": {"cka": undefined}}
    found = similarity.summarize(maps, {"plan.json": plan_of([(0, 1), (2, 3)], dropped=[5])})
    json.dumps(found, allow_nan=False)
    one = found["maps"]["one"]["cka"]
    assert one["patches"] == [[0, 2], [3, 5]]  # the embeddings are no layer
    assert (one["inside"], one["outside"]) == (pytest.approx(0.9), pytest.approx(0.5))
    assert one["matrix"][0][3] == 0.1
    assert found["maps"]["three"]["cka"]["matrix"][2] == [None] * 7
    assert found["agreement"]["cka"][0] == pytest.approx([1, -1, 1])
    (plan,) = found["plans"]
    assert (plan["windows"], plan["dropped"]) == ([[0, 1], [2, 3]], [5])
    assert plan["in_patches"]["one"]["cka"] == {"windows": 1, "expected": pytest.approx(2 * 4 / 5)}

    lines = similarity.report(found).splitlines()
    assert lines[4].split()[:3] == ["one", "0.900", "0.500"]
    assert lines[4].endswith("0-2 3-5")
    assert "  slm, plan.json: merges 0-1, 2-3; drops 5" in lines
    assert ["one", "1", "of", "2", "(1.6)"] in [line.split() for line in lines]


def test_number_of_patches():
    assert similarity.map_summary(block_map(), 3)["patches"] != similarity.map_summary(block_map())["patches"]
    assert len(similarity.map_summary(block_map(), 3)["patches"]) == 3


def test_a_tasks_texts(tmp_path):
    rows = [{"goal": f"goal {i}", "sol1": "left", "sol2": "right way", "label": i % 2} for i in range(5)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": ".", "data_dir": tmp_path, "limit": 3, "max_tokens": 100}
    tokenizer = byte_tokenizer()

    def read(**changed):
        text = similarity.task_text("piqa", tokenizer, **{**options, **changed})
        return [tokenizer.decode(sequence) for sequence in text.sequences]

    assert read(per_option=False) == [f"goal {i}\nleft\nright way" for i in range(3)]
    question = "Question: goal {}\nAnswer: "
    assert read(per_option=True) == [question.format(0) + "left", question.format(0) + "right way"] + [
        question.format(1) + "left"
    ]
    assert read(per_option=False, max_tokens=6) == [f"goal {i}" for i in range(3)]
