"""A whole pipeline in some seconds: a random model; texts, instructions and two tasks of random words."""

from __future__ import annotations

import json
import random
from pathlib import Path

_WORDS = ["river", "mill", "tree", "runs", "past", "the", "a", "old"]


def write_data(folder: Path) -> Path:
    """Write text.txt, alpaca.json, piqa.jsonl and boolq.jsonl; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)

    def sentence(length: int) -> str:
        return " ".join(generator.choice(_WORDS) for _ in range(length))

    (folder / "text.txt").write_text(sentence(2000))
    examples = [{"instruction": sentence(2), "input": "", "output": sentence(4)} for _ in range(30)]
    (folder / "alpaca.json").write_text(json.dumps(examples))
    piqa = [{"goal": sentence(3), "sol1": sentence(2), "sol2": sentence(4), "label": i % 2} for i in range(4)]
    boolq = [{"passage": sentence(6), "question": sentence(3), "idx": i, "label": i % 2} for i in range(4)]
    for task, rows in (("piqa", piqa), ("boolq", boolq)):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def overrides(data: Path, *, seq_len: int, max_steps: int, save_steps: int) -> list[str]:
    """Of `slm`, with the data in ``data``. A training that is killed loses at most ``save_steps``."""
    return [
        "model=random", "model.num_layers=6", "model.hidden_size=32", "model.intermediate_size=48", "tracker=jsonl",
        f"data_dir={data}", "calibration=text_file", "calibration.path=text.txt", "calibration.num_samples=12",
        f"calibration.seq_len={seq_len}", "recovery.source=file", "recovery.path=alpaca.json",
        "recovery.validation_size=4", f"recovery.max_steps={max_steps}", "recovery.batch_size=4",
        "recovery.micro_batch_size=2", "recovery.warmup_steps=1", f"recovery.eval_steps={save_steps}",
        f"recovery.save_steps={save_steps}", "recovery.learning_rate=0.01", "recovery.dtype=float32",
        "evaluation=zero_shot", "evaluation.data=.", "evaluation.tasks=[piqa,boolq]",
        "evaluation.perplexity.corpora=[text.txt]", "evaluation.perplexity.window=128",
    ]  # fmt: skip
