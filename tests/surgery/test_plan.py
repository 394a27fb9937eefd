"""A plan that contradicts itself is refused when it is read."""

from __future__ import annotations

import copy
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import GOOD, read, read_with
from safetensors.torch import save_file as save_torch_file

from slm_pipeline.errors import UserError
from slm_pipeline.methods.from_plan import FromPlan
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.plan import Plan, format_groups, groups_of_windows
from slm_pipeline.surgery.untrusted import read_text

FOLD = [{"op": "fold", "layers": [1], "tensor": "fold.0"}, *GOOD["ops"]]


def test_a_good_plan(tmp_path):
    assert read(tmp_path).num_layers == 4
    nested = [{"op": "merge", "layers": [3, 4], "rule": "mean"}, {"op": "merge", "layers": [2, 3, 4], "rule": "mean"}]
    assert read(tmp_path, ops=nested).num_layers == 4


def test_its_tensors_can_be_read_by_whoever_can_read_the_plan(tmp_path):
    fold = Fold((0,), "fold.0")
    plan = dataclasses.replace(read(tmp_path), tensors={"fold.0": np.eye(3, dtype=np.float32)})
    plan.ops = [*plan.ops, fold]
    plan.write(tmp_path / "plan.json")
    assert (tmp_path / "plan.safetensors").stat().st_mode == (tmp_path / "plan.json").stat().st_mode
    assert np.array_equal(Plan.read(tmp_path / "plan.json").tensors["fold.0"], np.eye(3))


def test_a_plan_put_right_is_another_decision_though_its_edits_are_the_same(tmp_path):
    """Else its replay would find what the wrong one left in the store, under the same key."""
    plan = read(tmp_path)
    path = str(tmp_path / "plan.json")
    options = FromPlan(path=path).options()
    assert FromPlan(path=path).options() == options
    for changes in ({"threshold": 0.9}, {"scores": {"loss": 1.0}}):
        other = read(tmp_path, **changes)
        assert other.content() == plan.content()
        assert FromPlan(path=path).options() != options
    plan.tensors = {"fold": np.zeros((2, 3), dtype=np.float32)}
    turned = Plan(**{**vars(plan), "tensors": {"fold": np.zeros((3, 2), dtype=np.float32)}})
    assert turned.fingerprint() != plan.fingerprint()


UNITS = {"m.heads.0": [0], "m.heads.1": [1], "m.neurons.0": [0, 3], "m.neurons.1": [1, 2]}
CONCATENATE = {"op": "merge", "layers": [2, 3], "rule": "concatenate", "shares": [0.5, 0.5], "tensors": "m"}
PAIR = {"layer_groups": [[0], [1], [2, 3], [4], [5]]}
GONE = {"layer_groups": [[0], [1], [4], [5]], "dropped": [2, 3]}


@pytest.mark.parametrize(
    ("changes", "tensors", "content", "fingerprint"),
    [
        ({}, {}, "0b03340b36705238", "3e7143c86ee692a4"),
        ({"ops": [{"op": "drop", "layers": [2, 3]}], **GONE}, {}, "e5db7404da7420ac", "665a0a0ca50d048e"),
        (
            {"ops": [{"op": "merge", "layers": [2, 3], "rule": "weighted", "shares": [1, 0]}], **PAIR},
            {},
            "93f50c41ad6b9f75",
            "f348dd4d0c40495d",
        ),
        ({"ops": [CONCATENATE], **PAIR}, UNITS, "b527612e4f3673b7", "076b44191571f16b"),
        (
            {"ops": [{**CONCATENATE, "official_gqa": False, "fold_norm": True}], **PAIR},
            UNITS,
            "58143a061a359670",
            "44355d36c48da3c2",
        ),
        (
            {"ops": [{"op": "drop", "layers": [2, 3]}, {"op": "fold", "layers": [1], "tensor": "t"}], **GONE},
            {"t": np.eye(4, dtype=np.float32)},
            "c17b744cc55e141b",
            "43991f4a48a36e8b",
        ),
        (
            {
                "ops": [{"op": "drop_sublayer", "layers": [2], "sublayer": "mlp", "export": "stock"}],
                "layer_groups": [[layer] for layer in range(6)],
            },
            {},
            "db98424da1756eba",
            "2e410ef9b2be1c50",
        ),
    ],
)
def test_a_plan_written_before_keeps_its_place_in_the_store(changes, tensors, content, fingerprint, tmp_path):
    """Digests of the first version that had each operation: checkpoints and replays lie in stores under them."""
    plan = read_with(tmp_path, tensors, **changes) if tensors else read(tmp_path, **changes)
    assert (plan.content(), plan.fingerprint()) == (content, fingerprint)
    assert [op.to_json() for op in plan.ops] == {**GOOD, **changes}["ops"]
    plan.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == {**GOOD, **changes}


