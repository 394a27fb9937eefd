"""Tasks of one's own folder: scores against lm-eval's ``simple_evaluate``, texts against a loop over tokens."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import lm_eval.evaluator
import lm_eval.tasks
import lm_eval.utils
import own_tasks
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM

from slm_pipeline.errors import UserError
from slm_pipeline.evaluation import task_files
from slm_pipeline.evaluation.lm_eval_tasks import check_names, identity, preflight, score
from slm_pipeline.models.loading import byte_tokenizer
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import cut_out, settle

OPTIONS = {"num_fewshot": None, "limit": None, "batch_size": 2}
SAMPLED = {"gen_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": 3}}
SIGNS = "code_points,strict-match"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return own_tasks.write(tmp_path / "own")


@pytest.fixture
def sharp(tiny_llama):
    """A tiny model whose predictions are far from uniform, and its tokenizer."""
    model, tokenizer = tiny_llama
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model, tokenizer


def _simple(monkeypatch, model, tokenizer, task: str, own: Path, **options) -> dict:
    """What lm-eval itself says, without the seconds in which it asks after the machine."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.pop("batch_size"))
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(own))
    return lm_eval.evaluator.simple_evaluate(wrapped, tasks=[task], task_manager=manager, log_samples=False, **options)


def _told(results: dict, name: str) -> dict:
    """lm-eval's numbers of a task: key -> (value, standard error)."""
    found = results["results"][name]
    keys = [key for key in found if "," in key and "_stderr," not in key]
    return {key: (found[key], found[key.replace(",", "_stderr,")]) for key in keys}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_fewshot": 2},
        {"num_fewshot": 1, "limit": 2, "batch_size": 3},
        SAMPLED,
        {"apply_chat_template": True, "num_fewshot": 1},
    ],
)
@pytest.mark.parametrize("task", ["both", "own_tag", "colours"])
def test_numbers_are_those_of_simple_evaluate(sharp, own, monkeypatch, task, settings):
    model, tokenizer = sharp
    tokenizer.chat_template = TEMPLATE
    found = score(model, tokenizer, task, **{**OPTIONS, **settings}, include_path=str(own))
    theirs = _simple(monkeypatch, model, tokenizer, task, own, **{**OPTIONS, **settings})
    parts = {**found["subtasks"], task: found}
    assert set(theirs["results"]) == set(parts) - ({task} if task == "own_tag" else set())
    for name, of_task in theirs["results"].items():
        told = _told(theirs, name)
        ours = {key: (number["value"], number["stderr"]) for key, number in parts[name]["numbers"].items()}
        assert ours == {key: (value, None if error == "N/A" else error) for key, (value, error) in told.items()}
        better = theirs["higher_is_better"].get(name)
        assert all(
            number["higher_is_better"] == better[key.split(",")[0]] for key, number in parts[name]["numbers"].items()
        )
        assert parts[name]["num_fewshot"] == theirs["n-shot"][name]
        assert parts[name]["num_examples"] == of_task.get("sample_len", parts[name]["num_examples"])
    assert found["limit"] == settings.get("limit")
    assert found["kind"] == {"both": "group", "own_tag": "tag"}.get(task, "task")


def test_every_setting_changes_the_numbers_that_are_compared_above(sharp, own):
    """Else a setting could be lost on the way and both still agree."""
    model, tokenizer = sharp
    tokenizer.chat_template = TEMPLATE
    found = []
    for settings in ({}, {"num_fewshot": 2}, {"limit": 2}, {"apply_chat_template": True}, SAMPLED):
        scores = score(model, tokenizer, "own_tag", **{**OPTIONS, **settings}, include_path=str(own))["subtasks"]
        found.append(
            [scores[name]["numbers"][key] for name, key in (("colours", "brier_score,none"), ("signs", SIGNS))]
        )
    choices, texts = ([numbers[part]["value"] for numbers in found] for part in (0, 1))
    assert choices[0] == choices[-1]  # nothing is drawn
    assert len(set(choices)) == 4
    assert len(set(texts)) == 5
    assert found[0][0]["higher_is_better"] is found[0][1]["higher_is_better"] is False


def test_a_group_has_the_mean_over_all_its_examples(sharp, own):
    found = score(*sharp, "both", **OPTIONS, include_path=str(own))
    colours, more = (found["subtasks"][name]["numbers"]["acc,none"]["value"] for name in ("colours", "more_colours"))
    assert found["numbers"]["acc,none"]["value"] == pytest.approx((4 * colours + 2 * more) / 6)
    assert colours != more
    assert (found["num_examples"], found["version"]) == (6, "7")
    assert found["subtasks"]["both::inner"]["numbers"] == {}
    assert found["subtasks"]["more_colours"]["num_examples"] == 2


