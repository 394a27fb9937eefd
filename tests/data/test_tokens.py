"""Examples as rows of tokens: masks by hand."""

from __future__ import annotations

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from slm_pipeline.data import tokens
from slm_pipeline.errors import UserError

EXAMPLE = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]


def byte_tokenizer(merges=(), *, bos_first=False):
    """One token per byte, then <s> (256) and </s> (257); ``merges`` join two characters into one more token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate([*alphabet, "<s>", "</s>"])}
    for first, second in merges:
        vocab[first + second] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_the_alpaca_prompts():
    assert tokens.prompt(EXAMPLE) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n"
    )
    assert tokens.prompt({**EXAMPLE, "input": ""}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


def test_only_the_output_and_eos_bear_loss():
    tokenizer = byte_tokenizer()
    num_prompt = len(tokens.prompt(EXAMPLE))
    (row,) = tokens.tokenize_example(tokenizer, EXAMPLE, cutoff_len=512)
    assert row["labels"] == [-100] * num_prompt + [tokenizer.convert_tokens_to_ids("2"), 257]
    assert tokenizer.decode(row["input_ids"]) == tokens.prompt(EXAMPLE) + "2</s>"
    assert row["attention_mask"] == [1] * (num_prompt + 2)


def test_bos_only_where_the_tokenizer_puts_it():
    (plain,) = tokens.tokenize_example(byte_tokenizer(), EXAMPLE, 512)
    (with_bos,) = tokens.tokenize_example(byte_tokenizer(bos_first=True), EXAMPLE, 512)
    assert with_bos["input_ids"] == [256, *plain["input_ids"]]
    assert with_bos["labels"] == [-100, *plain["labels"]]


def test_no_token_straddles_the_boundary():
    tokenizer = byte_tokenizer(merges=[("\u010a", "2")])  # the byte-level sign for a newline
    assert len(tokenizer("\n2")["input_ids"]) == 1
    row = tokens.tokenize_example(tokenizer, EXAMPLE, 512)
    assert row == tokens.tokenize_example(byte_tokenizer(), EXAMPLE, 512)


def test_the_cut_off_takes_eos_first_then_the_output():
    tokenizer, num_prompt = byte_tokenizer(), len(tokens.prompt(EXAMPLE))
    example = {**EXAMPLE, "output": "abc"}
    abc = tokenizer("abc")["input_ids"]
    for cutoff_len, kept in ((num_prompt + 4, [*abc, 257]), (num_prompt + 3, abc), (num_prompt + 1, abc[:1])):
        (row,) = tokens.tokenize_example(tokenizer, example, cutoff_len)
        assert row["labels"][num_prompt:] == kept
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"]) == cutoff_len


def test_an_example_without_labels_is_dropped(caplog):
    tokenizer, num_prompt = byte_tokenizer(), len(tokens.prompt(EXAMPLE))
    long = {**EXAMPLE, "instruction": "Add up."}
    with caplog.at_level(logging.WARNING):
        rows = tokens.tokenize_examples(tokenizer, [EXAMPLE, long], cutoff_len=num_prompt + 2)
    assert rows == tokens.tokenize_example(tokenizer, EXAMPLE, num_prompt + 2)
    assert "1 of 2 examples dropped" in caplog.text
    with pytest.raises(UserError, match="cutoff_len=20 leaves no output in any of the 2"):
        tokens.tokenize_examples(tokenizer, [EXAMPLE, long], cutoff_len=20)


def test_the_prompt_bears_loss_too_but_not_its_first_token():
    for tokenizer in (byte_tokenizer(), byte_tokenizer(bos_first=True)):
        (row,) = tokens.tokenize_example(tokenizer, EXAMPLE, 512, completion_only=False)
        (masked,) = tokens.tokenize_example(tokenizer, EXAMPLE, 512)
        assert row["input_ids"] == masked["input_ids"]
        assert row["labels"] == [-100, *row["input_ids"][1:]]


# The form of ChatML. REWRITING drops what the assistant said in all turns but the last, as reasoning models' do.
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWRITING = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last or message.role == 'user' %}{{ message.content }}{% else %}...{% endif %}",
)


def chat_tokenizer(template=CHATML, **options):
    tokenizer = byte_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


def said(tokenizer, row):
    """The text that bears loss, with a bar where something between does not."""
    runs = itertools.groupby(row["labels"], lambda label: label == -100)
    return "|".join(tokenizer.decode(list(labels)) for masked, labels in runs if not masked)


TWO_TURNS = [*CHAT, {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "5"}]


def test_only_the_assistant_bears_loss():
    tokenizer = chat_tokenizer(bos_first=True)  # the template writes no BOS, so there is none
    text = "<|system|>Be brief.\n<|user|>1 + 1?\n<|assistant|>2\n<|user|>And 3?\n<|assistant|>5\n"
    (row,) = tokens.tokenize_example(tokenizer, {"messages": TWO_TURNS}, 512)
    assert tokenizer.decode(row["input_ids"]) == text
    assert said(tokenizer, row) == "2\n|5\n"
    start = text.index("2\n")
    assert row["labels"][: start + 2] == [-100] * start + row["input_ids"][start : start + 2]
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"]) == len(text)
    (row,) = tokens.tokenize_example(tokenizer, {"messages": TWO_TURNS}, 512, completion_only=False)
    assert said(tokenizer, row) == text[1:]
    (row,) = tokens.tokenize_example(tokenizer, {"messages": TWO_TURNS}, start + 1)
    assert said(tokenizer, row) == "2"
    assert tokens.tokenize_example(tokenizer, {"messages": TWO_TURNS}, start) == []


def test_turns_that_answer_nothing_bear_no_loss():
    tokenizer = chat_tokenizer()
    greeting, question, answer = ({"role": role, "content": role[0]} for role in ("assistant", "user", "assistant"))
    (row,) = tokens.tokenize_example(tokenizer, {"messages": [greeting, question, answer, question]}, 512)
    assert tokenizer.decode(row["input_ids"]) == "<|assistant|>a\n<|user|>u\n<|assistant|>a\n<|user|>u\n"
    assert said(tokenizer, row) == "a\n"
    assert tokens.tokenize_example(tokenizer, {"messages": [greeting, question]}, 512) == []


def test_no_token_straddles_the_turns():
    merged = chat_tokenizer(merges=[(">", "2"), ("5", "\u010a")])
    assert len(merged(">2")["input_ids"]) == 1
    (row,) = tokens.tokenize_example(merged, {"messages": TWO_TURNS}, 512)
    assert said(merged, row) == "2\n|5\n"
    assert len(row["input_ids"]) == len(merged.decode(row["input_ids"])) - 1  # "5\n" is one token, within its turn


def test_templates_that_cannot_be_used():
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        tokens.tokenize_example(byte_tokenizer(), {"messages": CHAT}, 512)
    rewriting = chat_tokenizer(REWRITING)
    assert len(tokens.tokenize_example(rewriting, {"messages": CHAT}, 512)) == 1
    with pytest.raises(UserError, match="rewrites earlier turns .* recovery.completion_only=false"):
        tokens.tokenize_example(rewriting, {"messages": TWO_TURNS}, 512)
    (row,) = tokens.tokenize_example(rewriting, {"messages": TWO_TURNS}, 512, completion_only=False)
    assert rewriting.decode(row["input_ids"]).count("...") == 2
    second = [{"messages": CHAT}, {"messages": TWO_TURNS}]
    with pytest.raises(UserError, match="rewrites earlier turns"):
        tokens.check_tokens(rewriting, second, 512)
    tokens.check_tokens(rewriting, second, 512, completion_only=False)
    refusing = chat_tokenizer("{{ raise_exception('no system turn, please') }}")
    with pytest.raises(UserError, match="refuses a chat of system, user, assistant: no system turn, please"):
        tokens.tokenize_example(refusing, {"messages": CHAT}, 512)


def test_a_text_is_cut_into_pieces_and_nothing_is_lost():
    tokenizer = byte_tokenizer(bos_first=True)
    a, b, c, d, e = tokenizer("abcde", add_special_tokens=False)["input_ids"]
    for completion_only in (True, False):
        rows = tokens.tokenize_example(tokenizer, {"text": "abcde"}, 4, completion_only=completion_only)
        assert [row["input_ids"] for row in rows] == [[256, a, b, c], [d, e, 257]]
        assert [row["labels"] for row in rows] == [[-100, a, b, c], [-100, e, 257]]
        assert [row["attention_mask"] for row in rows] == [[1, 1, 1, 1], [1, 1, 1]]
    rows = tokens.tokenize_example(tokenizer, {"text": "abcde"}, 3)  # seven tokens: EOS would be alone
    assert [row["input_ids"] for row in rows] == [[256, a, b], [c, d, e]]
    assert [len(row["input_ids"]) for row in tokens.tokenize_example(byte_tokenizer(), {"text": "abcde"}, 9)] == [6]


def test_kinds_may_be_mixed(caplog):
    tokenizer = chat_tokenizer()
    mixed = [{"messages": CHAT}, {"text": "a" * 300}, {**EXAMPLE, "instruction": "b" * 300}, EXAMPLE]
    rows = tokens.tokenize_examples(tokenizer, mixed, 260, completion_only=True)
    assert [len(row["input_ids"]) for row in rows] == [50, 260, 41, len(tokens.prompt(EXAMPLE)) + 2]
    assert "1 of 4 examples dropped: no output within cutoff_len=260" in caplog.text


WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "1999",
    "mill.",
    "Nothing",
    "caf\u00e9",
    "\u4e16\u754c",
    "a",
    "...",
    "--",
    "don't",
]
PARTS = [*WORDS, " ", " ", " ", "  ", "\n", ".\n\n", "\t", "<s>", "    ", "\U0001f600"]


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `WORDS`: as GPT-2's or Llama 3's (words apart), as Llama 2's (one space before every
    text, words not apart), or one whose tokens reach over the spaces between words."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama2"))
    text = ["the river runs past the mill. Nothing don't runs ... -- a the a 1999 caf\u00e9 \u4e16\u754c\n\n  a"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>"], show_progress=False, max_token_length=6 if kind == "across" else None,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "across":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.train_from_iterator(text, trainer)
    if kind == "llama2":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


KINDS = ["gpt2", "llama2", "across"]
TRAINED = {kind: trained(kind) for kind in KINDS}


class Counting:
    """A tokenizer that notes how many characters it is given each time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.given, self.name_or_path = tokenizer, [], "counting"

    def __call__(self, text, **options):
        self.given.append(len(text))
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=80), repeat=st.sampled_from([1, 40]), data=st.data())
def test_the_tokens_of_a_text_in_pieces_are_those_of_the_whole(kind, parts, repeat, data):
    text = "".join(parts) * repeat
    whole = TRAINED[kind](text, add_special_tokens=False)["input_ids"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", data.draw(st.integers(1, 500)))
        assert tokens.text_tokens(TRAINED[kind], text) == whole
    needed = data.draw(st.integers(1, 50))
    assert tokens.text_tokens(TRAINED[kind], text, needed) == whole[:needed]


def test_a_line_of_megabytes_is_cut_between_words_before_it_is_tokenized():
    text = "the river runs past the mill. 1999 " * 90_000  # 3 MB without an end of a line
    tokenizer = Counting(TRAINED["gpt2"])
    ids = tokens.text_tokens(tokenizer, text, 100)
    assert len(ids) == 100
    assert sum(tokenizer.given) < 10_000
    tokenizer.given.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", 5000)
        assert tokens.text_tokens(tokenizer, text[:50_000])[:100] == ids
    assert 5000 <= max(tokenizer.given) < 5100


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_of_megabytes_is_read_as_far_as_it_is_needed(kind):
    text = "riverrunspastthemill1999" * 100_000
    tokenizer = Counting(TRAINED[kind])
    ids = tokens.text_tokens(tokenizer, text, 100)
    assert ids == TRAINED[kind](text[:50_000], add_special_tokens=False)["input_ids"][:100]
    assert sum(tokenizer.given) < 25_000
    hidden = " " * 60_000 + "the river"  # more blanks in a token than are looked at first
    assert tokens.text_tokens(tokenizer, hidden, 10**4) == _all_of(kind, hidden)[: 10**4]


def _all_of(kind, text):
    return TRAINED[kind](text, add_special_tokens=False)["input_ids"]


def test_tokenizing_that_takes_long_is_announced(monkeypatch, caplog):
    monkeypatch.setattr(tokens, "_LONG", 3000)
    with caplog.at_level("INFO"):
        tokens.text_tokens(TRAINED["gpt2"], "the river " * 299)
        assert not caplog.text
        tokens.text_tokens(TRAINED["gpt2"], "the river " * 400)
    assert "tokenizing 0 million characters, which may take minutes" in caplog.text


def test_a_tokenizer_that_puts_a_space_before_every_text_gets_the_whole():
    text = "the river runs past the mill. 1999 " * 200
    tokenizer = Counting(TRAINED["llama2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", 1000)
        tokens.text_tokens(tokenizer, text)
    assert tokenizer.given[-1] == len(text)
    tokenizer.given.clear()
    tokens.text_tokens(tokenizer, text, 10)  # but its first tokens are those of a part
    assert max(tokenizer.given) < 5000


def test_an_example_of_megabytes_is_read_as_far_as_it_is_used():
    text = "the river runs past the mill. 1999 " * 90_000
    answer = {"instruction": "Write.", "input": "", "output": text}
    tokenizer = TRAINED["gpt2"]
    begun = {**answer, "output": text[:9000]}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        ids = tokens.tokenized
        patch.setattr(tokens, "tokenized", lambda of, text, **how: seen.append(len(text)) or ids(of, text, **how))
        assert tokens.tokenize_example(tokenizer, answer, 64) == tokens.tokenize_example(tokenizer, begun, 64)
        tokens.check_tokens(tokenizer, [{"text": text}], 64)
    assert max(seen) < 10_000


def test_what_the_library_says_against_a_text_is_one_line_with_the_folder():
    """A vocabulary of one word and none for the others."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, name_or_path="/data/model")
    assert tokens.tokenized(tokenizer, "a", special=False) == [0]
    with pytest.raises(UserError, match=r"^the tokenizer /data/model fails: \w+: .*Missing \[UNK\] token"):
        tokens.text_tokens(tokenizer, "b")
    tokenizer.model_max_length = "x"
    with pytest.raises(UserError, match="^the tokenizer /data/model fails: TypeError: "):
        tokens.text_tokens(tokenizer, "a")
    tokenizer.chat_template = "{{ 1 + 'a' }}"
    with pytest.raises(UserError, match="^the tokenizer /data/model fails at a chat: TypeError: "):
        tokens.tokenize_example(tokenizer, {"messages": [{"role": "user", "content": "a"}]}, 8)
