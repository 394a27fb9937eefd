"""Calibration samples against cuts made by hand, for every source."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from slm_pipeline.assets import texts
from slm_pipeline.config import CalibrationConfig
from slm_pipeline.data.calibration import HUB_SETS, Calibration
from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import byte_tokenizer

TEXT = "The river runs\r\npast the mill.\n\n  Nothing\tis lost,\u00e9\u4e16 not even\nthe ends of lines.\n" * 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return str(tmp_path / "text.txt")


def options(source: str = "text_file", **given: object) -> CalibrationConfig:
    return CalibrationConfig(source=source, **{"num_samples": 3, "seq_len": 20, **given})


def decoded(tokenizer, input_ids) -> str:
    return tokenizer.decode(input_ids.flatten(), skip_special_tokens=False)


def test_contiguous_is_the_file_cut_in_order_newlines_kept(text_file):
    """The byte tokenizer gives the bytes of the file, line ends and all."""
    found = Calibration(options(path=text_file, sampling="contiguous"), None).sample(byte_tokenizer())
    content = Path(text_file).read_bytes()
    vocabulary = byte_tokenizer().get_vocab()
    letters = byte_tokenizer().tokenize(TEXT)
    assert len(letters) == len(content)
    expected = [vocabulary[letter] for letter in letters[:60]]
    assert found.input_ids.dtype == torch.int64
    assert found.input_ids.tolist() == [expected[:20], expected[20:40], expected[40:60]]
    assert decoded(byte_tokenizer(), found.input_ids) == content[:60].decode()
    assert found.ids == [{"start": 0}, {"start": 20}, {"start": 40}]
    assert found.mode == "contiguous"


@pytest.mark.parametrize("sampling", ["contiguous", "random"])
def test_with_bos_each_sample_begins_with_it_and_is_as_long(text_file, sampling):
    """19 tokens of the text in each; what samples are without it is not touched."""
    tokenizer = byte_tokenizer()
    asked = options(path=text_file, sampling=sampling, bos=True)
    found = Calibration(asked, None).sample(tokenizer)
    without = Calibration(options(path=text_file, sampling=sampling, seq_len=19), None).sample(tokenizer)
    assert found.input_ids[:, 0].tolist() == 3 * [tokenizer.bos_token_id]
    assert torch.equal(found.input_ids[:, 1:], without.input_ids)
    assert (found.ids, found.mode) == (without.ids, without.mode)
    assert found.fingerprint != without.fingerprint
    identity = Calibration(asked, None).identity()
    assert identity == {**Calibration(options(path=text_file, sampling=sampling), None).identity(), "bos": True}
    with pytest.raises(UserError, match="calibration.seq_len=1 leaves no token of the text after BOS"):
        Calibration(options(path=text_file, seq_len=1, bos=True), None).sample(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="calibration.bos=true: the model's tokenizer has no BOS token"):
        Calibration(asked, None).sample(tokenizer)


def test_contiguous_takes_the_whole_text_if_it_just_fits(text_file):
    size = len(TEXT.encode())
    whole = options(path=text_file, sampling="contiguous", num_samples=1, seq_len=size)
    found = Calibration(whole, None).sample(byte_tokenizer())
    assert decoded(byte_tokenizer(), found.input_ids) == TEXT
    with pytest.raises(UserError, match=f"has {size} tokens; .* needs {size + 1}"):
        Calibration(dataclasses.replace(whole, seq_len=size + 1), None).sample(byte_tokenizer())


def test_random_of_one_long_text_starts_anywhere_and_repeats_by_seed(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(2000))
    (tmp_path / "long.txt").write_text(text)
    given = {"path": "long.txt", "num_samples": 80, "seq_len": 25}
    tokenizer = byte_tokenizer()
    found = Calibration(options(**given, seed=1), tmp_path).sample(tokenizer)
    starts = [row["start"] for row in found.ids]
    for row, start in zip(found.input_ids, starts, strict=True):
        assert decoded(tokenizer, row) == text[start : start + 25]
    assert min(starts) < 1976 / 10
    assert max(starts) > 1976 * 9 / 10
    assert len({start % 25 for start in starts}) > 15  # not on a grid
    assert all(0 <= start <= 1975 for start in starts)
    assert (found.mode, found.input_ids.shape) == ("long_text", (80, 25))
    again = Calibration(options(**given, seed=1), tmp_path).sample(tokenizer)
    assert torch.equal(again.input_ids, found.input_ids)
    assert again.fingerprint == found.fingerprint
    other = Calibration(options(**given, seed=2), tmp_path).sample(tokenizer)
    assert other.ids != found.ids
    assert other.fingerprint != found.fingerprint


def test_random_of_a_very_long_text_reads_only_what_is_near_the_samples(tmp_path, monkeypatch, caplog):
    text = "".join(f"{number:06d}" for number in range(100_000))  # one word
    (tmp_path / "long.txt").write_text(text)
    config = options(path="long.txt", num_samples=40, seq_len=25, seed=1)
    key = Calibration(config, tmp_path).identity()
    monkeypatch.setattr("slm_pipeline.data.calibration.LONGEST", len(text) - 1)
    tokenizer = byte_tokenizer()
    given = []
    monkeypatch.setattr(
        "slm_pipeline.data.tokens.tokenized",
        lambda tokenizer, text, special: (
            given.append(len(text)) or tokenizer(text, add_special_tokens=special)["input_ids"]
        ),
    )
    with caplog.at_level("INFO"):
        found = Calibration(config, tmp_path).sample(tokenizer)
    assert "the text has 1 million characters: samples start at characters of it" in caplog.text
    assert sum(given) < len(text)
    starts = [place["character"] for place in found.ids]
    for row, start in zip(found.input_ids, starts, strict=True):
        assert decoded(tokenizer, row) == text[start : start + 25]
    assert min(starts) < len(text) / 10
    assert max(starts) > len(text) * 9 / 10
    assert Calibration(config, tmp_path).sample(tokenizer).fingerprint == found.fingerprint
    assert Calibration(config, tmp_path).identity() != key  # a stored result is not taken for the other kind
    many = options(path="long.txt", num_samples=500, seq_len=25, seed=1)
    # Here reading near each would read more than the whole.
    assert "start" in Calibration(many, tmp_path).sample(tokenizer).ids[0]


def test_random_needs_as_much_text_as_contiguous(text_file):
    config = options(path=text_file, num_samples=100, seq_len=50)
    with pytest.raises(UserError, match=r"calibration.num_samples=100 x calibration.seq_len=50 needs 5000"):
        Calibration(config, None).sample(byte_tokenizer())
    with pytest.raises(
        UserError, match="bytes; calibration.num_samples=100 x calibration.seq_len=50 needs 5000 tokens"
    ):
        Calibration(config, None).identity()


def test_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UserError, match=r"calibration.path='latin.txt': .*latin.txt is not UTF-8 text"):
        Calibration(options(path="latin.txt"), tmp_path).sample(byte_tokenizer())


ROWS = ["a" * 19, "b" * 20, "c" * 21, "d" * 60, "", "e" * 45, "f" * 5, "g" * 33]


def write_rows(folder: Path, name: str, rows: list[str]) -> None:
    """A data set in the layout that it has on the hub."""
    pattern = HUB_SETS[name].files.replace("*", "00000-of-00001")
    file = folder / pattern
    file.parent.mkdir(parents=True)
    if file.suffix == ".gz":
        with gzip.open(file, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)


@pytest.mark.parametrize("name", HUB_SETS)
def test_documents_of_every_set_in_the_hubs_layout(name, tmp_path):
    write_rows(tmp_path / "set", name, ROWS)
    tokenizer = byte_tokenizer()
    config = options(name, path="set", num_samples=5)
    assert Calibration(config, tmp_path).identity()["text"].startswith("folder:")
    found = Calibration(config, tmp_path).sample(tokenizer)
    assert found.mode == "documents"
    assert sorted(row["row"] for row in found.ids) == [1, 2, 3, 5, 7]  # at least 20 tokens, each once
    for tokens, place in zip(found.input_ids, found.ids, strict=True):
        row = tokenizer(ROWS[place["row"]])["input_ids"]
        assert tokens.tolist() == row[place["start"] : place["start"] + 20]
        assert len(tokens) == 20
    assert Calibration(config, tmp_path).sample(tokenizer).ids == found.ids
    with pytest.raises(UserError, match="only 5 of 8 rows have calibration.seq_len=20 tokens, .*num_samples=6"):
        Calibration(options(name, path="set", num_samples=6), tmp_path).sample(tokenizer)


def test_documents_differ_with_the_seed_and_slices_move(tmp_path):
    write_rows(tmp_path / "set", "c4", ["".join(chr(97 + (i + j) % 26) for j in range(200)) for i in range(50)])
    found = [
        Calibration(options("c4", path="set", num_samples=8, seed=seed), tmp_path).sample(byte_tokenizer())
        for seed in (1, 2)
    ]
    assert {row["row"] for row in found[0].ids} != {row["row"] for row in found[1].ids}
    assert len({row["start"] for result in found for row in result.ids}) > 8


def test_special_tokens_are_there_only_in_a_slice_from_the_start(tmp_path):
    """Rows are tokenised with special tokens, then cut: a row of 19 letters with BOS has the 20 tokens it needs."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    write_rows(tmp_path / "set", "c4", ROWS)
    found = Calibration(options("c4", path="set", num_samples=6), tmp_path).sample(tokenizer)
    assert sorted(row["row"] for row in found.ids) == [0, 1, 2, 3, 5, 7]
    for tokens, place in zip(found.input_ids.tolist(), found.ids, strict=True):
        assert (257 in tokens) == (place["start"] == 0)


