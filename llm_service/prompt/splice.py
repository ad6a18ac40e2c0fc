"""Turns a rendered prompt into token ids and placeholder ranges. Pictures are placed by structure, never by search."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.template import IMG_CONTEXT, Control, Piece, Placeholder, Text
from llm_service.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """Positions `start` to `start + length` of a prompt, which one embedding's visual tokens take."""

    start: int
    length: int
    ref: EmbeddingRef


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt's ids, with the context token at every placeholder, and where each embedding goes, in order."""

    ids: tuple[int, ...]
    placeholders: tuple[PlaceholderRange, ...] = ()

    @property
    def num_visual_tokens(self) -> int:
        """Positions that stand for media."""
        return sum(placeholder.length for placeholder in self.placeholders)


def splice(pieces: list[Piece], tokenizer: Tokenizer) -> PromptTokens:
    """Return the prompt's tokens. Neighbouring texts are encoded as one, as the reference encodes them."""
    context_id = tokenizer.token_id(IMG_CONTEXT)
    ids = list(tokenizer.bos_ids)
    placeholders = []
    for piece in _joined(pieces):
        match piece:
            case Control(token):
                ids.append(tokenizer.token_id(token))
            case Text(text, markup):
                ids += tokenizer.encode(text, markup=markup)
            case Placeholder(ref):
                placeholders.append(PlaceholderRange(len(ids), ref.token_count, ref))
                ids += [context_id] * ref.token_count
    return PromptTokens(tuple(ids), tuple(placeholders))


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, Text)):
        if is_text:
            texts = [piece for piece in group if isinstance(piece, Text)]
            yield Text("".join(piece.text for piece in texts), any(piece.markup for piece in texts))
        else:
            yield from group
