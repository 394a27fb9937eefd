"""Data sets are known by their commit or their content, whatever became of names, sizes and time stamps."""

from __future__ import annotations

import os
from pathlib import Path

import lm_eval.tasks
import pyarrow
import pyarrow.parquet
import pytest

from slm_pipeline.config import CalibrationConfig
from slm_pipeline.data import corpora, examples, hub, tasks
from slm_pipeline.data.calibration import Calibration
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.zero_shot import TASK_FILES

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of datasets and of the hub, which cannot be reached, in an empty working directory."""
    monkeypatch.setattr("slm_pipeline.machine.network.hub_answers", lambda: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def prepared(caches: Path, repo: str, commit: str, age: int) -> None:
    """What datasets leaves of a data set that it has loaded."""
    folder = caches / "datasets" / repo / "default-0" / "0.0.0" / commit
    folder.mkdir(parents=True)
    os.utime(folder, (1e9 - age, 1e9 - age))


def identities() -> dict[str, str]:
    """Of a task, an evaluation text, a calibration and a recovery set, all of them on the hub."""
    c4 = CalibrationConfig(source="c4", num_samples=1, seq_len=1)
    given = {"path": None, "repo": "yahma/alpaca-cleaned", "revision": "main", "data_dir": None}
    return {
        "task": tasks.task_fingerprint("hub", "arc_easy"),
        "corpus": corpora.corpus_fingerprint("wikitext2"),
        "calibration": Calibration(c4, None).identity()["text"],
        "recovery": examples.examples_fingerprint("hub", **given),
    }


REPOS = ["allenai___ai2_arc", "Salesforce___wikitext", "allenai___c4", "yahma___alpaca-cleaned"]


def test_the_commit_of_what_the_cache_holds_is_in_every_identity(caches):
    for repo in REPOS:
        prepared(caches, repo, FIRST, age=1)
    before = identities()
    for found, repo in zip(before.values(), REPOS, strict=True):
        assert f"{repo.replace('___', '/')}@{FIRST}" in found
    for repo in REPOS:
        prepared(caches, repo, SECOND, age=2)  # older: datasets takes the newest
    assert identities() == before
    for repo in REPOS:
        os.utime(caches / "datasets" / repo / "default-0" / "0.0.0" / SECOND)
    after = identities()
    assert all(after[name] != before[name] for name in before)


def test_a_reference_of_the_hubs_own_cache_is_a_commit_too(caches):
    refs = caches / "hub" / "datasets--allenai--c4" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(FIRST)
    assert hub.commit("allenai/c4", "OPTION", "B") == FIRST
    with pytest.raises(UserError, match="OPTION: allenai/c4 is no local folder and cannot be had"):
        hub.commit("allenai/c4", "OPTION", "B", revision="v2")
    assert hub.commit("allenai/c4", "OPTION", "B", revision=SECOND) == SECOND


def test_the_hub_is_asked_first(caches, monkeypatch):
    class Found:
        sha = SECOND

    monkeypatch.setattr("slm_pipeline.machine.network.hub_answers", lambda: True)
    prepared(caches, "allenai___c4", FIRST, age=1)
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda _, repo, **options: asked.append(repo) or Found())
    assert hub.commit("allenai/c4", "OPTION", "B") == SECOND
    assert asked == ["allenai/c4"]


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_a_connection_that_breaks_is_no_defect_under_whichever_name_httpx_goes(caches, monkeypatch, library):
    class ConnectError(Exception):
        pass

    ConnectError.__module__ = library

    def refuse(*_, **__):
        raise ConnectError("connection reset")

    monkeypatch.setattr("slm_pipeline.machine.network.hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(UserError, match=r"cannot be had from the hub or its cache \(connection reset\)"):
        hub.commit("allenai/c4", "OPTION", "B")
    ConnectError.__module__ = "mine"
    with pytest.raises(ConnectError):
        hub.commit("allenai/c4", "OPTION", "B")


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (
            lambda: tasks.task_fingerprint("hub", "piqa"),
            "evaluation.data=hub: piqa: baber/piqa is .*use evaluation.data=bundled or a folder of task files",
        ),
        (
            lambda: corpora.corpus_fingerprint("ptb"),
            "evaluation.perplexity.corpora=ptb: ptb-text-only/ptb_text_only is .* use bundled or a text file",
        ),
        (
            lambda: Calibration(CalibrationConfig(source="bookcorpus"), None).identity(),
            "calibration=bookcorpus: bookcorpus/bookcorpus is .* use calibration=bundled or calibration=text_file",
        ),
    ],
)
def test_without_hub_and_cache_it_says_what_to_use(caches, look, message):
    with pytest.raises(UserError, match=message):
        look()


def test_a_folder_in_the_hubs_layout_is_its_content(caches):
    folder = Path("allenai/c4/en")
    folder.mkdir(parents=True)
    files = {
        name: folder / name for name in ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz")
    }
    for file in files.values():
        file.write_bytes(b"a" * 1000)
        os.utime(file, (1e9, 1e9))
    config = CalibrationConfig(source="c4", path="allenai/c4", num_samples=1, seq_len=1)

    def found() -> list[str]:
        local = Calibration(config, Path.cwd()).identity()["text"]
        return [
            local,
            Calibration(CalibrationConfig(source="c4"), None).identity()["text"],
            corpora.corpus_fingerprint("c4"),
        ]

    before = found()
    train, validation = files.values()
    train.write_bytes(b"a" * 999 + b"b")  # of equal size and time
    os.utime(train, (1e9, 1e9))
    after = found()
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True]
    os.utime(train)
    assert found() == after  # copied
    validation.write_bytes(b"b" * 1000)
    assert [old == new for old, new in zip(after, found(), strict=True)] == [True, True, False]


def test_of_large_files_both_ends_and_blocks_between_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MAX_HASHED", 40 * hub._BLOCK)
    content = bytearray(os.urandom(50 * hub._BLOCK))
    file = tmp_path / "a.parquet"

    def digest() -> str:
        file.write_bytes(content)
        return hub.files_digest(tmp_path, [file])

    seen = {digest()}
    for place in (0, len(content) - 1, len(content) // 2):
        for byte in range(place, min(place + hub._BLOCK, len(content)), hub._BLOCK // 4):
            content[byte] ^= 1
        seen.add(digest())
    assert len(seen) == 4
    monkeypatch.setattr(hub, "MAX_HASHED", 1 << 30)
    whole = digest()
    for byte in range(0, len(content), 9 * hub._BLOCK):
        content[byte] ^= 1
        assert digest() != whole
        content[byte] ^= 1


def test_tasks_are_looked_for_where_lm_eval_loads_them():
    for task, (file, _) in TASK_FILES.items():
        text = (Path(lm_eval.tasks.__file__).parent / file).read_text()
        if task == "arc_challenge":  # includes arc_easy's
            assert "include: arc_easy.yaml" in text
        else:
            assert f"\ndataset_path: {tasks.HUB_REPOS[task]}\n" in text


def test_a_column_that_is_missing_and_a_row_that_is_no_text_are_named(caches, tiny_llama):
    folder = Path("ptb-text-only/ptb_text_only/penn_treebank/test")
    folder.mkdir(parents=True)
    for rows, message in (
        ([{"text": "a"}], "corpora=ptb has no column sentence; it has text"),
        ([{"sentence": "a"}, {"sentence": None}], "row 2, column sentence must be a string, got None"),
        ([{"sentence": 5}], "row 1, column sentence must be a string, got 5"),
    ):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "0000.parquet")
        with pytest.raises(UserError, match=message):
            corpora.corpus_tokens(tiny_llama[1], "ptb", window=8)
    (folder / "0000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="corpora=ptb: ptb-text-only/ptb_text_only cannot be read"):
        corpora.corpus_tokens(tiny_llama[1], "ptb", window=8)