def _continuation(model, tokenizer, prompt: str, num_tokens: int) -> str:
    """The likeliest next token, again and again, each time from the whole text."""
    ids = tokenizer(prompt)["input_ids"]
    prompt_len = len(ids)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[prompt_len:], skip_special_tokens=True).split("\n")[0]


@pytest.mark.parametrize("pruned", [False, True])
def test_generation_is_the_likeliest_text_of_a_model_that_lacks_sublayers_too(sharp, own, pruned):
    model, tokenizer = sharp
    if pruned:
        cut_out(view := ModelView(model), {"attention": [0, 3], "mlp": [4]})
        settle(view)
        assert type(model).__name__ == "PrunedLlamaForCausalLM"
    texts = [_continuation(model, tokenizer, f"{row['sum']}=", 6) for row in own_tasks.SUMS]
    rows = [
        {**row, "result": text if number in (0, 3, 4) else row["result"]}
        for number, (row, text) in enumerate(zip(own_tasks.SUMS, texts, strict=True))
    ]
    (own / "data" / "sums_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score(model, tokenizer, "sums", **OPTIONS, include_path=str(own))
    assert found["numbers"]["exact_match,strict-match"]["value"] == pytest.approx(3 / 5)
    assert found["numbers"]["exact_match,strict-match"]["higher_is_better"] is True
    first_signs = sum(text[:1] == row["result"] for text, row in zip(texts, rows, strict=True))
    assert found["numbers"]["exact_match,first-sign"]["value"] == pytest.approx(first_signs / 5)


def test_examples_that_a_task_does_not_take_are_said(sharp, own, caplog):
    settings = yaml.safe_load((own / "sums.yaml").read_text())
    (own / "sums.yaml").write_text(yaml.safe_dump({**settings, "num_fewshot": 0}))
    found = score(*sharp, "sums", **{**OPTIONS, "num_fewshot": 2}, include_path=str(own))
    assert found["num_fewshot"] == 0
    assert "sums: no examples in the prompt, as its own file says; num_fewshot is not taken" in caplog.text


def test_a_number_that_is_not_finite_is_none_and_said(sharp, own, caplog):
    (own / "prompts.py").write_text("def results(doc, found):\n    return {'code_points': float('nan')}\n")
    found = score(*sharp, "signs", **OPTIONS, include_path=str(own))
    assert found["numbers"][SIGNS] == {"value": None, "stderr": None, "higher_is_better": False}
    assert f"signs: lm-eval gives nan for {SIGNS}, which is no finite number" in caplog.text
    json.dumps(found, allow_nan=False)


def test_model_tokenizer_and_logging_are_left_as_they_were(tiny_llama, own, capfd):
    model, tokenizer = tiny_llama
    tokenizer.pad_token = None
    logger, root = logging.getLogger("lm_eval"), logging.getLogger()
    before = (logger.level, logger.propagate, logger.handlers[:], root.level, root.handlers[:])
    score(model, tokenizer, "sums", **{**OPTIONS, "limit": 2}, include_path=str(own))
    assert (logger.level, logger.propagate, logger.handlers, root.level, root.handlers) == before
    assert "from_string" not in vars(lm_eval.utils.env)
    assert tokenizer.pad_token is None
    assert not model.training
    written = capfd.readouterr()
    assert "bootstrapping" in written.err  # what lm-eval prints
    assert written.out == ""


def test_nothing_but_messages_is_written(tiny_llama, own, capfd):
    score(*tiny_llama, "colours", **{**OPTIONS, "limit": 1}, include_path=str(own))
    score(*tiny_llama, "signs", **{**OPTIONS, "limit": 1}, include_path=str(own))
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


# names and identities


def test_unknown_names_are_refused_with_near_ones(own, monkeypatch):
    monkeypatch.setattr(task_files, "_built_in", dict)
    check_names(["colours", "both", "own_tag"], str(own))
    with pytest.raises(UserError, match="evaluation.lm_eval.tasks: lm-eval has no task 'color'; did you mean colours?"):
        check_names(["colours", "color"], str(own))
    (own / "broken.yaml").write_text("task: [")
    with pytest.raises(UserError, match="no task 'zzz'; no task of its own is in broken.yaml"):
        check_names(["zzz"], str(own))
    for path in ("nothing", "own/data"):
        with pytest.raises(UserError, match=f"include_path={path}: .*{path} is no folder with task files"):
            check_names(["colours"], path, own.parent)


def test_a_task_of_ones_own_counts_where_lm_eval_has_one_of_its_name(own, tmp_path, monkeypatch):
    shutil.copytree(own, tmp_path / "theirs")
    _edit(tmp_path / "theirs" / "colours.yaml", metadata={"version": "theirs"})
    theirs = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(tmp_path / "theirs")).task_index
    monkeypatch.setattr(task_files, "_built_in", lambda: theirs)
    (own / "sums.yaml").unlink()
    manager = task_files.manager(["colours", "sums"], own, "tasks")
    assert manager.task_index["colours"].yaml_path == own / "colours.yaml"
    assert manager.task_index["sums"].yaml_path == tmp_path / "theirs" / "sums.yaml"


