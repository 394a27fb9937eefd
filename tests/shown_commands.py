"""The commands that the documents show, and what makes one of each kind small enough to be run in a test."""

from __future__ import annotations

import re
from pathlib import Path

from test_tutorial import REPAIR, SMALL, TRAINING

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])

_LINE = re.compile(r"^(?:    (?:\$ )?)?(slm(?:-[a-z]+)? .*)$", re.MULTILINE)
_INLINE = re.compile(r"`(slm(?:-[a-z]+)? [^`]*)`")
_SCHEMATIC = re.compile(r"\.\.\.|\||ANALYSIS|^slm -m$")


def commands_of(document: Path) -> list[str]:
    """Every command of ours that it shows: lines of blocks without what is said beside them, and between backticks.

    What has an ellipsis, a bar or ANALYSIS in it stands for several, and is left out.
    """
    text = re.sub(r"\\\n\s*", "", document.read_text(encoding="utf-8"))
    shown = [re.split(r"\s{2,}", line)[0] for line in _LINE.findall(text)]
    shown += [" ".join(inline.split()) for inline in _INLINE.findall(text)]
    commands = [command.strip() for line in shown for command in re.split(r"; (?=slm)", line)]
    return [command for command in commands if not _SCHEMATIC.search(command)]


# Those of the tutorial build on one another: test_tutorial.py runs them.
COMMANDS = list(
    dict.fromkeys(
        command for document in DOCUMENTS if document.name != "tutorial.md" for command in commands_of(document)
    )
)

TINY = ["model.num_layers=6", "pictures=false"]
LOCAL = [word for word in SMALL if not word.startswith("model")]  # a folder has its own sizes
QUICK = ["evaluation.tasks=[piqa]", "evaluation.limit=2", "evaluation.fidelity.corpora=[]"]
ONE_TIMING = [
    *("evaluation.efficiency.num_runs=1", "evaluation.efficiency.num_warmup=0", "evaluation.efficiency.output_len=2"),
]
TEXT = [
    "calibration=text_file",
    "calibration.path=data/text.txt",
    "calibration.num_samples=4",
    "calibration.seq_len=16",
]
UNSCORED = ["evaluation=none"]
# Command -> what makes it small, behind its own words. Those that read results stand behind those that make them.
RUN: dict[str, list[str]] = {
    "slm --version": [],
    "slm --help": [],
    "slm stages=[calibrate]": [*SMALL, *TINY],
    "slm threshold=fixed threshold.value=0.8 pruning_ratio=none": [*SMALL, *TINY, *UNSCORED, "recovery=none"],
    "slm evaluation.data=FOLDER": [*SMALL, *TINY, *QUICK, "evaluation.of=[dense,pruned]", "recovery=none"],
    "slm model=local model.path=FOLDER": [*LOCAL, "pictures=false", *UNSCORED, "recovery=none"],
    "slm calibration=text_file calibration.path=book.txt calibration.sampling=contiguous": [
        *(word for word in SMALL if "calibration.path" not in word), *TINY, *UNSCORED, "recovery=none",
    ],
    "slm recovery.source=file recovery.path=alpaca.json": [
        *SMALL, *TRAINING, *TINY, "evaluation.data=.", *QUICK, "evaluation.of=[recovered]",
    ],
    "slm method=reverse recovery=partial_layers recovery.head=null": [*SMALL, *TRAINING, *TINY, *UNSCORED],
    "slm method=come recovery=distill recovery.loss=mse recovery.logit_share=0.2": [
        *SMALL, *TRAINING, *TINY, *UNSCORED,
    ],
    "slm method=streamline method.replacement=true recovery=block_mse": [*SMALL, *TRAINING, *TINY, *UNSCORED],
    "slm evaluation=efficiency evaluation.of=[pruned]": [*SMALL, *TINY, *ONE_TIMING, "recovery=none"],
    "slm method=joint method.export=custom recovery=none": [
        *SMALL, *REPAIR, *TINY, *UNSCORED, "method.transfers=2", "method.swaps=1", "method.commit=0.5",
    ],
    # the last run, whose layers differ, is exported below
    "slm method=combined method@method.second=flap": [*SMALL, *TINY, *UNSCORED, "recovery=none", "model.num_layers=10"],
    "slm -m method=angular,flap pruning_ratio=r10,r20": [
        *SMALL, *TINY, "evaluation=zero_shot", "evaluation.data=.", *QUICK, "recovery=none", "hydra.sweep.dir=DIR",
        "evaluation.of=[pruned]",
    ],
    "slm-study status DIR": [],
    "slm-report outputs": [],
    'slm-report outputs/sweeps --metric "pruned/average" --x parameters --series method': [],
    'slm-report outputs/runs --sort-by "recovered/average" --format md,csv': [],
    "slm-analyze similarity": [*SMALL[:4], TINY[0], *TEXT, "analysis.minibatch=4"],
    "slm-analyze painters": [*SMALL[:4], TINY[0], *TEXT],
    "slm-analyze dynamic-skip analysis.plans=plan.json": [*SMALL[:4], TINY[0], *TEXT],
    "slm-export gguf RUN --type q8_0": [],
    "slm-export padded RUN --out FOLDER": [],
    "slm-export card RUN": [],
    "slm-export hub RUN --repo ME/NAME --dry-run": [],
    "slm-bench methods": ["angular", *SMALL[:4], *TEXT],
    "slm-bench search": ["sleb", *SMALL[:4], *TEXT],
    "slm-store list": [],
    "slm-store verify": [],
    "slm-store clean": [],
}  # fmt: skip
