"""What an evaluation lacks is said in one line before any stage runs or any model is loaded."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import run_slm

from slm_pipeline.models.loading import byte_tokenizer

GOOD = [
    *("model=random", "model.architecture=llama", "model.num_layers=6", "model.hidden_size=32", "model.num_heads=4"),
    *("model.num_kv_heads=2", "model.intermediate_size=48", "model.vocab_size=300", "method=reverse", "tracker=jsonl"),
    *("pruning_ratio=layers", "pruning_ratio.num_layers=4", "calibration=text_file", "calibration.path=text.txt"),
    *("recovery=none", "evaluation=perplexity", "evaluation.perplexity.corpora=[text.txt]"),
    "evaluation.perplexity.window=64",
]
CORPORA = "evaluation.perplexity.corpora"
SPEED = "evaluation.efficiency"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "text.txt").write_text("The river runs past the mill and the tree.\n" * 90)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "short.txt").write_text("a" * 63)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text.txt").write_text("Another text.\n" * 90)
    (tmp_path / "Rowan" / "hellaswag").mkdir(parents=True)
    rows = [{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": label} for label in "02"]
    for split in ("train", "validation"):
        file = tmp_path / "Rowan" / "hellaswag" / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def never(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("slm_pipeline.models.loading._random_model", never)
    return tmp_path


def refusal(files, *overrides: str) -> str:
    outcome = run_slm(*GOOD, *overrides)
    assert outcome.status == 2
    assert not list(files.glob("outputs/store/*/*"))
    return outcome.err.partition("error: ")[2].rstrip("\n")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{CORPORA}=[empty.txt]"], "corpora: FILES/empty.txt is empty"),
        ([f"{CORPORA}=[latin.txt]"], "corpora: FILES/latin.txt is not UTF-8 text: invalid continuation byte at byte 3"),
        ([f"{CORPORA}=[folder]"], "corpora: FILES/folder is a folder, not a file"),
        ([f"{CORPORA}=[nowhere.txt]"], "corpora: 'nowhere.txt' is not a file in FILES and not one of bundled, wiki"),
        ([f"{CORPORA}=[text.txt,text.txt]"], f"{CORPORA}=['text.txt', 'text.txt'] has 'text.txt' twice"),
        ([f"{CORPORA}=[c4]"], "corpora=c4: allenai/c4 is no local folder and cannot be had from the hub or its cache"),
        (
            ["evaluation.tasks=[piqa]", "evaluation.data=hub"],
            "evaluation.data=hub: piqa: baber/piqa is no local folder",
        ),
        (["evaluation.tasks=[piqa,boolq,piqa]"], "evaluation.tasks=['piqa', 'boolq', 'piqa'] has 'piqa' twice"),
        (["evaluation=none", "evaluation.tasks=[nosuch]"], "no zero-shot task 'nosuch'; tasks are boolq, piqa, hell"),
        (["stages=[]", "evaluation.tasks=[nosuch]"], "no zero-shot task 'nosuch'"),
        (["evaluation.of=[dense,dense]"], "evaluation.of=['dense', 'dense'] has 'dense' twice"),
        (
            ["calibration=c4", "calibration.path=null"],
            "calibration=c4: allenai/c4 is no local folder and cannot be had from the hub",
        ),
        (["calibration.path=latin.txt"], "calibration.path='latin.txt': FILES/latin.txt is not UTF-8 text"),
        (["calibration.path=short.txt"], "calibration.path='short.txt' has 63 bytes; "),
        (
            ["model.architecture=opt", f"{SPEED}.enabled=true", f"{SPEED}.output_len=2048"],
            f"{SPEED}.output_len=2048 after any prompt: the model has 2048 positions",
        ),
        ([f"{SPEED}.prompt="], f"{SPEED}.prompt='' must not be empty"),
        ([f"{SPEED}.mode=fast"], f"{SPEED}.mode='fast' is not one of eager, compile, graph"),
        (
            [f"{SPEED}.enabled=true", f"{SPEED}.mode=graph", "model.device=cpu"],
            f"{SPEED}.mode=graph replays a CUDA graph, and model.device=cpu is the CPU here; use {SPEED}.mode=eager",
        ),
        ([f"{SPEED}.grid=[8]"], f"{SPEED}.grid has '8'; write BATCHxNEW, as 8x512, or BATCHxPROMPT+NEW"),
        (
            ["model.architecture=opt", f"{SPEED}.enabled=true", f"{SPEED}.grid=[1x2048+1]"],
            f"{SPEED}.output_len=1 after a prompt of 2048 tokens: the model has 2048 positions",
        ),
        (["objective.max_layers=5"], "objective.max_layers=5 is a budget for objective.metric, which is null"),
        (["objective.metric=recovered/perplexity/text.txt"], "is not measured by this job"),
        (["objective.metric=dense/perplexity/text.txt", "evaluation.of=[pruned]"], "is not measured by this job"),
        (["objective.metric=pruned/perplexity/text.txt", "stages=[calibrate,merge]"], "is not measured by this job"),
    ],
)
def test_found_by_a_dry_run_too(files, overrides, message):
    for more in ((), ("dry_run=true",)):
        assert message in refusal(files, *overrides, *more).replace(str(files), "FILES")


def test_a_gpu_that_is_not_there_is_missed_by_a_dry_run(files, monkeypatch):
    for visible, device in (("", "cuda"), ("", "cuda:0"), ("0,1", "cuda:2")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        message = f"model.device='{device}': this machine has {2 if visible else 0} GPUs; use model.device=cpu or auto"
        assert message in refusal(files, f"model.device={device}", "dry_run=true")
    assert run_slm(*GOOD, "model.device=cuda:1", "dry_run=true").status == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    study = ["-m", *GOOD, "model.device=cuda", "seed=1,2", "dry_run=true"]
    assert "would fail: model.device='cuda': this machine has 0 GPUs" in run_slm(*study).out
    assert run_slm(*study, "hydra/launcher=slurm").status == 0  # its jobs see other GPUs than this machine


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{CORPORA}=[short.txt]"], "short: 63 tokens are less than one window; evaluation.perplexity.window=64"),
        (
            [f"{SPEED}.enabled=true", f"{SPEED}.output_len=2011"],
            f"{SPEED}.output_len=2011 after a prompt of 38 tokens: the model has 2048 positions",
        ),
        (
            [f"{SPEED}.enabled=true", f"{SPEED}.mode=graph"],
            f"{SPEED}.mode=graph replays a CUDA graph, and model.device=auto is the CPU here; use {SPEED}.mode=eager or"
            " compile",
        ),
        (
            ["evaluation.tasks=[hellaswag]", "evaluation.data=hub"],
            "evaluation.data=hub: hellaswag, row 2, column label: '2' is not one of '0', '1'",
        ),
        (
            ["calibration=wikitext2", "calibration.path=set", "calibration.num_samples=1", "calibration.seq_len=9"],
            "only 0 of 1 rows have calibration.seq_len=9 tokens, calibration.num_samples=1 are needed",
        ),
    ],
)
def test_found_with_the_tokenizer_alone(files, overrides, message):
    (files / "set" / "wikitext-2-raw-v1").mkdir(parents=True)
    rows = pyarrow.table({"text": ["a" * 8]})
    pyarrow.parquet.write_table(rows, files / "set" / "wikitext-2-raw-v1" / "train-0.parquet")
    outcome = run_slm(*GOOD, *overrides)
    assert (outcome.status, outcome.err.partition("error: ")[2]) == (2, message + "\n")
    assert not list(files.glob("outputs/store/*/*/stage.json"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.perplexity.bos=true"], "evaluation.perplexity.bos=true: the model's tokenizer has no BOS token"),
        (
            ["evaluation.tasks=[hellaswag]", "evaluation.data=Rowan"],
            "evaluation.tasks=['hellaswag']: the model's tokenizer has neither a BOS nor an EOS token, and lm-eval",
        ),
    ],
)
def test_tokens_that_the_tokenizer_lacks(files, monkeypatch, overrides, message):
    def bare() -> object:
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr("slm_pipeline.models.loading.byte_tokenizer", bare)
    row = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": "0"}
    (files / "Rowan" / "hellaswag.jsonl").write_text(json.dumps(row))
    assert refusal(files, *overrides).startswith(message)


def test_the_same_command_with_good_settings_is_not_refused(files):
    """So that the errors above are about what they say."""
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        run_slm(*GOOD)