OVERLAPPING = [{"op": "merge", "layers": [3, 4], "rule": "mean"}, {"op": "merge", "layers": [2, 3], "rule": "mean"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": [{"op": "merge", "layers": [1, 2, 3], "rule": "official"}]}, "ops do not lead to its layer_groups"),
        ({"ops": [{"op": "merge", "layers": [2, 3, 99], "rule": "official"}]}, "are not whole layers of the model"),
        (
            {"ops": [{"op": "twist", "layers": [2]}]},
            "op 0 is 'twist'; this version knows correct, drop, drop_sublayer, fold, merge, replace, resize, scale",
        ),
        ({"ops": []}, "ops do not lead to its layer_groups"),
        ({"ops": OVERLAPPING}, "op 1: .* are not whole layers"),
        ({"ops": [{"op": "drop", "layers": list(range(6))}]}, "its ops must keep a layer"),
        ({"dropped": [1], "layer_groups": [[0], [2, 3, 4], [5]]}, "ops do not lead to its layer_groups"),
        ({"layer_groups": [[0], [1], [2, 3, 4]]}, "must name each of the 6 layers once"),
        ({"format": 2}, "not a plan of format 1"),
        ({"surprise": 1}, "is not a plan"),
    ],
)
def test_contradictions(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **changes)


def test_groups_in_one_line():
    assert format_groups(groups_of_windows([(22, 24), (17, 18)], 30)) == "0-16 {17-18} 19-21 {22-24} 25-29"
    assert format_groups([[0], [2], [3], [5]]) == "0 2-3 5"
    assert format_groups([[0, 1], [2]]) == "{0-1} 2"


def test_a_method_that_reads_no_text_has_no_calibration(tmp_path):
    assert read(tmp_path, calibration=None).calibration is None
    assert read(tmp_path, calibration={"fingerprint": "f", "num_tokens": 5}).calibration["num_tokens"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"name": "m", "fingerprint": "f", "num_layers": 10**12}},
            "num_layers=1000000000000 must be a whole",
        ),
        ({"model": {"name": "m", "fingerprint": "f", "num_layers": True}}, "num_layers=True must be a whole number"),
        ({"model": {"name": "m\ud800", "fingerprint": "f", "num_layers": 6}}, r"model.name='m\\ud800' must be a name"),
        ({"model": []}, r"model=\[\] must be a mapping"),
        ({"method": 3}, "method=3 must be a name"),
        ({"calibration": {"num_tokens": "5"}}, "num_tokens='5' must be a whole number"),
        ({"threshold": 1.5}, "threshold=1.5 must be null or a number in"),
        ({"threshold": True}, "threshold=True must be null or a number in"),
        ({"format": True}, "not a plan of format 1"),
        ({"ops": {}}, "ops={} must be a list of mappings"),
        ({"ops": [[]]}, r"ops=\[\[\]\] must be a list of mappings"),
        ({"ops": [{"op": [], "layers": [1]}]}, r"op 0 is \[\]; this version knows"),
        (
            {"layer_groups": [], "dropped": list(range(6))},
            "must name each of the 6 layers once, in order, and keep one",
        ),
        ({"layer_groups": [[0], [1], ["2", 3, 4], [5]]}, "which is no list of layers"),
        ({"layer_groups": [[0], [1], [], [2, 3, 4], [5]]}, r"layer_groups has \[\], which is no list of layers"),
        ({"scores": []}, r"scores=\[\] must be a mapping"),
        (
            {"scores": {"steps": [{"low": 1, "high": 2, "similarity": "high", "accepted": True}]}},
            "scores.steps must be",
        ),
    ],
)
def test_values_of_the_wrong_type_or_size(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a plan: Expecting value"),
        ("null", "not a plan of format 1"),
        ("[" * 100_000, "is not a plan: maximum recursion depth"),
        ('{"format": 1, "scores": ' + '{"a":' * 60 + "1" + "}" * 61, "nested more than 50 deep"),
        ('{"format": 1, "threshold": NaN}', "it has the number NaN"),
        ('{"format": 1, "threshold": 1e999}', "it has the number 1e999"),
        ('{"format": 1' + "0" * 5000 + "}", "is not a plan: Exceeds the limit"),
    ],
)
def test_what_is_not_a_plan_at_all(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Plan.read(tmp_path / "plan.json")


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "long").write_bytes(b"1" * 11)
    (tmp_path / "latin").write_bytes("\xe9t\xe9".encode("latin-1"))
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("none", "No such file"),
        (".", "is not a file"),
        ("fifo", "is not a file"),
        ("long", "more than 10 bytes"),
        ("latin", "not UTF-8"),
        ("a\0b", "No such file"),
    ):
        with pytest.raises(UserError, match=f"cannot read .*{message}"):
            read_text(tmp_path / name, 10)