def test_lm_evals_own_tasks_are_known_and_those_without_data_refused(own):
    check_names(["mmlu", "gsm8k", "ai2_arc", "colours"], str(own))
    with pytest.raises(UserError, match="lm-eval has no task 'gsm8'; did you mean gsm8k"):
        check_names(["gsm8"])
    where = "evaluation.lm_eval.tasks: gsm8k: openai/gsm8k is no local folder and cannot be had from the hub"
    with pytest.raises(UserError, match=where) as refused:
        identity("gsm8k", **OPTIONS)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="evaluation.lm_eval.tasks: mmlu_[a-z_]+: cais/mmlu is no local folder"):
        identity("mmlu", **OPTIONS)


def _edit(file: Path, **settings) -> None:
    text = file.read_text().replace("!function prompts.text", "'!TEXT'")
    changed = {**yaml.safe_load(text), **settings}
    file.write_text(yaml.safe_dump(changed, sort_keys=False).replace("'!TEXT'", "!function prompts.text"))


CHANGES = {
    "a member's data": lambda own: (own / "data" / "more_colours_test.jsonl").write_text("{}"),
    "a member's examples": lambda own: (own / "data" / "colours_train.jsonl").write_text("{}"),
    "a member's setting": lambda own: _edit(own / "more_colours.yaml", target_delimiter=""),
    "the group's aggregation": lambda own: _edit(own / "both.yaml", aggregate_metric_list=[{"metric": "acc_norm"}]),
    "code": lambda own: (own / "prompts.py").write_text("def text(doc):\n    return doc['question']\n"),
}
NO_CHANGES = {
    "another task's data": lambda own: (own / "data" / "sums_test.jsonl").write_text("{}"),
    "another task's setting": lambda own: _edit(own / "sums.yaml", repeats=2),
    "the same written again": lambda own: _edit(own / "colours.yaml"),
}


@pytest.mark.parametrize("change", [*CHANGES, *NO_CHANGES])
def test_identity_changes_with_what_the_scores_depend_on_and_nothing_else(own, change):
    before = identity("both", **OPTIONS, include_path=str(own))
    {**CHANGES, **NO_CHANGES}[change](own)
    after = identity("both", **OPTIONS, include_path=str(own))
    assert (before != after) == (change in CHANGES)


def test_the_identity_of_a_tag_is_that_of_its_tasks(own):
    before = identity("own_tag", **OPTIONS, include_path=str(own))
    assert set(before["data"]) == {"colours", "sums", "signs"}
    (own / "data" / "sums_test.jsonl").write_text("{}")
    assert identity("own_tag", **OPTIONS, include_path=str(own)) != before


def test_the_data_of_members_that_are_written_out_in_a_group_is_in_its_identity(own, tmp_path, monkeypatch):
    monkeypatch.setattr(task_files, "_built_in", dict)
    inner = {**yaml.safe_load((own / "sums.yaml").read_text()), "task": "more_sums"}
    other = {"task": "colours", "dataset_kwargs": own_tasks.files(own / "data", "more_colours")}
    _edit(own / "both.yaml", task=[inner, other])
    before = identity("both", **OPTIONS, include_path=str(own))
    assert set(before["data"]) == {"both[1]", "both[2]", "colours"}
    for name in ("sums", "more_colours"):
        (own / "data" / f"{name}_test.jsonl").write_text("{}")
        after = identity("both", **OPTIONS, include_path=str(own))
        assert after != before
        before = after


@pytest.mark.parametrize(
    "settings",
    [{"num_fewshot": 1}, {"limit": 3}, {"batch_size": 4}, {"apply_chat_template": True}, {"gen_kwargs": {"top_k": 1}}],
)
def test_identity_has_every_setting(own, settings):
    before = identity("both", **OPTIONS, include_path=str(own))
    after = identity("both", **{**OPTIONS, **settings}, include_path=str(own))
    assert {name for name in before if before[name] != after[name]} == set(settings)


