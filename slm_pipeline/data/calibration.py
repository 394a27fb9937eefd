"""The text a method looks at: where it comes from and which tokens of it."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.assets import texts
from slm_pipeline.config import CalibrationConfig
from slm_pipeline.data import hub
from slm_pipeline.data.files import check_text, read_text
from slm_pipeline.data.tokens import text_tokens, tokenized
from slm_pipeline.errors import UserError
from slm_pipeline.machine import memory
from slm_pipeline.show.progress import ProgressBar

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.context import Context

log = logging.getLogger(__name__)

SAMPLING = ("random", "contiguous")
BUNDLED_TEXT = "lambada"
INSTEAD = "calibration=bundled or calibration=text_file"  # of a hub


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub, read as parquet or JSON files; a local folder of the same layout may stand for it."""

    repo: str
    files: str  # pattern of the files of the split, relative to the repository
    column: str = "text"


HUB_SETS = {
    "bookcorpus": HubSet("bookcorpus/bookcorpus", "plain_text/train-*.parquet"),
    "c4": HubSet("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1/train-*.parquet"),
    "slimpajama": HubSet("DKYoon/SlimPajama-6B", "data/train-*.parquet"),
}
LONGEST = 20_000_000  # characters of one text that are all tokenised for random samples
SOURCES = ("bundled", "text_file", *HUB_SETS)


@dataclass(frozen=True)
class Samples:
    """Calibration tokens.

    Attributes:
        input_ids: [num_samples, seq_len] int64.
        ids: for each sample what it is cut from: {"row", "start"} of a data set's row and the token in it, or
            {"start"} of one long text, or {"character"} of a very long one.
        mode: documents | long_text | contiguous.
        fingerprint: sha256 of the token ids.
    """

    input_ids: Tensor
    ids: list[dict[str, int]]
    mode: str
    fingerprint: str