def test_contiguous_of_a_data_set_joins_its_rows(tmp_path):
    write_rows(tmp_path / "set", "wikitext2", ROWS)
    found = Calibration(options("wikitext2", path="set", sampling="contiguous"), tmp_path).sample(byte_tokenizer())
    assert decoded(byte_tokenizer(), found.input_ids) == "\n\n".join(ROWS)[:60]


def test_folder_without_the_hubs_files(tmp_path):
    with pytest.raises(UserError, match=r"calibration.path='.' has no file plain_text/train-\*.parquet"):
        Calibration(options("bookcorpus", path="."), tmp_path).identity()


def test_folder_that_changes_is_another_text(tmp_path):
    write_rows(tmp_path / "set", "c4", ROWS)
    before = Calibration(options("c4", path="set"), tmp_path).identity()
    (tmp_path / "set").rename(tmp_path / "first")
    write_rows(tmp_path / "set", "c4", [*ROWS, "another"])
    assert Calibration(options("c4", path="set"), tmp_path).identity() != before


def test_bundled_passages(monkeypatch):
    monkeypatch.setattr(texts, "bundled_texts", lambda name: {"lambada": ROWS}[name])
    found = Calibration(options("bundled", num_samples=5), None).sample(byte_tokenizer())
    assert (found.mode, sorted(row["row"] for row in found.ids)) == ("documents", [1, 2, 3, 5, 7])


