"""mergekit's half-open ranges, both ways, and whatever else its files may say: refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import context_of, random_source
from hypothesis import given
from hypothesis import strategies as st

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.methods.from_plan import FromPlan
from slm_pipeline.models.loading import found_by_others
from slm_pipeline.surgery.mergekit import can_name, read_passthrough, to_mergekit


def test_ranges_by_hand(tmp_path):
    text = to_mergekit([0, 1, 2, 5, 7, 8], "some/model", "bfloat16")
    values = yaml.safe_load(text)
    ranges = [part["sources"][0]["layer_range"] for part in values["slices"]]
    assert ranges == [[0, 3], [5, 6], [7, 9]]
    assert values["merge_method"] == "passthrough"
    (tmp_path / "plan.yml").write_text(text)
    assert read_passthrough(tmp_path / "plan.yml").kept == [0, 1, 2, 5, 7, 8]
    assert read_passthrough(tmp_path / "plan.yml").dtype == "bfloat16"


def test_the_dense_model_is_named_so_that_mergekit_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slm_pipeline.models.bundled.model_dir", lambda name: tmp_path / "cache" / name)
    random = random_source()

    def found(**config):
        return found_by_others(replace(random, config=ModelConfig(**config)))

    assert found(name="small", source="bundled") == str(tmp_path / "cache" / "small")
    assert found(name="mine", source="local", path="models/mine") == str(tmp_path / "models" / "mine")
    assert found(name="mine", source="local", path="~/mine") == str(Path.home() / "mine")
    assert found(name="theirs", source="hub", repo="me/theirs") == "me/theirs"
    assert found_by_others(random) == "random"


def test_names_that_mergekit_reads_otherwise():
    assert can_name("some/model")
    assert can_name("/data/some model")
    assert not can_name("/data/c++/model")
    assert not can_name("/data/me@host/model")


class _Spelled(yaml.SafeDumper):
    """Writes the same value twice instead of an alias."""

    def ignore_aliases(self, data):
        return True


def dumped(values):
    return yaml.dump(values, Dumper=_Spelled)


def document(*ranges, method="passthrough", models=("m",)):
    slices = [{"sources": [{"model": models[i % len(models)], "layer_range": r}]} for i, r in enumerate(ranges)]
    return dumped({"slices": slices, "merge_method": method})


def changed(top=None, part=None, source=None):
    """A good file with more keys at one of its levels."""
    values = {
        "slices": [
            {"sources": [{"model": "m", "layer_range": [0, 4]}]},
            {"sources": [{"model": "m", "layer_range": [6, 8], **(source or {})}], **(part or {})},
        ],
        "merge_method": "passthrough",
        **(top or {}),
    }
    return dumped(values)


SCALE = {"parameters": {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]}}
BOMB = "a: &a [1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (document([0, 4], [2, 6]), r"slices\[1\].sources\[0\].layer_range=\[2, 6\] repeats or reorders layers"),
        (document([4, 6], [0, 2]), "repeats or reorders layers"),
        (document([0, 4], method="slerp"), "merge_method='slerp' is not passthrough"),
        (document([0, 4], [6, 8], models=("a", "b")), "several models"),
        ("slices: 3\nmerge_method: passthrough", "not mergekit's passthrough YAML .*slices is 3, not a list"),
        ("{", "is not mergekit's passthrough YAML"),
        ("", "the file is None, not a mapping"),
        ("null", "the file is None, not a mapping"),
        ("[]", r"the file is \[\], not a mapping"),
        ("- 1", r"the file is \[1\], not a mapping"),
        ("slices: []\nmerge_method: passthrough", r"slices is \[\], not a list with something in it"),
        ("merge_method: passthrough", "the file has no slices"),
        (changed(source=SCALE), r"slices\[1\].sources\[0\] has the key 'parameters', which would change more"),
        (changed(part=SCALE), r"slices\[1\] has the key 'parameters'"),
        (changed(part={"base_model": "m"}), r"slices\[1\] has the key 'base_model'"),
        (changed(source={"weight": 0.5}), "has the key 'weight'"),
        (changed(top={"parameters": {"density": 0.5}}), "the file has the key 'parameters'"),
        *((changed(top={key: "x"}), f"the file has the key '{key}'") for key in (
            "tokenizer_source", "tokenizer", "base_model", "chat_template", "models", "modules", "anything",
        )),
        (changed(source={"model": "m+adapter"}), "adds an adapter to the model"),
        (changed(source={"model": {"model": "m", "lora": "a"}}), "model is {.*}, not a name"),
        (changed(source={"model": None}), r"sources\[0\] has no model"),
        (changed(top={"dtype": "float32", "out_dtype": "bfloat16"}), "a plan changes no type: one name, or none"),
        (changed(top={"dtype": ["float32"]}), "a plan changes no type: one name, or none"),
        (changed(part={"sources": [{"model": "m", "layer_range": [6, 8]}] * 2}), r"slices\[1\] has 2 sources"),
        *((document(bad), message) for bad, message in (
            ([0, 0], r"layer_range=\[0, 0\] holds no layer"),
            ([-2, 6], r"layer_range=\[-2, 6\] holds no layer"),
            ([6, 2], r"layer_range=\[6, 2\] holds no layer"),
            ([0, 10**12], "layer_range=.* holds no layer or none that a model has"),
            ([0, 2.0], r"layer_range is \[0, 2.0\]; it must be two whole numbers"),
            ([False, True], "must be two whole numbers"),
            (["0", "2"], "must be two whole numbers"),
            ([0], "must be two whole numbers"),
            ([0, 2, 4], "must be two whole numbers"),
            (4, "must be two whole numbers"),
        )),
        (document([0, 4]).replace("merge_method", "dtype: a\ndtype: b\nmerge_method"), "the key 'dtype' stands there"),
        (BOMB, r"aliases \(\*name\) are not read"),
        ("a: &a [*a]", "aliases"),
        ("[" * 30_000, "nested more than 10 deep"),
        ("- " * 30_000, "nested more than 10 deep"),
        ("x" * 70_000, "more than 65536 bytes"),
        ("slices: [{sources: [{model: m, layer_range: [0, 0x" + "f" * 30_000 + "]}]}]\nmerge_method: passthrough",
         "a number of thousands of digits"),
        ("slices: !!timestamp x", "is not mergekit's passthrough YAML"),
        ("slices: !!int ''", "is not mergekit's passthrough YAML"),
        ("slices: !!python/object/apply:os.system [ls]", "is not mergekit's passthrough YAML"),
    ],
)  # fmt: skip
def test_what_is_not_a_removal_is_refused(text, message, tmp_path):
    (tmp_path / "bad.yml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_passthrough(tmp_path / "bad.yml")
    assert "\n" not in str(error.value)


def test_keys_with_nothing_in_them_change_nothing(tmp_path):
    (tmp_path / "plan.yml").write_text(changed(top={"base_model": None}, source={"parameters": None}))
    assert read_passthrough(tmp_path / "plan.yml").kept == [0, 1, 2, 3, 6, 7]


def test_the_files_dtype_is_the_models(tmp_path):
    source = random_source(num_layers=8)
    (tmp_path / "plan.yml").write_text(changed(top={"dtype": "float32"}))
    FromPlan(path=str(tmp_path / "plan.yml")).check(context_of(source))
    (tmp_path / "plan.yml").write_text(changed(top={"out_dtype": "bfloat16"}))
    with pytest.raises(UserError, match="asks for dtype='bfloat16', the model is in model.dtype=float32"):
        FromPlan(path=str(tmp_path / "plan.yml")).check(context_of(source))
    (tmp_path / "plan.yml").write_text(document([0, 9]))
    with pytest.raises(UserError, match="keeps layer 8; random has 8 layers"):
        FromPlan(path=str(tmp_path / "plan.yml")).check(context_of(source))


KEYS = st.sampled_from(["slices", "sources", "model", "layer_range", "merge_method", "dtype", "parameters", "<<"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
VALUES = st.recursive(
    SCALARS | st.sampled_from(["passthrough", [0, 4], [2, 3]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
)
SOURCES = st.fixed_dictionaries({"model": st.just("m") | VALUES, "layer_range": st.just([0, 2]) | VALUES})
SLICES = st.lists(st.fixed_dictionaries({"sources": st.lists(SOURCES, max_size=2) | VALUES}), max_size=3)
FILES = st.fixed_dictionaries(
    {"slices": SLICES | VALUES, "merge_method": st.just("passthrough") | VALUES}, optional={"dtype": VALUES}
)


@given(st.one_of(FILES.map(dumped), st.text(), VALUES.map(dumped)))
def test_any_yaml_is_a_good_removal_or_refused(tmp_path, text):
    (tmp_path / "plan.yml").write_text(text, encoding="utf-8", errors="surrogatepass")
    kept, message = [0], ""
    try:
        kept = read_passthrough(tmp_path / "plan.yml").kept
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert kept
    assert kept == sorted(set(kept))