@dataclass(frozen=True)
class Calibration:
    """The group ``calibration``: the text that a method looks at.

    Attributes:
        data_dir: where a relative ``calibration.path`` is looked up; None: the working directory.
        draw: whose random samples they are: with the same seed another draw has others, though they may overlap.

    Raises:
        UserError: an unknown source or sampling, or more tokens than memory holds.
    """

    options: CalibrationConfig
    data_dir: Path | None
    draw: str = ""

    def __post_init__(self) -> None:
        options = self.options
        if options.source not in SOURCES:
            raise UserError(f"calibration.source={options.source!r} is not one of {', '.join(SOURCES)}")
        if options.sampling not in SAMPLING:
            raise UserError(f"calibration.sampling={options.sampling!r} is not one of {', '.join(SAMPLING)}")
        if (size := 8 * options.num_samples * options.seq_len) > (there := memory.of_machine()):  # int64
            raise UserError(
                f"calibration.num_samples={options.num_samples} x calibration.seq_len={options.seq_len} tokens take"
                f" {size / 1e9:.0f} GB and this machine has {there / 1e9:.0f} GB:"
                f" num_samples={there // 8 // options.seq_len} of this length fit"
            )

    def check(self, context: Context) -> None:
        """Find the text; see `identity`."""
        self.identity()

    def identity(self) -> dict[str, Any]:
        """What the samples are, apart from the tokenizer.

        Raises:
            UserError: a missing file or one that is too short or not UTF-8, or neither the hub nor its cache has the
                data set.
        """
        return {
            "text": self._text_identity,
            "num_samples": self.options.num_samples,
            "seq_len": self.options.seq_len,
            "sampling": self.options.sampling,
            "seed": self.options.seed if self.options.sampling == "random" else None,
            **({"bos": True} if self.options.bos else {}),
            **({"draw": self.draw} if self.draw and self.options.sampling == "random" else {}),
        }

    def sample(self, tokenizer: Any) -> Samples:
        """Cut ``num_samples`` pieces of ``seq_len`` tokens; with ``bos`` the first of each is BOS.

        ``contiguous``: the text as it is, tokenised without special tokens, its first num_samples x seq_len tokens cut
        in order. ``random``: of a data set, rows drawn at random, each tokenised with special tokens and used once if
        it has at least seq_len tokens, then a random slice of it (so without ``bos`` BOS is there only in a slice that
        starts at 0, if the tokenizer puts it there); of
        one long text, uniform start offsets, of tokens; of a text above `LONGEST` characters, from which the samples
        take little, of characters, so that only what is near them is tokenised, with a log line. The bundled passages
        are short: if too few of them are long enough, they are joined to one long text, with a log line.

        Raises:
            UserError: the text is shorter than the samples need, or the tokenizer has no BOS token.
        """
        if not self.options.bos:
            return self._cut(tokenizer, self.options)
        if tokenizer.bos_token_id is None:
            raise UserError("calibration.bos=true: the model's tokenizer has no BOS token")
        if self.options.seq_len < 2:
            raise UserError("calibration.seq_len=1 leaves no token of the text after BOS; it must be at least 2")
        cut = self._cut(tokenizer, replace(self.options, seq_len=self.options.seq_len - 1))
        pieces = [[tokenizer.bos_token_id, *piece] for piece in cut.input_ids.tolist()]
        return _samples(pieces, cut.ids, cut.mode)

    def _cut(self, tokenizer: Any, config: CalibrationConfig) -> Samples:
        if config.source == "text_file":
            text = self._text()
            rows: Sequence[str] = []
        else:
            rows = self._rows()
            text = ""
        needed = config.num_samples * config.seq_len
        if config.sampling == "contiguous":
            token_ids = _prefix_tokens(tokenizer, [text] if text else rows, needed)
            return _contiguous(token_ids, config)
        if not rows:
            if _starts_at_characters(config, len(text)):
                log.info("the text has %.0f million characters: samples start at characters of it", len(text) / 1e6)
                return _near_characters(text, tokenizer, config, self._generator())
            return _long_text(text_tokens(tokenizer, text), config, self._generator())
        try:
            return _documents(rows, tokenizer, config, self._generator())
        except _TooFewDocuments as error:
            if config.source != "bundled":
                raise UserError(str(error)) from error
            log.info("%s: the passages are joined to one long text", error)
            return _long_text(text_tokens(tokenizer, "\n".join(rows)), config, self._generator())

    def _generator(self) -> random.Random:
        return random.Random(f"{self.draw} {self.options.seed}" if self.draw else self.options.seed)

    @cached_property
    def _text_identity(self) -> str:
        config = self.options
        if config.source == "bundled":
            if config.path is not None:
                raise UserError(f"calibration.path={config.path} needs calibration=text_file, not bundled")
            return f"bundled:{BUNDLED_TEXT}:{texts.texts_fingerprint(BUNDLED_TEXT)}"
        if config.source == "text_file":
            text = self._text()
            content = text.encode()
            if len(content) < config.num_samples * config.seq_len:  # a token is a byte or more
                raise UserError(f"calibration.path={config.path!r} has {len(content)} bytes; {_needs(config)} tokens")
            starts = ":starts at characters" if _starts_at_characters(config, len(text)) else ""
            return f"file:{hashlib.sha256(content).hexdigest()[:16]}{starts}"
        hub_set = HUB_SETS[config.source]
        if config.path is None:
            place = hub.identity(hub_set.repo, f"calibration={config.source}", INSTEAD, files=hub_set.files)
            return f"hub:{place}:{hub_set.files}"
        folder = find_file(config.path, self.data_dir, "calibration.path")
        files = sorted(folder.glob(hub_set.files))
        if not files:
            raise UserError(
                f"calibration.path={config.path!r} has no file {hub_set.files}, the layout of {hub_set.repo}"
            )
        return f"folder:{hub.files_digest(folder, files)}"

    def _text(self) -> str:
        path = self.options.path
        if not path:
            raise UserError("calibration=text_file needs calibration.path=FILE")
        return read_text(find_file(path, self.data_dir, "calibration.path"), f"calibration.path={path!r}")

    def _rows(self) -> Sequence[str]:
        config = self.options
        if config.source == "bundled":
            return texts.bundled_texts(BUNDLED_TEXT)
        hub_set = HUB_SETS[config.source]
        option = f"calibration={config.source}"
        place = str(find_file(config.path, self.data_dir, "calibration.path")) if config.path else hub_set.repo
        rows = hub.load(place, option, INSTEAD, data_files={"train": hub_set.files}, split="train")
        return hub.column(rows, hub_set.column, option)  # a lazy column: rows are read as they are asked for


def find_file(path: str, data_dir: Path | None, option: str) -> Path:
    """``path`` itself if absolute, else below ``data_dir`` or the working directory.

    Raises:
        UserError: nothing is there.
    """
    found = (data_dir or Path.cwd()) / Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{option}={path!r} does not exist" + (f" in data_dir={data_dir}" if data_dir else ""))
    return found


class _TooFewDocuments(Exception):
    pass


