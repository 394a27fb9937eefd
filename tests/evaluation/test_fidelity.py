"""Fidelity against whole logits in double precision, one window at a time, and statistics worked out by hand."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import context_of, random_source
from two_processes import of_both

from slm_pipeline.config import Config
from slm_pipeline.data.corpora import corpus_documents
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import fidelity as module
from slm_pipeline.evaluation.fidelity import Fidelity, fidelity
from slm_pipeline.machine import ranks
from slm_pipeline.models.context import Context
from slm_pipeline.models.loading import load_dense

BOS = 257
OPTIONS = {"window": 8, "bos_token_id": None, "batch_size": 3, "label": "text"}
LENGTHS = (5, 19, 1, 8, 30)  # of documents: within a window, several, nothing to predict, one whole


def _documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def _sharpened(model, seed: int):
    """The model with other weights, predictions far from uniform."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4).add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def pair(tiny_llama):
    """(model, dense)"""
    return _sharpened(tiny_llama[0], 1), _sharpened(tiny_llama[0], 2)


def _naive(model, dense, documents, window: int, bos: bool) -> list[tuple[list[float], list[bool]]]:
    """(divergences, whether the first choices agree) of every document."""
    found = []
    for ids in documents:
        divergences, same = [], []
        size = window - bos
        for start in range(0, len(ids), size):
            piece = ids[start : start + size].tolist()
            tokens = torch.tensor([[BOS, *piece] if bos else piece])
            with torch.no_grad():
                p, q = (m(tokens).logits[0, :-1].double().log_softmax(-1) for m in (dense, model))
            divergences += (p.exp() * (p - q)).sum(-1).tolist()
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
        found.append((divergences, same))
    return [(divergences, same) for divergences, same in found if divergences]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equals_whole_logits_of_one_window_at_a_time(pair, bos, batch_size):
    documents = _documents(*LENGTHS)
    options = {**OPTIONS, "bos_token_id": BOS if bos else None, "batch_size": batch_size}
    result = fidelity(*pair, documents, **options)
    naive = _naive(*pair, documents, 8, bos)
    values = np.concatenate([divergences for divergences, _ in naive])
    agreements = np.concatenate([same for _, same in naive])
    # without BOS a window of n tokens has n - 1 predictions: 4, 7 + 7 + 2, none, 7, 7 + 7 + 7 + 5
    assert result["num_tokens"] == len(values) == (63 if bos else 53)
    assert result["num_documents"] == (5 if bos else 4)
    assert result["kl"] == pytest.approx(values.mean(), rel=1e-5)
    assert result["kl_p99"] == pytest.approx(np.percentile(values, 99), rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(100 * agreements.mean())
    assert 0 < agreements.mean() < 1
    assert values.mean() > 0.01
    counts = np.array([len(same) for _, same in naive])
    for name, per_document, scale in (
        ("kl", [sum(divergences) for divergences, _ in naive], 1),
        ("top1_agreement", [sum(same) for _, same in naive], 100),
    ):
        residuals = np.array(per_document) - sum(per_document) / sum(counts) * counts
        variance = len(counts) / (len(counts) - 1) * (residuals**2).sum() / counts.sum() ** 2
        assert result[f"{name}_stderr"] == pytest.approx(scale * variance**0.5, rel=1e-4)
    assert (result["window"], result["bos"], result["batch_size"]) == (8, bos, batch_size)


def test_divergence_is_from_the_dense_model_to_the_other(pair):
    model, dense = pair
    there, back = (fidelity(*models, _documents(30), **OPTIONS)["kl"] for models in ((model, dense), (dense, model)))
    assert there == pytest.approx(np.mean(_naive(model, dense, _documents(30), 8, False)[0][0]), rel=1e-5)
    assert abs(there - back) > 1e-4


def test_the_size_of_pieces_does_not_change_the_result(pair, monkeypatch):
    whole = fidelity(*pair, _documents(*LENGTHS), **OPTIONS)
    for num_positions in (1, 4):
        monkeypatch.setattr(module, "MAX_ELEMENTS", num_positions * pair[0].config.vocab_size + 1)
        assert fidelity(*pair, _documents(*LENGTHS), **OPTIONS) == pytest.approx(whole, rel=1e-5)


def test_logits_are_never_made_of_more_positions_than_allowed(pair, monkeypatch):
    model, dense = pair
    seen = []
    for each in pair:
        each.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(output.shape[:-1].numel()))
    monkeypatch.setattr(module, "MAX_ELEMENTS", 4 * model.config.vocab_size)
    fidelity(model, dense, _documents(30, 8), **OPTIONS)
    assert max(seen) == 4
    assert sum(seen) == 2 * (7 + 7 + 7 + 5 + 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_agrees_with_itself(pair, dtype):
    dense = pair[1].to(dtype)
    for other in (dense, copy.deepcopy(dense)):
        result = fidelity(other, dense, _documents(*LENGTHS), **OPTIONS)
        assert (result["kl"], result["kl_p99"], result["top1_agreement"]) == (0, 0, 100)
        assert (result["kl_stderr"], result["kl_p99_stderr"], result["top1_agreement_stderr"]) == (0, 0, 0)


def test_two_models_may_have_two_dtypes(pair):
    model, dense = pair
    model.train()
    result = fidelity(copy.deepcopy(dense).bfloat16(), dense, _documents(*LENGTHS), **OPTIONS)
    assert 0 < result["kl"] < 0.01
    low = fidelity(copy.deepcopy(model).bfloat16(), dense, [ids.numpy() for ids in _documents(*LENGTHS)], **OPTIONS)
    assert low["kl"] == pytest.approx(fidelity(model, dense, _documents(*LENGTHS), **OPTIONS)["kl"], rel=0.05)
    assert not model.training


def test_statistics_by_hand():
    found = module._statistics([np.float32([1, 2, 3]), np.float32([6])], [3, 0])
    # means: 12 / 4 and 3 / 4; residuals 6 - 9, 6 - 3 and 3 - 2.25, 0 - 0.75
    assert (found["kl"], found["top1_agreement"]) == (3, 75)
    assert found["kl_stderr"] == pytest.approx((2 * (9 + 9)) ** 0.5 / 4)
    assert found["top1_agreement_stderr"] == pytest.approx(100 * (2 * (0.75**2 + 0.75**2)) ** 0.5 / 4)
    assert found["kl_p99"] == pytest.approx(3 + 0.97 * 3)  # order statistic 0.99 * 3, counted from 0
    # beyond it: 0 of 3 and 1 of 1, so 1 / 4 with residuals -0.75 and 0.75 and error 0.375; order statistics 1.845 and 3
    assert found["kl_p99_stderr"] == pytest.approx((6 - 2.845) / 2)
    assert (found["num_tokens"], found["num_documents"]) == (4, 2)


def test_one_document_has_no_standard_error(pair):
    result = fidelity(*pair, _documents(30), **OPTIONS)
    assert (result["kl_stderr"], result["kl_p99_stderr"], result["top1_agreement_stderr"]) == (None, None, None)
    assert result["kl"] > 0


def test_every_architecture_is_compared_as_its_own_forward_computes(architecture):
    model, dense = (
        _sharpened(load_dense(random_source(architecture, num_layers=2, seed=seed))[0], seed) for seed in (1, 2)
    )
    result = fidelity(model, dense, _documents(5, 19), **OPTIONS)
    naive = _naive(model, dense, _documents(5, 19), 8, False)
    assert result["kl"] == pytest.approx(np.concatenate([found for found, _ in naive]).mean(), rel=1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite_are_refused(pair, which):
    with torch.no_grad():
        pair[which].lm_head.weight[5].fill_(torch.inf)
    with pytest.raises(UserError, match="text: the divergence is not finite in document 2: one of the two models"):
        fidelity(*pair, _documents(1, 8), **OPTIONS)


def test_documents_without_a_token_to_predict_are_refused(pair):
    with pytest.raises(UserError, match="text: none of the 2 documents has a token to predict"):
        fidelity(*pair, _documents(1, 0), **OPTIONS)


def test_bundled_documents_are_the_stories(tiny_llama, monkeypatch):
    _, tokenizer = tiny_llama
    monkeypatch.setattr("slm_pipeline.assets.texts.bundled_texts", lambda name: {"coqa": ["A b.", "C d e."]}[name])
    documents, about = corpus_documents(tokenizer, "bundled", window=3)
    assert [tokenizer.decode(ids) for ids in documents] == ["A b.", "C d e."]
    assert (about["source"], about["documents"], about["max_tokens"]) == ("coqa", "story", None)
    cut, _ = corpus_documents(tokenizer, "bundled", window=3, max_tokens=7)
    assert [tokenizer.decode(ids) for ids in cut] == ["A b.", "C d"]
    first, _ = corpus_documents(tokenizer, "bundled", window=3, max_tokens=4)
    assert [tokenizer.decode(ids) for ids in first] == ["A b."]


def in_folder(folder: Path) -> Context:
    return dataclasses.replace(context_of(random_source()), config=Config(data_dir=str(folder)))


def test_a_file_is_cut_into_windows(tiny_llama, tmp_path):
    _, tokenizer = tiny_llama
    (tmp_path / "text.txt").write_text("abcdefgh")
    documents, about = corpus_documents(tokenizer, "text.txt", window=3, data_dir=tmp_path)
    assert [tokenizer.decode(ids) for ids in documents] == ["abc", "def"]
    assert (about["split"], about["documents"]) == ("file", "window")
    documents, _ = corpus_documents(tokenizer, "text.txt", window=3, max_tokens=5, data_dir=tmp_path)
    assert [tokenizer.decode(ids) for ids in documents] == ["abc"]
    with pytest.raises(UserError, match="text.txt: 8 tokens are less than one window; evaluation.fidelity.window=9"):
        Fidelity(corpora=["text.txt"], window=9).preflight("text.txt", tokenizer, in_folder(tmp_path))


def test_rows_of_c4_are_documents_and_those_of_wikitext_are_not(tiny_llama, monkeypatch):
    _, tokenizer = tiny_llama
    monkeypatch.setattr("slm_pipeline.data.corpora.hub_rows", lambda corpus, option: ["ab", "cdef"])
    rows, about = corpus_documents(tokenizer, "c4", window=3)
    assert ([tokenizer.decode(ids) for ids in rows], about["documents"]) == (["ab", "cdef"], "row")
    windows, about = corpus_documents(tokenizer, "wikitext2", window=3)
    assert ([tokenizer.decode(ids) for ids in windows], about["documents"]) == (["ab\n", "\ncd"], "window")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpora": ["nothing.txt"]}, "evaluation.fidelity.corpora: 'nothing.txt' is not a file"),
        ({"bos": True, "corpora": ["bundled"]}, "evaluation.fidelity.bos=true: the model's tokenizer has no BOS"),
    ],
)
def test_preflight_finds_what_cannot_be_had(tiny_llama, tmp_path, settings, message):
    _, tokenizer = tiny_llama
    tokenizer.bos_token = None
    measure = Fidelity(window=4, **settings)
    with pytest.raises(UserError, match=message):
        measure.preflight(measure.corpora[0], tokenizer, in_folder(tmp_path))


def test_two_processes_share_the_batches_and_find_what_one_does(pair, monkeypatch):
    documents, compared, plain = _documents(*LENGTHS), {0: 0, 1: 0}, module._compared
    expected = fidelity(*pair, documents, **OPTIONS)

    def counting(dense, model, rows):
        compared[ranks.rank()] += len(rows)
        return plain(dense, model, rows)

    monkeypatch.setattr(module, "_compared", counting)
    assert of_both(monkeypatch, lambda: fidelity(*pair, documents, **OPTIONS)) == [expected, expected]
    assert compared == {0: 3, 1: 6}  # nine windows in batches of three
    of_one_window = _documents(5)
    expected = fidelity(*pair, of_one_window, **OPTIONS)
    assert of_both(monkeypatch, lambda: fidelity(*pair, of_one_window, **OPTIONS)) == [expected, expected]
    with torch.no_grad():
        pair[0].get_input_embeddings().weight[documents[0][0]] = float("nan")  # of a short window: the second's
    found = of_both(monkeypatch, lambda: fidelity(*pair, documents[:4], **{**OPTIONS, "batch_size": 1}))
    assert [type(error) for error in found] == [UserError, UserError]
    assert str(found[0]) == str(found[1])
