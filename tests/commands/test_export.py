"""``slm-export``: what a run made becomes files for other tools; all else is one line."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import torch
from conftest import run_slm
from huggingface_hub import ModelCard
from small_pipeline import write_data
from transformers import AutoModelForCausalLM

from slm_pipeline.commands import export
from slm_pipeline.export import exported, hub
from slm_pipeline.models.loading import load_tokenizer
from slm_pipeline.surgery.plan import Plan


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose pruned model has layers of different widths, evaluated."""
    root = tmp_path_factory.mktemp("export")
    job = [
        "model=random", "model.num_layers=6", "model.hidden_size=32", "model.intermediate_size=48", "tracker=jsonl",
        f"data_dir={write_data(root / 'data')}", "calibration=text_file", "calibration.path=text.txt",
        "calibration.num_samples=4", "calibration.seq_len=32", "recovery=none", "method=wanda_sp",
        "method.export=custom", "method.allocation=global", "pruning_ratio=r20", "pruning_ratio.of=parameters",
        "evaluation=perplexity", "evaluation.perplexity.corpora=[text.txt]",
        "evaluation.perplexity.window=128", f"output_dir={root / 'out'}", "name=wide",
    ]  # fmt: skip
    done = run_slm(*job)
    assert done.status == 0, done.err
    (folder,) = (root / "out" / "runs" / "wide").iterdir()
    return folder


@pytest.fixture
def slm_export(monkeypatch, capsys, tmp_path):
    """``slm-export arguments`` started in ``tmp_path``: exit status, output, error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slm-export", *map(str, arguments)])
        status = 0
        try:
            export.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def test_a_run_becomes_one_file(slm_export, run):
    status, out, err = slm_export("gguf", run, "--type", "q8_0")
    assert status == 0, err
    assert out.endswith("wrote random-wanda_sp-pruned-q8_0.gguf\n")
    reader = gguf.GGUFReader("random-wanda_sp-pruned-q8_0.gguf")
    assert reader.get_field("general.architecture").contents() == "deci"
    assert reader.get_field("general.name").contents() == "random-wanda_sp-pruned"


@torch.no_grad()
def test_a_run_becomes_a_folder_of_the_stock_class(slm_export, run, input_ids):
    status, out, err = slm_export("padded", run, "--out", "padded")
    assert (status, out) == (0, "wrote padded\n"), err
    checkpoint = json.loads((run / "summary.json").read_text())["checkpoint"]
    stock = AutoModelForCausalLM.from_pretrained("padded")
    unequal = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(stock).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(stock(input_ids).logits, unequal(input_ids).logits, rtol=0, atol=1e-5)
    assert Path("padded/plan/plan.json").read_text() == (run / "plan.json").read_text()
    card = Path("padded/README.md").read_text()
    assert "filled up with zeros" in card
    assert "trust_remote_code" not in card
    assert "error: padded is of a stock class already" in slm_export("padded", "padded", "--out", "twice")[2]


def test_our_own_class_is_loaded_without_a_word_of_transformers(run):
    """It takes the tokenizer's folder for one of a model of type ''."""
    said = []
    listener = logging.Handler()
    listener.emit = said.append
    spoken = logging.getLogger("transformers.configuration_utils")
    spoken.addHandler(listener)
    try:
        load_tokenizer(Path(json.loads((run / "summary.json").read_text())["checkpoint"]))
        spoken.warning("something else")
    finally:
        spoken.removeHandler(listener)
    assert [record.getMessage() for record in said] == ["something else"]


def test_a_run_has_its_full_card_from_the_start(slm_export, run):
    number = json.loads((run / "summary.json").read_text())["numbers"]["pruned/perplexity/text.txt"]
    status, out, _ = slm_export("card", run)
    assert status == 0
    assert out == (run / "model_card.md").read_text()
    (result,) = ModelCard(out).data.eval_results
    assert result.metric_value == number["value"]


