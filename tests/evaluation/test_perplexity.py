"""Perplexity against a loop over single tokens."""

from __future__ import annotations

import json
import math

import pytest
import torch
from two_processes import of_both

from slm_pipeline.data.corpora import HUB_CORPORA, corpus_fingerprint, corpus_tokens
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import perplexity as module
from slm_pipeline.evaluation.perplexity import perplexity
from slm_pipeline.machine import ranks

BOS = 257
OPTIONS = {"window": 8, "stride": None, "bos_token_id": None, "batch_size": 3, "max_tokens": None, "label": "text"}


def _ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(0))


def _nll(model, context: list[int], token: int) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double()
    return -logits.log_softmax(-1)[token].item()


def _non_overlapping(model, ids: list[int], window: int, bos: bool) -> list[float]:
    """Windows one after the other, a tail left out; the first token is predicted only from a BOS."""
    prefix = [BOS] if bos else []
    size = window - len(prefix)
    losses = []
    for start in range(0, len(ids) - size + 1, size):
        chunk = prefix + ids[start : start + size]
        losses += [_nll(model, chunk[:i], chunk[i]) for i in range(1, window)]
    return losses


def _sliding(model, ids: list[int], window: int, stride: int, bos: bool) -> list[float]:
    """Each token once, from all that precedes it in the first window that holds it."""
    prefix = [BOS] if bos else []
    size = window - len(prefix)
    losses = []
    for i in range(len(ids)):
        start = 0
        while i >= start + size:
            start += stride
        context = prefix + ids[start:i]
        if context:
            losses.append(_nll(model, context, ids[i]))
    return losses


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [None, 1, 3, 7])
@pytest.mark.parametrize("num_tokens", [8, 24, 29])
def test_equals_a_loop_over_tokens(tiny_llama, num_tokens, stride, bos):
    model, _ = tiny_llama
    ids = _ids(num_tokens)
    result = perplexity(model, ids, **{**OPTIONS, "stride": stride, "bos_token_id": BOS if bos else None})
    if stride is None:
        losses = _non_overlapping(model, ids.tolist(), 8, bos)
    else:
        losses = _sliding(model, ids.tolist(), 8, stride, bos)
    assert result["num_tokens"] == len(losses)
    assert result["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result["window"], result["stride"], result["bos"]) == (8, stride, bos)


def test_tail_is_left_out_only_without_a_stride(tiny_llama):
    model, _ = tiny_llama
    whole = perplexity(model, _ids(29), **OPTIONS)
    assert (whole["num_windows"], whole["num_tokens"], whole["num_dropped"]) == (3, 21, 5)
    assert whole["nll"] == perplexity(model, _ids(29)[:24], **OPTIONS)["nll"]
    sliding = perplexity(model, _ids(29), **{**OPTIONS, "stride": 4})
    assert (sliding["num_windows"], sliding["num_tokens"], sliding["num_dropped"]) == (7, 28, 0)


def test_max_tokens_takes_the_first_ones(tiny_llama):
    model, _ = tiny_llama
    cut = perplexity(model, _ids(64), **{**OPTIONS, "max_tokens": 17})
    assert cut["nll"] == perplexity(model, _ids(64)[:17], **OPTIONS)["nll"]
    assert (cut["num_windows"], cut["num_dropped"], cut["max_tokens"]) == (2, 1, 17)


def test_losses_in_pieces_equal_losses_at_once(tiny_llama, monkeypatch):
    model, _ = tiny_llama
    at_once = perplexity(model, _ids(40), **OPTIONS)["nll"]
    monkeypatch.setattr(module, "MAX_ELEMENTS", 3 * model.config.vocab_size)
    assert perplexity(model, _ids(40), **OPTIONS)["nll"] == pytest.approx(at_once, rel=1e-6)


def test_numpy_ids_and_half_precision_weights(tiny_llama):
    model, _ = tiny_llama
    reference = perplexity(model, _ids(32), **OPTIONS)["nll"]
    model.train()
    assert perplexity(model, _ids(32).numpy(), **OPTIONS)["nll"] == reference
    assert not model.training
    assert perplexity(model.bfloat16(), _ids(32), **OPTIONS)["nll"] == pytest.approx(reference, rel=1e-2)


def test_loss_that_is_not_finite_is_refused(tiny_llama):
    model, _ = tiny_llama
    with torch.no_grad():
        model.lm_head.weight[5].fill_(torch.inf)
    with pytest.raises(UserError, match="text: the loss is nan in the window at token 0"):
        perplexity(model, _ids(32), **OPTIONS)


def test_perplexity_that_is_no_float_is_refused(tiny_llama):
    model, _ = tiny_llama
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(UserError, match="nats a token, its exponential is not a finite number"):
        perplexity(model, _ids(32), **OPTIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 64}, "text: 32 tokens are less than one window; evaluation.perplexity.window=64"),
        ({"max_tokens": 7}, "max_tokens=7 is less than one window"),
        ({"stride": 8}, r"stride=8 must be in 1\.\.7, or null"),
    ],
)
def test_unusable_settings_are_user_errors(tiny_llama, settings, message):
    with pytest.raises(UserError, match=message):
        perplexity(tiny_llama[0], _ids(32), **{**OPTIONS, **settings})