def test_tensors_that_no_op_names_or_numpy_has_not(tmp_path):
    with pytest.raises(UserError, match="holds 'fold.1', which no op names"):
        read_with(tmp_path, {"fold.0": np.eye(4), "fold.1": np.eye(4)}, ops=FOLD)
    save_torch_file({"fold.0": torch.eye(4, dtype=torch.bfloat16)}, tmp_path / "plan.safetensors")
    with pytest.raises(UserError, match="plan.json is not a plan: "):
        read(tmp_path, ops=FOLD)
    (tmp_path / "plan.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="plan.json is not a plan: "):
        read(tmp_path, ops=FOLD)


def test_a_plan_without_tensors_leaves_none_of_another(tmp_path):
    plain = read(tmp_path)
    read_with(tmp_path, {"fold.0": np.eye(4)}, ops=FOLD).write(tmp_path / "plan.json")
    assert (tmp_path / "plan.safetensors").exists()
    plain.write(tmp_path / "plan.json")
    assert not (tmp_path / "plan.safetensors").exists()
    assert Plan.read(tmp_path / "plan.json") == plain


# Values as they stand in JSON; layers, names and shares that are nearly right come up often.
SCALARS = st.none() | st.booleans() | st.integers(-3, 7) | st.integers() | st.floats() | st.text(max_size=5)
WORDS = st.sampled_from(
    [
        "drop",
        "merge",
        "drop_sublayer",
        "fold",
        "replace",
        "resize",
        "scale",
        "op",
        "layers",
        "rule",
        "mean",
        "weighted",
        "shares",
    ]
)
LAYERS = st.lists(st.integers(-1, 6), max_size=6)
VALUES = st.recursive(
    SCALARS | WORDS | LAYERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4)
)
NESTED = ["concatenate", "weighted", "official", "attention", "mlp", "stock", "custom"]
OPS = st.fixed_dictionaries(
    {"op": WORDS | VALUES, "layers": LAYERS | VALUES},
    optional={
        "rule": st.sampled_from(NESTED) | VALUES,
        "shares": st.lists(st.sampled_from([0, 0.5, 1.0]) | VALUES, max_size=3) | VALUES,
        "sublayer": st.sampled_from(NESTED) | VALUES,
        "export": st.sampled_from(NESTED) | VALUES,
        **dict.fromkeys(("heads", "neurons", "biases"), VALUES),
        "tensor": VALUES,
        "tensors": VALUES,
    },
)
MODELS = st.fixed_dictionaries({}, optional=dict.fromkeys(("name", "fingerprint", "num_layers"), SCALARS))
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(GOOD, VALUES),
        "ops": st.lists(OPS, max_size=3) | VALUES,
        "layer_groups": st.lists(LAYERS, max_size=6) | VALUES,
        "dropped": LAYERS | VALUES,
        "model": MODELS | VALUES,
        "scores": st.dictionaries(st.sampled_from(["steps", "rounds"]), VALUES) | VALUES,
    },
)


@given(CHANGES)
def test_any_json_is_a_good_plan_or_refused(tmp_path, changes):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**copy.deepcopy(GOOD), **changes}))
    plan, message = None, ""
    try:
        plan = Plan.read(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000
    if plan is None:
        return
    assert plan.num_layers >= 1
    plan.content()
    plan.write(path)
    assert Plan.read(path).fingerprint() == plan.fingerprint()
