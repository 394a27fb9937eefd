"""Overrides are read, or the message says how they have to be written."""

from __future__ import annotations

import shlex
from contextlib import suppress

from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from slm_pipeline.config.overrides import as_text_hint, asks_for_several_jobs, check_group, parse_overrides
from slm_pipeline.errors import UserError


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=300))
def test_the_form_that_a_message_advises_is_read_as_the_text(text):
    """Whatever is in it: also where it ends in a backslash, or holds both kinds of quotes."""
    assume("${" not in text)  # asks for the value of another option
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
