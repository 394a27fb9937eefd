"""Examples: where they come from, disjoint splits, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_pipeline.assets import texts
from slm_pipeline.data import examples
from slm_pipeline.errors import UserError

EXAMPLE = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]


def load(source, **given):
    return examples.load_examples(source, **{"path": None, "repo": "", "revision": "main", "data_dir": None, **given})


def fingerprint(source, **given):
    options = {"path": None, "repo": "", "revision": "main", "data_dir": None, **given}
    return examples.examples_fingerprint(source, **options)


def numbered(count):
    return [{"instruction": "Say.", "input": "", "output": str(number)} for number in range(count)]


def test_split_is_disjoint_shuffled_and_repeatable(caplog):
    everything = numbered(20)
    train, validation = examples.split_examples(everything * 2, validation_size=5, num_examples=None, seed=42)
    outputs = [int(example["output"]) for example in train + validation]
    assert (len(train), len(validation)) == (15, 5)
    assert sorted(outputs) == list(range(20)) != outputs
    assert "20 of 40 examples dropped: they repeat" in caplog.text
    fewer, same = examples.split_examples(everything, validation_size=5, num_examples=3, seed=42)
    assert (fewer, same) == (train[:3], validation)
    assert examples.split_examples(everything, validation_size=5, num_examples=3, seed=43)[1] != validation


def test_split_of_too_few():
    with pytest.raises(UserError, match="validation_size=20 leaves nothing to train on: there are 20"):
        examples.split_examples(numbered(20), validation_size=20, num_examples=None, seed=1)
    with pytest.raises(UserError, match="num_examples=16 is more than the 15"):
        examples.split_examples(numbered(20), validation_size=5, num_examples=16, seed=1)


def test_passages_are_cut_at_a_sentence_near_the_middle_or_between_words():
    assert examples.split_passage("One two three. Four five. Six.") == ("One two three.", "Four five. Six.")
    assert examples.split_passage("Oh. one two three four") == ("Oh. one two", "three four")
    assert examples.split_passage("word") is None


def test_bundled_examples_are_the_passages(monkeypatch):
    documents = {name: [f"First of {name}. Second of {name}.", "word"] for name in examples.BUNDLED_TEXTS}
    monkeypatch.setattr(texts, "bundled_texts", documents.get)
    found = load("bundled")
    assert [example["input"] for example in found] == [f"First of {name}." for name in examples.BUNDLED_TEXTS]
    assert found[1] == {
        "instruction": "Continue the passage.",
        "input": "First of squad.",
        "output": "Second of squad.",
    }


def test_a_file_is_what_is_in_it_and_how_it_is_read(tmp_path):
    for name in ("a.json", "b.json", "a.txt"):
        (tmp_path / name).write_text(json.dumps([{"text": "One."}, {"text": "Two."}]))
    first, moved, text = (fingerprint("file", path=str(tmp_path / name)) for name in ("a.json", "b.json", "a.txt"))
    assert first == moved != text
    assert load("file", path=str(tmp_path / "a.json")) != load("file", path=str(tmp_path / "a.txt"))


def test_bundled_fingerprint_follows_every_text(monkeypatch):
    monkeypatch.setattr(texts, "texts_fingerprint", lambda name: name)
    before = fingerprint("bundled")
    monkeypatch.setattr(texts, "texts_fingerprint", lambda name: name.replace("sciq", "changed"))
    assert fingerprint("bundled") != before


@pytest.mark.parametrize("name", ["alpaca.json", "alpaca.jsonl"])
def test_files(tmp_path, monkeypatch, caplog, name):
    rows = [EXAMPLE, {"instruction": "Greet.", "output": "Hi\u2028there"}, {"instruction": "Hush.", "output": " "}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) + "\n" if name.endswith("l") else f"[{','.join(lines)}]"
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = [EXAMPLE, {"instruction": "Greet.", "input": "", "output": "Hi\u2028there"}]
    assert load("file", path=name, data_dir=tmp_path) == expected
    assert "1 of 3 examples dropped: their output, text or assistant's part is empty" in caplog.text
    monkeypatch.chdir(tmp_path)
    assert load("file", path=name) == expected
    before = fingerprint("file", path=name)
    assert fingerprint("file", path=str(tmp_path / name)) == before
    (tmp_path / name).write_text(text.replace("Greet", "Wave"), encoding="utf-8")
    assert fingerprint("file", path=name) != before


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({**EXAMPLE, "text": "all of it in one template"}, EXAMPLE),  # tatsu-lab/alpaca
        (
            {"instruction": "Add.", "context": "1 + 1", "response": "2", "category": "closed_qa"},  # databricks-dolly
            EXAMPLE,
        ),
        (
            {"instruction": "Greet.", "input": None, "output": "Hi"},
            {"instruction": "Greet.", "input": "", "output": "Hi"},
        ),
        ({"messages": CHAT, "instruction": None}, {"messages": CHAT}),
        ({"messages": [{**turn, "name": None} for turn in CHAT], "text": "a"}, {"messages": CHAT}),
        (
            {
                "id": "x",
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "1 + 1?"},
                    {"from": "gpt", "value": "2"},
                ],
            },
            {"messages": CHAT},
        ),
        ({"text": "A page.", "url": "https://"}, {"text": "A page."}),
        ("A page.", {"text": "A page."}),
    ],
)
def test_the_columns_say_which_kind_a_row_is(tmp_path, row, example):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert load("file", path="rows.json", data_dir=tmp_path) == [example]
    assert load("file", path="rows.jsonl", data_dir=tmp_path) == [example]


def test_chats_and_texts_with_nothing_to_learn_are_dropped(tmp_path, caplog):
    rows = [{"messages": CHAT[:2]}, {"messages": []}, {"messages": CHAT}, {"text": " \n"}, "", {"text": "A page."}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert load("file", path="rows.json", data_dir=tmp_path) == [{"messages": CHAT}, {"text": "A page."}]
    assert "4 of 6 examples dropped" in caplog.text


def test_a_book_is_cut_at_blank_lines(tmp_path):
    """Paragraphs of 900 characters: three reach 2000; one of 2500 does alone; what is left over is the last."""
    paragraphs = [letter * 900 for letter in "abc"] + ["d" * 2500, "e" * 10, "f" * 10]
    (tmp_path / "book.txt").write_bytes(b"\r\n" + "\r\n \r\n\r\n".join(paragraphs).encode() + b"\r\n")
    assert load("file", path="book.txt", data_dir=tmp_path) == [
        {"text": "\n\n".join(paragraphs[:3])},
        {"text": paragraphs[3]},
        {"text": "\n\n".join(paragraphs[4:])},
    ]
    assert examples.passages("a" * 1999) == ["a" * 1999]
    assert examples.passages("a" * 2000 + "\n\nb") == ["a" * 2000, "b"]


def test_a_folder_is_read_by_name_and_every_file_counts(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "b.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    (tmp_path / "mine" / "c.txt").write_text("A page.\n")
    (tmp_path / "mine" / "a.json").write_text(json.dumps([{"messages": CHAT}]))
    (tmp_path / "mine" / "notes.md").write_text("not data")
    assert load("file", path="mine", data_dir=tmp_path) == [{"messages": CHAT}, EXAMPLE, {"text": "A page."}]
    seen = {fingerprint("file", path="mine", data_dir=tmp_path)}
    for name, content in (("c.txt", "A leaf.\n"), ("a.json", "[]"), ("d.txt", "")):
        (tmp_path / "mine" / name).write_text(content)
        seen.add(fingerprint("file", path="mine", data_dir=tmp_path))
    (tmp_path / "mine" / "notes.md").unlink()
    seen.add(fingerprint("file", path="mine", data_dir=tmp_path))
    assert len(seen) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no .json, .jsonl, .txt file"):
        fingerprint("file", path="empty", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "answer": "b"},
            "row 2: expected instruction and output, or .*; its columns are prompt, answer",
        ),
        ({"messages": "a"}, "row 2: messages must be a list of {role, content}, got 'a'"),
        ({"messages": ["a"]}, "row 2: messages must be a list of"),
        ({"messages": [{"role": "human", "content": "a"}]}, "role 'human' is not one of system, user, assistant"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "row 2: messages: role 'tool' is not one of"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, r"messages: content must be a string, got \['a'\]"),
        (
            {"conversations": [{"from": "bing", "value": "a"}]},
            "conversations: from 'bing' is not one of human, gpt, system, user, assistant",
        ),
        ({"conversations": [{"role": "user", "content": "a"}]}, "conversations: from None is not one of"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages: role \['user'\] is not one of"),
        ({"messages": [{"role": "user"}]}, "messages: content must be a string, got None"),
        ({"messages": {"role": "user", "content": "a"}}, "row 2: messages must be a list of {role, content}, got {"),
        (
            {"messages": [{"role": "user", "content": "\udc00"}]},
            r"messages: content has '\\udc00' at character 0, half",
        ),
        ({"text": "ab\ud83d"}, r"row 2: text has '\\ud83d' at character 2, half of a surrogate pair"),
        ("ab\ud83d", r"row 2 has '\\ud83d' at character 2"),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "row 2: input must be a string, got nan"),
        ({"instruction": "a", "output": {"a": [1] * 99}}, r"row 2: output must be a string, got {'a': \[1, 1"),
        ({"a\nb": 1}, r"its columns are 'a\\nb'$"),
        ({}, "its columns are empty"),
        (["text"], r"row 2: expected an object or a string, got \['text'\]"),
        ({"text": 3}, "row 2: text must be a string, got 3"),
        (None, "row 2: expected an object or a string, got None"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path, row, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    (tmp_path / "mine" / "b.json").write_text(json.dumps([EXAMPLE, row]))
    with pytest.raises(UserError, match=f"mine/b.json, {message}" if "row 2" in message else message):
        fingerprint("file", path="mine", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a"}', "holds a JSON dict, not a list"),
        ("[1]", "row 1: expected an object"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "row 2: output must be a string, got None"),
        ('[{"instruction": "a", "input": 3, "output": "b"}]', "row 1: input must be a string, got 3"),
        ("[", "is not valid JSON"),
        ('[{"instruction": "a", "output": ""}]', "none of the 1 examples has an output"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load("file", path="bad.json", data_dir=tmp_path)


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    line = json.dumps(EXAMPLE)
    (tmp_path / "a.jsonl").write_text(f"\ufeff\n{line}\r\n \n\n{line}\n\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(f"\ufeff[{line}]", encoding="utf-8")
    assert load("file", path=".", data_dir=tmp_path) == [EXAMPLE] * 3
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n\n5\n")
    with pytest.raises(UserError, match="a.jsonl, line 4: expected an object or a string, got 5"):
        fingerprint("file", path="a.jsonl", data_dir=tmp_path)


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(EXAMPLE) + "\nnonsense\n")
    with pytest.raises(UserError, match="bad.jsonl, line 2 is not valid JSON: Expecting value at column 1"):
        fingerprint("file", path="bad.jsonl", data_dir=tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="there is no file .*/gone.json"):
        fingerprint("file", path="gone.json", data_dir=tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a .json, .jsonl, .txt file"):
        fingerprint("file", path="alpaca.csv", data_dir=tmp_path)
    with pytest.raises(UserError, match="needs recovery.path"):
        fingerprint("file")


def test_a_folder_in_the_hubs_layout(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "alpaca"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [EXAMPLE, {**EXAMPLE, "input": ""}]))
    assert load("hub", repo="alpaca", data_dir=tmp_path) == [EXAMPLE, {**EXAMPLE, "input": ""}]
    before = fingerprint("hub", repo="alpaca", data_dir=tmp_path)
    assert before == fingerprint("hub", repo=str(folder))
    (folder / "train.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    assert fingerprint("hub", repo="alpaca", data_dir=tmp_path) != before


def test_chats_in_the_hubs_layout(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "chats").mkdir()
    rows = [{"messages": CHAT, "text": None}, {"messages": None, "text": "A page."}]
    (tmp_path / "chats" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load("hub", repo="chats", data_dir=tmp_path) == [{"messages": CHAT}, {"text": "A page."}]


def test_an_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="recovery.repo='nobody/nothing': nobody/nothing is no local folder and cannot"):
        fingerprint("hub", repo="nobody/nothing")


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
COLUMNS = ("instruction", "input", "output", "context", "response", "text", "messages", "conversations")
TURN = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("role", "from"), st.sampled_from(["user", "assistant", "gpt", "human"]) | JSON),
        **dict.fromkeys(("content", "value"), st.text(max_size=9) | JSON),
    },
)
ROW = JSON | st.dictionaries(
    st.sampled_from(COLUMNS), st.text(max_size=9) | st.lists(TURN, max_size=3) | JSON, max_size=5
)


def examples_or_refusal(path: str, data_dir: Any) -> list[Any] | None:
    """The examples; None where they are refused, in one line."""
    message = None
    try:
        found = load("file", path=path, data_dir=data_dir)
    except UserError as error:
        message = str(error)
    assert message is None or message.isprintable()
    return None if message else found


@given(rows=st.lists(ROW, max_size=3), suffix=st.sampled_from(["json", "jsonl"]))
def test_rows_of_any_values_are_refused_or_are_examples_of_text(tmp_path_factory, rows, suffix):
    folder = tmp_path_factory.getbasetemp()
    lines = [json.dumps(row) for row in rows]
    (folder / f"any.{suffix}").write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    for example in examples_or_refusal(f"any.{suffix}", folder) or []:
        assert set(example) in ({"text"}, {"messages"}, {"instruction", "input", "output"})
        texts = list(example.values())
        if "messages" in example:
            assert {turn["role"] for turn in example["messages"]} <= {"system", "user", "assistant"}
            texts = [turn["content"] for turn in example["messages"]]
        assert "".join(texts).encode()


@given(
    places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    end=st.none() | st.integers(0, 10**6),
    suffix=st.sampled_from(["json", "jsonl", "txt"]),
)
def test_mangled_files_are_refused_or_read(tmp_path_factory, places, end, suffix):
    lines = [json.dumps(row) for row in (EXAMPLE, {"messages": CHAT}, {"text": "\u00e9 \U0001f600"}, "a")]
    content = bytearray(("[" + ",".join(lines) + "]" if suffix == "json" else "\n".join(lines)).encode())
    for place, byte in places:
        content[place % len(content)] = byte
    folder = tmp_path_factory.getbasetemp()
    (folder / f"mangled.{suffix}").write_bytes(content[: end and end % len(content)])
    examples_or_refusal(f"mangled.{suffix}", folder)
