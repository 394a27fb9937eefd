"""How long texts and examples for recovery training become tokens. Importing this module stays cheap: no torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_pipeline.data.examples import Example
from slm_pipeline.errors import UserError, refused_in_one_line
from slm_pipeline.show.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100  # label of a token that bears no loss

# The templates of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py).
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

Row = dict[str, list[int]]

PIECE = 1 << 20  # characters that are tokenized at once, unless the tokenizer must see all
_LONG = 4 * PIECE  # characters of which tokenizing is announced, as it takes seconds or more
_SEEN = 256  # characters on both sides of a cut that are looked at
_TRIES = 8  # places where a text may be cut, before it is taken whole
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=[^\W_])")


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, needed: int | None = None) -> list[int]:
    """Token ids of a text without special tokens, the same as of one call of the tokenizer with the whole.

    A long text is cut first, at a single space between two letters or digits, where the tokens on both sides do not
    depend on each other; that they do not is looked at with `_SEEN` characters on each side. Only as much is read as
    gives ``needed`` tokens; where it has no such place for long, some more than that. All of it is read in pieces of
    `PIECE` characters, with a progress bar, by a tokenizer whose tokens of a piece are those it has within the text;
    one that puts a space before every text (Llama 2) is given the whole.

    Args:
        needed: tokens from the start; None: all. There may be fewer.
    """
    if needed is not None:
        length = 8 * needed + 4096
        while length < len(text):
            latest = min(4 * length, len(text))
            end = _cut(tokenizer, text, length, latest, alone=False)
            _announce(end)
            ids = tokenized(tokenizer, text[:end], special=False)
            to_spare = _SEEN if end == latest < len(text) else 0  # cut anywhere, which changes the last tokens
            if len(ids) >= needed + to_spare or end == len(text):
                return ids[:needed]
            length = 2 * end
    _announce(len(text))
    ids = []
    start = 0
    with ProgressBar(total=len(text), desc="tokenize", unit="char", disable=len(text) <= PIECE) as progress:
        while start < len(text):
            end = _cut(tokenizer, text, start + PIECE, len(text), alone=True)
            ids += tokenized(tokenizer, text[start:end], special=False)
            progress.update(end - start)
            start = end
    return ids[:needed]


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, earliest: int, latest: int, *, alone: bool) -> int:
    """The first place from ``earliest`` on where the tokens before it do not depend on the text after it.

    ``alone``: and those after it not on the text before. ``latest`` if none of `_TRIES` places before that is one.
    """
    for _, space in zip(range(_TRIES), _BETWEEN_WORDS.finditer(text, earliest, latest), strict=False):
        place = space.start()
        both = tokenized(tokenizer, text[max(0, place - _SEEN) : place + _SEEN], special=False)
        before = tokenized(tokenizer, text[max(0, place - _SEEN) : place], special=False)
        after = tokenized(tokenizer, text[place : place + _SEEN], special=False) if alone else both[len(before) :]
        if before + after == both:
            return place
    return latest


def _announce(num_characters: int) -> None:
    """For a log file, which has no progress bar."""
    if num_characters > _LONG:
        log.info("tokenizing %.0f million characters, which may take minutes", num_characters / 1e6)


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Token ids of one call of the tokenizer, with the special tokens that it adds itself or without.

    Raises:
        UserError: the tokenizers library refuses the text, or the tokenizer's own settings.
    """
    with refused_in_one_line(f"the tokenizer {tokenizer.name_or_path} fails"):
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def prompt(example: Example) -> str:
    """The Alpaca prompt of an instruction, up to where the output begins."""
    template = PROMPT_WITH_INPUT if example["input"] else PROMPT_WITHOUT_INPUT
    return template.format(instruction=example["instruction"], input=example["input"])


