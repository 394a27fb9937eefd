"""Which evaluation documents share text with training data, by GPT-3's rule (arXiv 2005.14165, appendix C).

Words are runs of letters and digits, lower-cased. A document overlaps if 13 of its words in a row are found in an
example, in that order; a document of 8 to 12 words, if all of them are. A shorter one is not counted at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from slm_pipeline.data.examples import Example

RUN = 13  # words
SHORTEST = 8  # words of the shortest document that is counted
PASSAGE = 200  # words; running text is counted in pieces of so many

_WORD = re.compile(r"[^\W_]+")


def overlaps(documents: Mapping[str, Sequence[str]], examples: Iterable[Example]) -> dict[str, dict[str, int]]:
    """How many documents of each name share a run of words with any of the examples.

    Args:
        documents: name -> texts.
        examples: of any kind, read one by one: what stays in memory are the documents and hashes of their runs. The
            strings of an example count as one text, in their order.

    Returns:
        name -> ``documents`` (those that overlap) and ``of`` (those of 8 words or more); only names where any overlaps.
    """
    lengths: set[int] = set()
    runs: set[int] = set()
    for words in map(_words, chain.from_iterable(documents.values())):
        if len(words) >= SHORTEST:
            lengths.add(min(len(words), RUN))
            runs.update(_runs(words, min(len(words), RUN)))
    shared: set[int] = set()
    for example in examples:
        words = _words(_text(example))
        for length in lengths:
            shared |= runs.intersection(_runs(words, length))
    found = {}
    for name, texts in documents.items():
        counted = [words for words in map(_words, texts) if len(words) >= SHORTEST]
        overlapping = sum(not shared.isdisjoint(_runs(words, min(len(words), RUN))) for words in counted)
        if overlapping:
            found[name] = {"documents": overlapping, "of": len(counted)}
    return found


def word_passages(text: str) -> list[str]:
    """Running text as documents of `PASSAGE` words, lower-cased and without anything between; the last is shorter."""
    words = _words(text)
    return [" ".join(words[start : start + PASSAGE]) for start in range(0, len(words), PASSAGE)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], length: int) -> Iterator[int]:
    """A hash of every run of ``length`` words: with 64 bits, two different ones hardly ever agree."""
    return map(hash, zip(*(words[start:] for start in range(length)), strict=False))


def _text(example: Example) -> str:
    if "messages" in example:
        return "\n".join(message["content"] for message in example["messages"])
    return "\n".join(example.values())
