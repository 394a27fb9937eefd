"""llama.cpp cuts texts into the tokens that transformers cuts them into."""

from __future__ import annotations

import pytest
import torch
from run_llama_cpp import LlamaCpp, make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from slm_pipeline.errors import UserError
from slm_pipeline.export import gguf_file, vocabulary
from slm_pipeline.models.loading import byte_tokenizer

TEXT = " It's 12345 naïve:\n\n  x  <mine>they'LL  go\t😀 on<end> it."
LEARNT = ["It's the mill, it's 12345 and 345; they'll go on and on.\n\n  The naïve one, x  x"] * 3
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ADDED = [AddedToken("<mine>", normalized=False), AddedToken("<end>", special=True)]


def split(pattern: str):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [split(QWEN), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "llama-bpe": [
        split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def byte_level(name: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[name])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LEARNT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(ADDED)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentencepiece_like(*, space_first: bool) -> PreTrainedTokenizerFast:
    """As of Llama 2, or of Gemma: blanks are letters, what is unknown falls back to bytes, every text has a BOS."""
    coded = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: row for row, token in enumerate(["<unk>", "<bos>", "<end>", *coded])}
    merges = []
    joined = [
        "it",
        "▁it",
        "th",
        "▁x",
        "ey",
        "they",
        "▁▁",
        "ll",
        "▁it'",
        "▁it's",
        "on",
        "go",
        "▁go",
        "▁t",
        "▁th",
        "12",
        "345",
    ]
    for token in sorted({letter for word in (*joined, *"12345xIts':.▁LLna\n") for letter in word}):
        vocab.setdefault(token, len(vocab))
    for word in joined:
        vocab.setdefault(word, len(vocab))
    for word in joined:  # every way to make it of two that there are
        merges += [(word[:cut], word[cut:]) for cut in range(1, len(word)) if {word[:cut], word[cut:]} <= vocab.keys()]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if space_first else steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<unk>", "<bos>")] + ADDED)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>", unk_token="<unk>")


@pytest.mark.parametrize("name", [*CUTS, "llama 2", "gemma"])
@torch.no_grad()
def test_a_text_becomes_the_same_tokens(name, tmp_path):
    """What a model says after the text tells which tokens it saw."""
    tokenizer = byte_level(name) if name in CUTS else sentencepiece_like(space_first=name == "llama 2")
    model = make_model("llama", vocab_size=360)
    gguf_file.write(model, tokenizer, tmp_path / "x.gguf", "f16")
    ids = tokenizer(TEXT)["input_ids"]
    assert len({*ids}) > 15
    expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = LlamaCpp(tmp_path / "x.gguf")
    torch.testing.assert_close(found.log_probs(TEXT, 360), found.log_probs(ids, 360), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.log_probs(TEXT, 360), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", CUTS)
def test_the_first_cut_is_known_by_its_name(name):
    assert vocabulary.read(byte_level(name), 360).pre == name


def test_rows_beyond_the_tokenizer_are_unused():
    read = vocabulary.read(byte_tokenizer(), 300)
    assert read.tokens[256:260] == ["<pad>", "<bos>", "<eos>", "[PAD259]"]
    assert read.kinds[255:260] == [1, 3, 3, 3, 5]
    assert read.special == {"bos": 257, "eos": 258, "padding": 256}
    assert read.adds == {"bos": False, "eos": False}


def test_scores_are_the_ranks_of_the_earliest_merges():
    tokens = ["a", "b", "ab", "abb", "ba"]
    assert vocabulary._scores(tokens, ["a b", "b a", "ab b", "a bb"]) == [-1e6, -1e6, 0.0, -2.0, -1.0]


def changed(**parts) -> PreTrainedTokenizerFast:
    tokenizer = byte_level("gpt-2").backend_tokenizer
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "blank before a text"),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence([split("a+"), *CUTS["gpt-2"]])},
            r"\['a\+', 'byte-level'\], is none",
        ),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "neither byte-level nor"),
        ({"model": models.WordPiece({"a": 0}, unk_token="a")}, "a WordPiece model"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_run_is_refused(parts, words):
    with pytest.raises(UserError, match=words):
        vocabulary.read(changed(**parts), 400)


def test_a_first_cut_may_be_named():
    tokenizer = changed(pre_tokenizer=pre_tokenizers.Sequence([split("a+"), *CUTS["gpt-2"]]))
    assert vocabulary.read(tokenizer, 400, "poro-chat").pre == "poro-chat"
