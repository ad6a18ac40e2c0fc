"""Turns a rendered prompt into token ids and placeholder ranges. Pictures are placed by structure, never by search."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.template import IMG_CONTEXT, AnswerStart, Control, Piece, Placeholder, Text
from llm_service.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """Positions `start` to `start + length` of a prompt, which the rows from `offset` on of one embedding take."""

    start: int
    length: int
    ref: EmbeddingRef
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt's ids, with the context token at every placeholder, and where each embedding goes, in order.

    `answer_starts` are the positions of the first token of each of the model's turns; the last is the prompt's length.
    """

    ids: tuple[int, ...]
    placeholders: tuple[PlaceholderRange, ...] = ()
    answer_starts: tuple[int, ...] = ()

    @property
    def num_visual_tokens(self) -> int:
        """Positions that stand for media."""
        return sum(placeholder.length for placeholder in self.placeholders)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring texts as one, and the places in it where turns of the model's begin."""

    text: str
    markup: bool = False
    starts: tuple[int, ...] = ()


_Item = Control | Placeholder | _Run


def splice(pieces: list[Piece], tokenizer: Tokenizer) -> PromptTokens:
    """Return the prompt's tokens. Neighbouring texts are encoded as one, as the reference encodes them."""
    context_id = tokenizer.token_id(IMG_CONTEXT)
    ids = list(tokenizer.bos_ids)
    placeholders: list[PlaceholderRange] = []
    answer_starts: list[int] = []
    for item in _trimmed(_opened(list(_joined(pieces)), tokenizer), tokenizer):
        match item:
            case Control(token):
                ids.append(tokenizer.token_id(token))
            case Placeholder(ref, offset, length):
                placeholders.append(PlaceholderRange(len(ids), length, ref, offset))
                ids += [context_id] * length
            case _Run(text, markup, starts):
                answer_starts += [len(ids) + len(tokenizer.encode(text[:start])) for start in starts]
                ids += tokenizer.encode(text, markup=markup)
    return PromptTokens(tuple(ids), tuple(placeholders), tuple(answer_starts))


def _joined(pieces: list[Piece]) -> Iterator[_Item]:
    for _, group in groupby(pieces, key=lambda piece: isinstance(piece, Text | AnswerStart)):
        texts: list[Text] = []
        starts: list[int] = []
        for piece in group:
            match piece:
                case Text():
                    texts.append(piece)
                case AnswerStart():
                    starts.append(sum(len(text.text) for text in texts))
                case Control() | Placeholder():
                    yield piece
        if texts or starts:
            yield _Run("".join(text.text for text in texts), any(text.markup for text in texts), tuple(starts))


def _opened(items: list[_Item], tokenizer: Tokenizer) -> list[_Item]:
    """Put the space before the whole prompt with which some families begin it, as if it began with a word."""
    if not tokenizer.opens_with_space or not items:
        return items
    match items[0]:
        case _Run(text, markup, starts):
            return [_Run(" " + text, markup, tuple(start + 1 for start in starts)), *items[1:]]
        case Control(token) if tokenizer.token_id(token) in tokenizer.hidden_ids:
            return items
        case _:
            return [_Run(" "), *items]


def _trimmed(items: list[_Item], tokenizer: Tokenizer) -> Iterator[_Item]:
    """Take away the white space that control tokens swallow before or behind them."""
    for before, item, after in zip([None, *items], items, [*items[1:], None], strict=False):
        if isinstance(item, _Run):
            yield _without_space(
                item,
                left=isinstance(before, Control) and tokenizer.takes_space_behind(before.token),
                right=isinstance(after, Control) and tokenizer.takes_space_before(after.token),
            )
        else:
            yield item


def _without_space(run: _Run, *, left: bool, right: bool) -> _Run:
    text = run.text.lstrip() if left else run.text
    taken = len(run.text) - len(text)
    text = text.rstrip() if right else text
    return replace(run, text=text, starts=tuple(min(max(start - taken, 0), len(text)) for start in run.starts))
