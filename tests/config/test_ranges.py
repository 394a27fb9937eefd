"""What each option may be is declared with it, and checked by one walk."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from slm_pipeline.config import CONF_DIR, PLUG_INS, Config, ModelConfig
from slm_pipeline.config.ranges import (
    Count,
    FilePath,
    FolderName,
    Range,
    Seed,
    Share,
    Text,
    UpToOne,
    check,
    numbers_without_a_range,
    short,
)
from slm_pipeline.errors import UserError


def plug_ins() -> list[type]:
    targets = [OmegaConf.load(file) for group in PLUG_INS for file in sorted((CONF_DIR / group).glob("*.yaml"))]
    names = [(values.get("method") or values).get("_target_") for values in targets]
    return [
        getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names if name
    ]


@pytest.mark.parametrize("options", [Config, *plug_ins()], ids=lambda options: options.__name__)
def test_every_number_that_can_be_set_has_a_range(options):
    assert list(numbers_without_a_range(options)) == []


def test_a_number_without_a_range_is_found_wherever_it_is():
    @dataclass
    class Inner:
        depth: int = 1
        bounded: Count = 1

    @dataclass
    class Outer:
        inner: Inner = field(default_factory=Inner)
        table: dict[str, float] = field(default_factory=dict)
        rows: list[int] | None = None
        maybe: float | None = None
        switch: bool = False
        word: str = ""

    globals().update(Inner=Inner)
    assert list(numbers_without_a_range(Outer)) == ["inner.depth", "table", "rows", "maybe"]


@dataclass
class Part:
    share: Share = 0.0


@dataclass
class Options:
    seed: Seed = 0
    count: Count | None = None
    ratio: Annotated[float, Range(above=0, below=1)] | None = None
    similarity: UpToOne = 0.0
    rate: Annotated[float, Range(above=0)] = 1.0
    free: float = 0.0  # of somebody who declares nothing
    switch: bool = True
    name: FolderName = "a"
    path: FilePath | None = None
    prompt: Annotated[str, Text(lines=True)] = ""
    word: str = ""
    table: dict[str, UpToOne] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "x.seed=-1 must be at least 0 and below 4294967296"),
        ({"seed": 2**32}, "x.seed=4294967296 must be at least 0 and below 4294967296"),
        ({"seed": 10**5000}, "x.seed=about 10**5000 must be at least 0 and below 4294967296"),
        ({"count": 0}, "x.count=0 must be at least 1 and below 2147483648"),
        ({"ratio": 1.0}, "x.ratio=1.0 must lie in (0, 1)"),
        ({"ratio": float("nan")}, "x.ratio=nan must lie in (0, 1)"),
        ({"similarity": 1.5}, "x.similarity=1.5 must lie in [0, 1]"),
        ({"part": Part(1.0)}, "x.part.share=1.0 must lie in [0, 1)"),
        ({"rate": 0.0}, "x.rate=0.0 must be above 0"),
        ({"rate": float("inf")}, "x.rate=inf must be a finite number above 0"),
        ({"free": float("-inf")}, "x.free=-inf must be a finite number"),
        ({"table": {"r20": float("nan")}}, "x.table.r20=nan must lie in [0, 1]"),
        ({"words": ["a", "b", "a"]}, "x.words=['a', 'b', 'a'] has 'a' twice"),
        ({"words": ["a", ["b"]]}, "x.words=['b'] is not one value"),
        ({"words": ["a\x1b[0m"]}, "x.words='a\\x1b[0m' must not have the control character '\\x1b'"),
        ({"word": "a\0"}, "x.word='a\\x00' must not have the control character '\\x00'"),
        ({"word": "a\nb"}, "x.word='a\\nb' must not have the control character '\\n'"),
        ({"prompt": "a\rb"}, "x.prompt='a\\rb' must not have the control character '\\r'"),
        ({"word": "\udcff"}, "x.word='\\udcff' is not text: '\\udcff' is half a character"),
        ({"path": ""}, "x.path='' must not be empty"),
        ({"path": "a/" + "ä" * 128}, "has a name of 256 bytes; at most 255 are allowed"),
        ({"path": "a/" * 2048}, "has 4096 bytes; at most 4095 are allowed"),
        ({"name": ""}, "x.name='' must not be empty"),
        ({"name": "n" * 201}, "has 201 bytes; at most 200 are allowed"),
        *(
            ({"name": name}, f"x.name={name!r} must be a folder name")
            for name in ("a/b", ".", "..", ".a", "-a", "~", " a")
        ),
    ],
)
def test_what_is_not_allowed_is_said_with_the_options_whole_name(given, message):
    with pytest.raises(UserError) as caught:
        check(Options(**given), "x.")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_allowed_passes():
    check(Options())
    check(
        Options(
            seed=2**32 - 1, count=1, ratio=1e-9, similarity=1, rate=1e300, switch=False, name="é 1", prompt="a\n\tb",
            path="/" + "a" * 255, table={"r20": 1.0}, words=["a", "A"], part=Part(0.999),
        )
    )  # fmt: skip


def allowed(**given: object) -> bool:
    try:
        check(Options(**given))
    except UserError:
        return False
    return True


@given(st.integers(), st.floats())
def test_a_number_passes_exactly_when_it_is_in_its_range(whole, real):
    assert allowed(seed=whole) == (0 <= whole < 2**32)
    assert allowed(ratio=real) == (0 < real < 1)
    assert allowed(free=real) == math.isfinite(real)


@given(st.text(st.characters(exclude_categories=())))
def test_a_name_that_passes_is_a_folders_name_and_a_path_that_passes_can_be_looked_up(tmp_path, text):
    if allowed(name=text):
        (tmp_path / text).mkdir()
        assert [path.name for path in tmp_path.iterdir()] == [text]
        (tmp_path / text).rmdir()
    if allowed(path=text):
        (tmp_path / text).exists()


def test_a_long_value_is_shortened_in_a_message():
    assert short("a" * 99).endswith("aa'...") is False
    assert short("a" * 300) == "'" + "a" * 59 + "..." + "a" * 29 + "'"
    assert short(-(10**60)) == "about -10**60"


def test_null_means_not_set():
    check(ModelConfig(name="x", source="random"))