WRONG = {
    "nothing there": (["gguf", "nowhere"], "neither a run's folder"),
    "not made": (["gguf", "RUN", "--which", "recovered"], "made pruned, not recovered"),
    "of a folder": (["gguf", "RUN/../../../store/merge", "--which", "pruned"], "neither a run's folder"),
    "in the store": (["gguf", "RUN", "--out", "MODEL/x.gguf"], "a result of the store"),
    "taken": (["gguf", "RUN", "--out", "RUN/plan.json"], "is there already"),
    "card taken": (["card", "RUN", "--out", "RUN/model_card.md"], "is there already"),
    "offline": (["hub", "RUN", "--repo", "me/x"], "HF_HUB_OFFLINE=1 forbids it"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_one_line(what, slm_export, run, tmp_path):
    arguments, words = WRONG[what]
    model = json.loads((run / "summary.json").read_text())["checkpoint"]
    status, _, err = slm_export(*(part.replace("RUN", str(run)).replace("MODEL", model) for part in arguments))
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_kept_no_weights_says_how_to_get_them(slm_export, run, tmp_path):
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    summary = json.loads((run / "summary.json").read_text())
    summary["stages"]["merge"]["path"] = str(tmp_path / "gone")
    (tmp_path / "copy" / "summary.json").write_text(json.dumps(summary))
    assert "with keep=model" in slm_export("gguf", "copy")[2]
    (tmp_path / "copy" / "summary.json").write_text("{}")
    assert "does not say where the models" in slm_export("gguf", "copy")[2]
    (tmp_path / "copy" / "summary.json").unlink()
    assert "is not finished" in slm_export("gguf", "copy")[2]


class StandIn(BaseHTTPRequestHandler):
    """As much of huggingface.co as one commit needs; ``asked`` is what came."""

    asked: list[tuple[str, dict]] = []
    committed: dict[str, bytes] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict = {}
        if self.path == "/api/repos/create":
            self.asked.append((self.path, json.loads(body)))
            answer = {"url": f"http://{self.headers['Host']}/me/x", "id": "me/x", "name": "me/x"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/x/commit/1", "commitOid": "1", "success": True}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stand_in(monkeypatch):
    """huggingface_hub talks to `StandIn`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub, "endpoint", lambda: f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    StandIn.asked.clear()
    StandIn.committed.clear()
    yield StandIn
    server.shutdown()


def test_a_run_is_pushed_with_its_full_card(slm_export, run, stand_in):
    status, out, err = slm_export("hub", run, "--repo", "me/x", "--private")
    assert status == 0, err
    assert out.endswith("/me/x/commit/1\n")
    model = Path(json.loads((run / "summary.json").read_text())["checkpoint"])
    files = {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()}
    assert stand_in.committed.keys() == files
    assert {name for name in files if name.endswith(".safetensors")} == {"model.safetensors", "plan/plan.safetensors"}
    assert stand_in.committed["model.safetensors"] == (model / "model.safetensors").read_bytes()
    card = ModelCard(stand_in.committed["README.md"].decode())
    assert len(card.data.eval_results) == 1
    assert 'from_pretrained("me/x", trust_remote_code=True)' in card.text
    ((_, asked),) = stand_in.asked
    assert (asked["name"], asked["organization"]) == ("x", "me")
    assert asked.get("visibility") == "private" or asked.get("private") is True  # by the version of huggingface_hub


def test_the_plan_of_a_checkpoint_of_before_lies_beside_its_weights_and_goes_where_it_belongs(
    slm_export, run, tmp_path
):
    """vLLM reads every *.safetensors beside the weights as weights."""
    model = shutil.copytree(json.loads((run / "summary.json").read_text())["checkpoint"], tmp_path / "model")
    for file in (model / "plan").iterdir():
        file.rename(model / file.name)
    found = exported.find(model)
    assert found.plan is not None
    assert found.plan.fingerprint() == Plan.read(run / "plan.json").fingerprint()
    placed = hub.files(found, "me/x")
    assert {name: file for name, file in placed.items() if "plan" in name} == {
        f"plan/{name}": model / name for name in ("plan.json", "plan.safetensors")
    }


def test_a_dry_run_pushes_nothing(slm_export, run, stand_in):
    status, out, _ = slm_export("hub", run, "--repo", "me/x", "--dry-run")
    assert status == 0
    assert "model.safetensors" in out
    assert "## Scores" in out
    assert (stand_in.asked, stand_in.committed) == ([], {})


def test_no_network_is_said_at_once(slm_export, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "endpoint", lambda: "http://127.0.0.1:9")
    status, _, err = slm_export("hub", run, "--repo", "me/x")
    assert status == 2
    assert err.startswith("error: --repo=me/x was not pushed: ConnectError")
