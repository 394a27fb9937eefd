"""Overrides are read, or the message says how they have to be written."""

from __future__ import annotations

import shlex
from contextlib import suppress

import pytest
from conftest import run_slm
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from slm_pipeline.config.overrides import as_text_hint, asks_for_several_jobs, check_group, parse_overrides
from slm_pipeline.errors import UserError


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=300))
def test_the_form_that_a_message_advises_is_read_as_the_text(text):
    """Whatever is in it: also where it ends in a backslash, or holds both kinds of quotes."""
    assume("${" not in text and len(text.encode()) <= 300)  # the former asks for the value of another option
    (word,) = shlex.split(as_text_hint(f"model.path={text}").rpartition("as one text it is written ")[2])
    (item,) = parse_overrides([word])
    assert (item.key_or_group, item.is_sweep_override()) == ("model.path", False)
    assert OmegaConf.create({"path": item.value()}).path == text


@given(
    st.sampled_from(["name", "seed", "method", "tracker.tags", "model.path", "+x", "~y", "recovery.rank"]),
    st.one_of(
        st.text(st.characters(exclude_categories=())),
        st.lists(st.sampled_from("a1.,:=()[]{}'\"\\$ ~#-"), max_size=12).map("".join),
        st.sampled_from(
            [
                "[" * 300 + "]" * 300,
                "{a:" * 300 + "1" + "}" * 300,
                "f(" * 3000,
                "9" * 5000,
                "-" + "9" * 400,
                "1e400",
                "range(1,9)",
                "glob(*)",
            ]
        ),
    ),
)
def test_any_override_is_read_or_refused(key, value):
    override = f"{key}={value}"
    with suppress(UserError):
        (item,) = parse_overrides([override])
        check_group(item)
        if item.is_sweep_override():
            assert asks_for_several_jobs(item).startswith(f"{override} asks for several jobs")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("[/tmp/a (1).txt]", ["/tmp/a (1).txt"]),
        ("/tmp/a (1).txt", ["/tmp/a (1).txt"]),
        ("[/tmp/a (1, 2).txt, b=c,bundled]", ["/tmp/a (1, 2).txt", "b=c", "bundled"]),
        ("""["/a, b",'c"d',e (]""", ["/a, b", 'c"d', "e ("]),
    ],
)
def test_a_list_of_texts_is_advised_as_a_list(value, texts):
    override = f"evaluation.perplexity.corpora={value}"
    (word,) = shlex.split(as_text_hint(override).rpartition("as a list of texts it is written ")[2])
    (item,) = parse_overrides([word])
    assert item.value() == texts
    with pytest.raises(UserError, match="as a list of texts it is written"):
        parse_overrides(["evaluation.perplexity.corpora=[/tmp/a (1).txt]"])


def test_quotes_are_advised_where_a_text_belongs():
    for key in ("name", "recovery.path", "method.path", "+data_dir", "hydra.run.dir", "tracker.project"):
        assert as_text_hint(f"{key}=a (1)") == f"; as one text it is written '{key}=\"a (1)\"'"
    for key in (
        "seed",
        "recovery",
        "recovery.rank",
        "evaluation.limit",
        "study",
        "nosuch.key",
        "hydra.nosuch",
        "hydra",
    ):
        assert as_text_hint(f"{key}=a (1)") == ""
    assert as_text_hint("recovery.target_modules=[q (1]").endswith("'recovery.target_modules=[\"q (1\"]'")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["seed=range(1,1000000000)"],
            "at most 10000 jobs; these are 999999999: seed=range(1,1000000000) has 999999999",
        ),
        (["seed=shuffle(range(0,1,1e-9))"], "at most 10000 jobs; these are 1000000000"),
        (["seed=range(0,100000)", "model.seed=range(0,100000)"], "at most 10000 jobs; these are 10000000000: "),
        (["seed=range(0,1,0)"], "seed=range(0,1,0): no range has such bounds or such a step"),
        (["seed=range(3,1)"], "seed=range(3,1) sweeps over nothing"),
        (["recovery=none,null"], "recovery=none,null: recovery is a group, choose one of its options: block_mse, "),
        (["method=slm,null"], "method=slm,null: method is a group, choose one of its options: "),
        (["recovery=none,1"], "recovery=none,1: recovery is a group"),
        (["recovery=none,''"], "recovery=none,'': recovery is a group"),
        (["recovery=range(1,3)"], "recovery=range(1,3): recovery is a group"),
        (["method=[slm,none],none"], "method=[slm,none],none names several options of method"),
        (["sweeps=mine"], "recovery=none,null: recovery is a group"),
    ],
)
def test_a_study_that_cannot_be_is_refused_at_once(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    file = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      recovery: none,null\n"
    (tmp_path / "sweeps" / "mine.yaml").write_text(file)
    outcome = run_slm("-m", "model=random", *overrides, "dry_run=true")
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_of_a_search_a_range_of_any_size_is_one_axis(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run_slm("-m", "sweeps=search", "model=random", "seed=range(1,1000000000)", "dry_run=true")
    assert "trials" in outcome.out
    assert "jobs" not in outcome.err.replace("1 of 1 jobs", "")