def test_text_file_is_tokenised_as_it_is(tiny_llama, tmp_path):
    _, tokenizer = tiny_llama
    (tmp_path / "text.txt").write_bytes("one\r\ntwo \u00e9\n\n".encode())
    ids, about = corpus_tokens(tokenizer, "text.txt", window=8, data_dir=tmp_path)
    assert ids.tolist() == tokenizer("one\r\ntwo \u00e9\n\n", add_special_tokens=False)["input_ids"]
    assert ids.dtype == torch.int64
    assert (about["source"], about["split"]) == (None, "file")
    before = corpus_fingerprint("text.txt", tmp_path)
    (tmp_path / "text.txt").write_bytes(b"one\n")
    assert corpus_fingerprint("text.txt", tmp_path) != before


def test_bundled_text_is_coqa_joined_by_blank_lines(tiny_llama, monkeypatch):
    _, tokenizer = tiny_llama
    monkeypatch.setattr("slm_pipeline.assets.texts.bundled_texts", lambda name: {"coqa": ["A b.", "C d."]}[name])
    ids, about = corpus_tokens(tokenizer, "bundled", window=8)
    assert tokenizer.decode(ids) == "A b.\n\nC d."
    assert (about["source"], about["split"]) == ("coqa", "validation")


@pytest.mark.parametrize("corpus", HUB_CORPORA)
def test_hub_corpora_are_joined_and_cut_as_papers_do(tiny_llama, tmp_path, monkeypatch, corpus):
    _, tokenizer = tiny_llama
    hub = HUB_CORPORA[corpus]
    file = tmp_path / hub.repo / hub.files.replace("*", "0000")  # a folder in the hub's layout
    file.parent.mkdir(parents=True)
    rows = [{hub.column: f"row {i}"} for i in range(1200)]
    if file.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        import gzip

        with gzip.open(file, "wt") as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ids, about = corpus_tokens(tokenizer, corpus, window=16)
    separator, num_rows = {"wikitext2": ("\n\n", 1200), "c4": (" ", 1100), "ptb": (" ", 1200)}[corpus]
    text = separator.join(f"row {i}" for i in range(num_rows))
    if corpus == "c4":
        assert ids.tolist() == tokenizer(text)["input_ids"][: 256 * 16]
    else:
        assert ids.tolist() == tokenizer(text)["input_ids"]
    assert (about["join"], about["source"]) == (separator, hub.repo)


def test_unusable_corpus_is_a_user_error(tiny_llama, tmp_path):
    _, tokenizer = tiny_llama
    with pytest.raises(UserError, match="'nothing.txt' is not a file .* not one of bundled, wikitext2, c4, ptb"):
        corpus_fingerprint("nothing.txt", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        corpus_tokens(tokenizer, "latin.txt", window=8, data_dir=tmp_path)


@pytest.mark.parametrize("stride", [None, 3])
def test_two_processes_share_the_batches_and_find_what_one_does(tiny_llama, stride, monkeypatch):
    model, _ = tiny_llama
    ids, options = _ids(59), {**OPTIONS, "stride": stride}
    expected, plain, scored = perplexity(model, ids, **options), module._losses, {0: 0, 1: 0}

    def counting(model, rows):
        scored[ranks.rank()] += len(rows)
        return plain(model, rows)

    monkeypatch.setattr(module, "_losses", counting)
    assert of_both(monkeypatch, lambda: perplexity(model, ids, **options)) == [expected, expected]  # to the last bit
    assert sum(scored.values()) == expected["num_windows"]
    assert min(scored.values()) >= 3  # a batch
    bad = ids.clone()
    bad[50] = 299  # in the second process's part
    with torch.no_grad():
        model.get_input_embeddings().weight[299] = math.nan
    words = ["the loss is nan in the window at token 4"] * 2
    assert [
        str(error).partition(": ")[2][: len(words[0])]
        for error in of_both(monkeypatch, lambda: perplexity(model, bad, **options))
    ] == words
