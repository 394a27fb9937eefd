"""From composed values to a job: whatever they are, a job or a user's error comes of it."""

from __future__ import annotations

import contextlib
import copy

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slm_pipeline import config
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line, steps
from slm_pipeline.jobs.job import prepare

CHOICES = [
    ["method=slm", "recovery=lora"],
    ["method=come", "recovery=distill", "tracker=wandb_offline"],
    ["method=laco", "recovery=block_mse", "threshold=fixed", "threshold.value=0.8", "pruning_ratio=none"],
    ["method=replaceme", "recovery=none", "evaluation=full", "calibration=bundled", "calibration.path=null"],
    ["method=mka", "recovery=partial_layers", "pruning_ratio=layers", "pruning_ratio.num_layers=4"],
    ["method=none", "recovery=full", "pruning_ratio=none", "evaluation=efficiency"],
]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> list[DictConfig]:
    folder = tmp_path_factory.mktemp("here")
    (folder / "text.txt").write_text("The river runs past the mill and the tree.\n" * 60)
    command_line.set_environment()
    common = [
        *("model=random", "model.num_layers=8", "calibration=text_file", f"calibration.path={folder}/text.txt"),
        *("calibration.num_samples=2", "calibration.seq_len=16", f"output_dir={folder}/out"),
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF_DIR)):
        return [compose("config", overrides=[*common, *choice]) for choice in CHOICES]


def keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Whole names of all values and of what holds them."""
    found = []
    for key in node:
        found.append(f"{prefix}{key}")
        if OmegaConf.is_dict(value := node._get_node(key)) and not value._is_none():
            found += keys(value, f"{prefix}{key}.")
    return found


WORDS = [
    *(
        "bundled",
        "hub",
        "local",
        "random",
        "text_file",
        "file",
        "wikitext2",
        "auto",
        "fixed",
        "published",
        "parameters",
    ),
    *("cuda:1", "balanced", "float16", "dense", "recovered", "boolq", "/dev/null", "/dev/zero", ".", "~", "/", "", " "),
    *(
        "${seed}",
        "${oops}",
        "${name}",
        "${digest:name}",
        "${digest:oops}",
        "${",
        "\\",
        "'",
        '"',
        "a'",
        "[",
        "{a:",
        "\0",
    ),
    *("nan", "inf", "1e400", "-0", "1e3", "true", "null", "0x10", "1_0", "9" * 400, "a" * 300, "a/" * 2500, "\ud800"),
    *("slm_pipeline.methods.slm.SlidingLayerMerging", "slm_pipeline.config.Config", "slm_pipeline.", "os.system"),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([10**400, -1, 0, 1, 2**31, 2**63]),
    st.sampled_from(WORDS), st.text(st.characters(exclude_categories=()), max_size=8),
)  # fmt: skip
VALUES = st.one_of(
    SCALARS,
    st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=3),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=3), st.sampled_from(WORDS)), SCALARS, max_size=2),
)


@given(data=st.data())
def test_any_values_give_a_job_or_a_users_error(data, composed, monkeypatch):
    monkeypatch.setattr("slm_pipeline.data.hub.commit", lambda *_, **__: "0" * 40)
    changed = copy.deepcopy(data.draw(st.sampled_from(composed)))
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(keys(changed)))
        try:
            OmegaConf.update(changed, key, data.draw(VALUES), merge=True)
        except OverflowError:  # said by `command_line.composed_of`
            return
        except OmegaConfBaseException:
            continue
    with contextlib.suppress(UserError):
        described = steps.describe_plan(prepare(config.to_config(changed), "slm"))
        assert not described or described.split()[1] in ("run", "reuse")