def _prefix_tokens(tokenizer: Any, rows: Iterable[str], needed: int) -> list[int]:
    """Tokens of the rows joined by blank lines, of only as many rows as give ``needed`` tokens and some to spare."""
    taken: list[str] = []
    num_characters, wanted = 0, 8 * needed
    token_ids: list[int] = []
    for number, row in enumerate(rows, start=1):
        check_text(row, f"calibration: row {number}", empty=True)
        taken.append(row)
        num_characters += len(row) + 2
        if num_characters >= wanted:
            token_ids = text_tokens(tokenizer, "\n\n".join(taken), needed + 1)
            if len(token_ids) > needed:
                return token_ids
            wanted *= 2
    return text_tokens(tokenizer, "\n\n".join(taken), needed)


def _check_length(token_ids: list[int], config: CalibrationConfig) -> None:
    if len(token_ids) < config.num_samples * config.seq_len:
        raise UserError(f"the calibration text has {len(token_ids)} tokens; {_needs(config)}")


def _needs(config: CalibrationConfig) -> str:
    needed = config.num_samples * config.seq_len
    return f"calibration.num_samples={config.num_samples} x calibration.seq_len={config.seq_len} needs {needed}"


def _contiguous(token_ids: list[int], config: CalibrationConfig) -> Samples:
    _check_length(token_ids, config)
    starts = range(0, config.num_samples * config.seq_len, config.seq_len)
    return _samples(
        [token_ids[start : start + config.seq_len] for start in starts], [{"start": s} for s in starts], "contiguous"
    )


def _long_text(token_ids: list[int], config: CalibrationConfig, generator: random.Random) -> Samples:
    _check_length(token_ids, config)
    starts = [generator.randrange(len(token_ids) - config.seq_len + 1) for _ in range(config.num_samples)]
    return _samples([token_ids[s : s + config.seq_len] for s in starts], [{"start": s} for s in starts], "long_text")


def _starts_at_characters(config: CalibrationConfig, num_characters: int) -> bool:
    read = config.num_samples * near_characters(config.seq_len)
    return config.sampling == "random" and num_characters > max(LONGEST, read)


def near_characters(seq_len: int) -> int:
    """Characters from a start on that surely have ``seq_len`` tokens, unless most of them are blanks or the like."""
    return 32 * seq_len + 4096


def _near_characters(text: str, tokenizer: Any, config: CalibrationConfig, generator: random.Random) -> Samples:
    """Samples from uniform characters on; another is drawn for one that has too few tokens after it."""
    pieces: list[list[int]] = []
    ids: list[dict[str, int]] = []
    tries = 100 + 10 * config.num_samples
    with ProgressBar(total=config.num_samples, desc="calibration samples") as progress:
        for start in (generator.randrange(len(text)) for _ in range(tries)):
            begin = max(0, start - 256)  # the first token is one that it would be within the text
            before = len(text_tokens(tokenizer, text[begin:start]))
            token_ids = text_tokens(
                tokenizer, text[begin : start + near_characters(config.seq_len)], before + config.seq_len
            )[before:]
            if len(token_ids) < config.seq_len:
                continue
            pieces.append(token_ids)
            ids.append({"character": start})
            progress.update()
            if len(pieces) == config.num_samples:
                return _samples(pieces, ids, "long_text")
    raise UserError(
        f"the calibration text has calibration.seq_len={config.seq_len} tokens after only {len(pieces)} of {tries}"
        f" places that were drawn, calibration.num_samples={config.num_samples} are needed"
    )


def _documents(rows: Sequence[str], tokenizer: Any, config: CalibrationConfig, generator: random.Random) -> Samples:
    pieces: list[list[int]] = []
    ids: list[dict[str, int]] = []
    tried: set[int] = set()
    with ProgressBar(total=config.num_samples, desc="calibration samples") as progress:
        while len(pieces) < config.num_samples:
            if len(tried) == len(rows):
                raise _TooFewDocuments(
                    f"only {len(pieces)} of {len(rows)} rows have calibration.seq_len={config.seq_len} tokens,"
                    f" calibration.num_samples={config.num_samples} are needed"
                )
            row = generator.randrange(len(rows))
            if row in tried:
                continue
            tried.add(row)
            check_text(rows[row], f"calibration={config.source}: row {row + 1}", empty=True)
            token_ids = tokenized(tokenizer, rows[row], special=not config.bos)
            if len(token_ids) < config.seq_len:
                continue
            start = generator.randrange(len(token_ids) - config.seq_len + 1)
            pieces.append(token_ids[start : start + config.seq_len])
            ids.append({"row": row, "start": start})
            progress.update()
    return _samples(pieces, ids, "documents")


def _samples(pieces: list[list[int]], ids: list[dict[str, int]], mode: str) -> Samples:
    import torch

    input_ids = torch.tensor(pieces, dtype=torch.int64)
    return Samples(input_ids, ids, mode, hashlib.sha256(input_ids.numpy().tobytes()).hexdigest())