def tokenize_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, cutoff_len: int, *, completion_only: bool = True
) -> list[Row]:
    """An example as rows of tokens: one, or several of a long text, or none if no token would bear loss.

    An instruction is its Alpaca prompt and its output, a chat what the tokenizer's own template makes of it; both end
    at ``cutoff_len``. A text is cut into pieces instead, and only a last piece of a single token is lost. BOS comes
    first if the tokenizer itself puts it there, EOS last if it fits; in a chat both are the template's affair.

    With ``completion_only`` loss is on the output and its EOS, or on the turns of the assistant as far as the template
    ends them; an assistant who speaks first answers nothing and bears none. Else it is on the prompts too. A text has
    no prompt: it bears loss either way. The first token of a row never does, as nothing predicts it.

    No token straddles a boundary: where the tokenizer would join the end of a prompt with the start of the output, the
    two are tokenized apart, which is what the model sees when it generates.

    Returns:
        ``input_ids``, ``labels`` (`IGNORED` where there is no loss) and ``attention_mask`` of each row: equally long
        lists, of 2 to ``cutoff_len`` tokens.

    Raises:
        UserError: a chat, and the tokenizer has no template for it or one that hides which tokens are the assistant's.
    """
    ids: list[int] = []
    labels: list[int] = []
    pieces = _pieces(tokenizer, example, completion_only)
    needed = None if "text" in example else cutoff_len
    begins_with_bos = tokenized(tokenizer, "a", special=True)[:1] == [tokenizer.bos_token_id]
    if begins_with_bos and "messages" not in example:
        ids, labels = [tokenizer.bos_token_id], [IGNORED]
    tokens_of = _tokenize_pieces(tokenizer, [text for text, _ in pieces], needed)
    for (_, learned), tokens in zip(pieces, tokens_of, strict=True):
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    if tokenizer.eos_token_id is not None and "messages" not in example:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    end = len(ids) if "text" in example else 1
    rows = [
        {
            "input_ids": ids[start : start + cutoff_len],
            "labels": [IGNORED, *labels[start + 1 : start + cutoff_len]],
            "attention_mask": [1] * len(ids[start : start + cutoff_len]),
        }
        for start in range(0, end, cutoff_len)
    ]
    return [row for row in rows if any(label != IGNORED for label in row["labels"])]


def tokenize_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], cutoff_len: int, *, completion_only: bool = True
) -> list[Row]:
    """The rows of all examples, see `tokenize_example`; says how many examples have none.

    Raises:
        UserError: no row is left, or as `tokenize_example`.
    """
    rows_of = [
        tokenize_example(tokenizer, example, cutoff_len, completion_only=completion_only)
        for example in ProgressBar(examples, "tokenize")
    ]
    if dropped := rows_of.count([]):
        log.warning("%d of %d examples dropped: no output within cutoff_len=%d", dropped, len(rows_of), cutoff_len)
    rows = [row for rows in rows_of for row in rows]
    if not rows:
        raise _nothing_left(cutoff_len, len(rows_of))
    return rows


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], cutoff_len: int, *, completion_only: bool = True
) -> None:
    """Tokenize examples up to the first that bears loss, and write out every chat: a template may refuse any of them.

    Raises:
        UserError: none does, or there is none, or as `tokenize_example`.
    """
    if chats := [example for example in examples if "messages" in example]:
        for chat in ProgressBar(chats, "check chats"):
            _pieces(tokenizer, chat, completion_only)
    for example in examples:
        begun = {**example, "text": example["text"][: 8 * cutoff_len + 4096]} if "text" in example else example
        if tokenize_example(tokenizer, begun, cutoff_len, completion_only=completion_only):
            return
    raise _nothing_left(cutoff_len, len(examples))


def _nothing_left(cutoff_len: int, num_examples: int) -> UserError:
    return UserError(f"recovery.cutoff_len={cutoff_len} leaves no output in any of the {num_examples} examples")


def _pieces(tokenizer: PreTrainedTokenizerBase, example: Example, completion_only: bool) -> list[tuple[str, bool]]:
    """An example as consecutive pieces of text, each with whether it bears loss."""
    if "text" in example:
        return [(example["text"], True)]
    if "messages" not in example:
        return [(prompt(example), not completion_only), (example["output"], True)]
    messages = example["messages"]
    chat = _render(tokenizer, messages)
    if not completion_only:
        return [(chat, True)]
    pieces = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:
            continue
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
        after = _render(tokenizer, messages[: number + 1])
        if not (chat.startswith(after) and after.startswith(before)):
            raise UserError(
                "the chat template of the tokenizer rewrites earlier turns when later ones follow, so that the"
                " assistant's tokens cannot be told apart; recovery.completion_only=false puts the loss on all tokens"
            )
        pieces += [(chat[done : len(before)], False), (chat[len(before) : len(after)], True)]
        done = len(after)
    return [*pieces, (chat[done:], False)]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UserError(
            "the recovery's data has chats, but the model's tokenizer has no chat template; take a model that has one,"
            " or instructions or texts"
        )
    with refused_in_one_line(f"the tokenizer {tokenizer.name_or_path} fails at a chat"):
        try:
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template of the tokenizer refuses a chat of {roles}: {error}") from error
    assert isinstance(rendered, str)
    return rendered


def _tokenize_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], needed: int | None) -> list[list[int]]:
    """Tokens of each piece of a text, together those of the text unless one would straddle a boundary.

    ``needed``: the first so many are enough.
    """
    found: list[list[int]] = []
    text = ""
    ids: list[int] = []
    for piece in pieces:
        text += piece
        longer = text_tokens(tokenizer, text, needed)
        if longer[: len(ids)] != ids:
            longer = ids + text_tokens(tokenizer, piece, needed)
        found.append(longer[len(ids) :])
        ids = longer
    return found
