"""What a model card says."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from slm_pipeline.export import model_card
from slm_pipeline.export.model_card import Base
from slm_pipeline.results.number import Number
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.plan import Plan

NUMBERS = [
    Number("num_layers", 5, "layers"),
    Number("dense/piqa", 70.25, "%", 10.5, True, {"part": "piqa", "metric": "acc", "how": "all examples"}),
    Number("pruned/piqa", 45.0, "%", 11.4, True, {"part": "piqa", "metric": "acc", "how": "all examples"}),
    Number("pruned/average", 45.0, "%", None, True),
    Number("pruned/perplexity/a|b", 23.456, "perplexity", None, False, {"part": "a|b", "how": "windows of 8 tokens"}),
    Number("pruned/fidelity/a|b/kl", 0.5, "nats/token", None, False, {"part": "a|b"}),
]
PLAN = Plan({"name": "m", "fingerprint": "f", "num_layers": 6}, "test", {}, None, [Drop((2,))])


def card(description=None, **more) -> str:
    return model_card.text(
        title="m, 5 layers",
        base=Base("m", "me/m", "mit"),
        paragraphs=[model_card.in_words(PLAN, ["a line"])],
        command="slm a=b",
        numbers=NUMBERS,
        which="pruned",
        description=description,
        **more,
    )


def test_the_hub_reads_every_number_of_the_model_that_it_is_of():
    data = ModelCard(card()).data
    assert (data.base_model, data.license, data.library_name) == ("me/m", "mit", "transformers")
    found = {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results}
    assert found == {
        ("piqa", "acc", 45.0), ("average", "accuracy", 45.0), ("a|b", "perplexity", 23.456), ("a|b", "nats/token", 0.5)
    }  # fmt: skip
    (piqa,) = [result for result in data.eval_results if result.dataset_name == "piqa"]
    assert piqa.metric_args == {"stderr": 11.4}


def test_people_read_the_scores_of_all_models_and_how_they_were_measured():
    lines = card().splitlines()
    assert "|  | dense | pruned |" in lines
    assert "| piqa (%, higher is better) | 70.2 +-10.5 | 45.0 +-11.4 |" in lines
    assert r"| perplexity/a\|b (perplexity, lower is better) |  | 23.46 |" in lines
    assert "- piqa: all examples" in lines
    assert "Layers, by the original layers merged into each: `0-1 3-5`; dropped: [2]; a line." in lines
    assert "slm a=b" in lines


@pytest.mark.parametrize(
    ("model_type", "there", "absent"),  # of Gemma 3 one whose first layer alone attends to all
    [
        ("llama", ["vllm serve me/x", "slm-export gguf"], ["trust_remote_code"]),
        ("pruned_llama", ['"me/x", trust_remote_code=True', "slm-export padded", "slm-export gguf"], ["vllm serve"]),
        ("pruned_opt", ["trust_remote_code=True", "llama.cpp has no architecture"], ["vllm serve", "slm-export gguf"]),
        ("opt", ["vllm serve me/x", "llama.cpp has no architecture"], ["trust_remote_code", "slm-export gguf"]),
        ("gemma3_text", ["vllm serve me/x", "llama.cpp has no architecture"], ["slm-export gguf"]),
    ],
)
def test_it_says_what_loads_the_model(model_type, there, absent):
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    text = card({"model_type": model_type, "layer_types": kinds}, place="me/x")
    assert [word for word in there if word not in text] == []
    assert [word for word in absent if word in text] == []


def test_a_card_without_numbers_has_no_table():
    text = model_card.text(title="t", base=Base("m"), paragraphs=["What it is."], command="slm")
    assert "## Scores" not in text
    assert "## Use" not in text
    assert ModelCard(text).data.base_model is None


def test_the_licence_of_the_base_model(tmp_path):
    bundled = Base.of({"source": "bundled", "name": "smollm2_135m"})
    assert bundled == Base("smollm2_135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    local = {"source": "local", "name": "mine", "path": str(tmp_path)}
    assert Base.of(local) == Base("mine")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert Base.of(local) == Base("mine", None, "mit")
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    assert Base.of(local) == Base("mine")
    assert Base.of({"source": "hub", "name": "a", "repo": "a/never-seen"}) == Base("a", "a/never-seen")