def test_bundled_passages_that_are_too_short_become_one_long_text(monkeypatch, caplog):
    monkeypatch.setattr(texts, "bundled_texts", lambda name: ROWS)
    with caplog.at_level("INFO"):
        found = Calibration(options("bundled", num_samples=3, seq_len=61), None).sample(byte_tokenizer())
    assert "joined to one long text" in caplog.text
    assert found.mode == "long_text"
    joined = "\n".join(ROWS)
    for tokens, place in zip(found.input_ids, found.ids, strict=True):
        assert decoded(byte_tokenizer(), tokens) == joined[place["start"] : place["start"] + 61]
    with pytest.raises(UserError, match="the calibration text has 210 tokens"):
        Calibration(options("bundled", num_samples=3, seq_len=71), None).sample(byte_tokenizer())


def test_identity_holds_what_the_samples_depend_on(text_file, tmp_path):
    base = Calibration(options(path=text_file), None).identity()
    for changed in ({"num_samples": 4}, {"seq_len": 21}, {"seed": 5}, {"sampling": "contiguous"}):
        assert Calibration(options(path=text_file, **changed), None).identity() != base
    contiguous = [
        Calibration(options(path=text_file, sampling="contiguous", seed=seed), None).identity() for seed in (1, 2)
    ]
    assert contiguous[0] == contiguous[1]  # no seed in it
    (tmp_path / "copy.txt").write_bytes(Path(text_file).read_bytes())
    assert Calibration(options(path="copy.txt"), tmp_path).identity() == base
    (tmp_path / "copy.txt").write_bytes(Path(text_file).read_bytes() + b"x")
    assert Calibration(options(path="copy.txt"), tmp_path).identity() != base


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "web"}, "calibration.source='web' is not one of bundled, text_file, bookcorpus, c4"),
        ({"sampling": "all"}, "calibration.sampling='all' is not one of random, contiguous"),
        ({"num_samples": 10**9, "seq_len": 2**20}, "this machine has .* GB: num_samples=.* of this length fit"),
        ({}, "needs calibration.path=FILE"),
        ({"path": "nowhere.txt"}, "calibration.path='nowhere.txt' does not exist in data_dir="),
        ({"path": "."}, "calibration.path='.': .* is a folder, not a file"),
        ({"source": "c4", "path": "nowhere"}, "calibration.path='nowhere' does not exist"),
    ],
)
def test_unusable_options(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Calibration(options(**given), tmp_path).identity()
