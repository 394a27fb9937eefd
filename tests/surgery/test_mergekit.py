"""mergekit's half-open ranges, both ways."""

from __future__ import annotations

import pytest
import yaml

from slm_pipeline.errors import UserError
from slm_pipeline.surgery.mergekit import kept_layers, to_mergekit


def test_ranges_by_hand(tmp_path):
    text = to_mergekit([0, 1, 2, 5, 7, 8], "some/model", "bfloat16")
    values = yaml.safe_load(text)
    ranges = [part["sources"][0]["layer_range"] for part in values["slices"]]
    assert ranges == [[0, 3], [5, 6], [7, 9]]
    assert values["merge_method"] == "passthrough"
    (tmp_path / "plan.yml").write_text(text)
    assert kept_layers(tmp_path / "plan.yml") == [0, 1, 2, 5, 7, 8]


def document(*ranges, method="passthrough", models=("m",)):
    slices = [{"sources": [{"model": models[i % len(models)], "layer_range": r}]} for i, r in enumerate(ranges)]
    return yaml.safe_dump({"slices": slices, "merge_method": method})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (document([0, 4], [2, 6]), "repeats or reorders layers"),
        (document([4, 6], [0, 2]), "repeats or reorders layers"),
        (document([0, 4], method="slerp"), "merge_method='slerp' is not passthrough"),
        (document([0, 4], [6, 8], models=("a", "b")), "several models"),
        ("slices: 3\nmerge_method: passthrough", "is not mergekit's passthrough YAML"),
        ("{", "is not mergekit's passthrough YAML"),
    ],
)
def test_what_is_not_a_removal_is_refused(text, message, tmp_path):
    (tmp_path / "bad.yml").write_text(text)
    with pytest.raises(UserError, match=message):
        kept_layers(tmp_path / "bad.yml")