def test_identity_holds_no_place(own, tmp_path):
    before = identity("both", **OPTIONS, include_path=str(own))
    assert str(tmp_path) not in json.dumps(before)
    assert before["version"] == 7
    assert before["lm_eval"] == lm_eval.__version__
    assert before["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert identity("colours", **OPTIONS, include_path=str(own))["version"] == 1.5
    moved = tmp_path / "elsewhere" / "tasks"
    shutil.copytree(own, moved)
    for name in ("colours", "more_colours"):
        _edit(moved / f"{name}.yaml", dataset_kwargs=own_tasks.files(tmp_path / "data", name))
    (moved / "data").rename(tmp_path / "data")
    shutil.rmtree(own)
    assert identity("both", **OPTIONS, include_path="tasks", data_dir=moved.parent) == before


def test_a_data_set_of_the_hub_is_known_by_its_commit(own, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "slm_pipeline.data.hub.commit",
        lambda repo, option, instead, revision: asked.append((repo, revision)) or f"commit of {revision}",
    )
    for name, options in (("colours", {"revision": "v1"}), ("more_colours", {}), ("sums", {})):  # signs includes sums
        _edit(own / f"{name}.yaml", dataset_path="people/colours", dataset_kwargs=options)
    assert identity("both", **OPTIONS, include_path=str(own))["data"] == {
        "people/colours v1": "people/colours@commit of v1",
        "people/colours": "people/colours@commit of main",
    }
    asked.clear()
    identity("own_tag", **OPTIONS, include_path=str(own))
    assert sorted(asked) == [("people/colours", "main"), ("people/colours", "v1")]


def test_a_folder_in_the_hubs_layout_is_known_by_its_files(own, tmp_path):
    repo = tmp_path / "people" / "colours"
    (own / "data").rename(tmp_path / "data")
    shutil.copytree(tmp_path / "data", repo)
    _edit(own / "colours.yaml", dataset_path=str(repo), dataset_kwargs={})
    before = identity("colours", **OPTIONS, include_path=str(own))
    assert before["data"]["colours"].startswith("folder:")
    repo.rename(tmp_path / "moved")
    _edit(own / "colours.yaml", dataset_path=str(tmp_path / "moved"))
    assert identity("colours", **OPTIONS, include_path=str(own)) == before
    (tmp_path / "moved" / "sums_test.jsonl").write_text("{}")
    assert identity("colours", **OPTIONS, include_path=str(own)) != before


# before the first stage


def test_preflight_passes_what_can_be_scored(tiny_llama, own):
    preflight(tiny_llama[1], ["both", "own_tag"], num_fewshot=2, max_positions=128, include_path=str(own))


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("colours", {"dataset_path": "no/such"}, "cannot load colours: .*no/such"),
        ("colours", {"dataset_kwargs": {"data_files": {"test": "x.json"}}}, "cannot load colours: .*x.json"),
        ("colours", {"test_split": "testing"}, "cannot load colours: .*testing"),
        ("colours", {"doc_to_target": "{{answer | nothing}}"}, "cannot load colours: .*nothing"),
        ("colours", {"unsafe_code": True}, "colours runs code that the model writes"),
        ("colours", {"doc_to_image": ["question"]}, "colours has pictures or sounds"),
        (
            "sums",
            {"generation_kwargs": {"until": ["x"], "max_gen_toks": 64}},
            "sums generates up to 64 tokens, and the",
        ),
        (
            "sums",
            {"generation_kwargs": {"until": ["x"]}},
            "sums generates up to 256 tokens, and the model has 64 positions",
        ),
        ("sums", {"fewshot_split": None}, "cannot write the first prompt of sums: "),
    ],
)
def test_preflight_says_in_one_line_what_is_wrong(tiny_llama, own, file, settings, message):
    _edit(own / f"{file}.yaml", **settings)
    with pytest.raises(UserError, match=f"evaluation.lm_eval.tasks: .*{message}") as refused:
        preflight(tiny_llama[1], [file], num_fewshot=6, max_positions=64, include_path=str(own))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("task", "tokens", "message"),
    [
        ("colours", ("bos_token", "eos_token"), "colours: the model's tokenizer has neither a BOS nor an EOS token"),
        ("sums", ("eos_token",), "sums: the model's tokenizer has no EOS token, and lm-eval needs one to generate"),
    ],
)
def test_preflight_asks_for_the_tokens_that_lm_eval_needs(own, task, tokens, message):
    tokenizer = byte_tokenizer()
    for name in tokens:
        setattr(tokenizer, name, None)
    with pytest.raises(UserError, match=message):
        preflight(tokenizer, [task], num_fewshot=None, max_positions=None, include_path=str(own))


def test_a_chat_template_that_is_not_there_is_refused(own):
    with pytest.raises(UserError, match="apply_chat_template=true: the model's tokenizer has no chat template"):
        preflight(
            byte_tokenizer(),
            ["sums"],
            num_fewshot=None,
            max_positions=None,
            include_path=str(own),
            apply_chat_template=True,
        )
