"""Golden conversations and texts as prompts, and a rendered prompt as one string, to compare with the reference's."""

import re
from collections.abc import Iterable

from llm_service.prompt.dialogue import Dialogue, EmbeddingRef, Role, Segment, TextSegment, Turn, VisualSegment
from llm_service.prompt.template import IMG_CONTEXT, AnswerStart, Control, Piece, Placeholder, Text
from llm_service.prompt.text_stream import TextStream
from llm_service.prompt.tokenizer import Tokenizer
from tests.golden_cases import GoldenImage, GoldenTurn, pieces_of


def prompt_text(pieces: list[Piece]) -> str:
    """Return the prompt as the reference would write it, run by run."""
    return "".join(_written(piece) for piece in pieces)


def golden_dialogue(case: GoldenTurn, tokens_per_tile: int) -> Dialogue:
    """Return the dialogue of a golden case; its embeddings exist by name only."""
    groups = list(case.groups)
    said = []
    for role, text in case.tagged_texts:
        parts = pieces_of(text, groups) if role == "user" else [text]
        segments: list[Segment] = [
            TextSegment(part) if isinstance(part, str) else _visual(part, tokens_per_tile) for part in parts
        ]
        said.append(Turn(Role(role), tuple(segments)))
    return Dialogue(tuple(said), case.system_message)


def trusted_pieces(text: str, control: Iterable[str]) -> list[Piece]:
    """Split text as the reference does, which takes every control token in it for one."""
    names = sorted(control, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [Control(part) if part in names else Text(part) for part in parts if part]


def streamed_text(tokenizer: Tokenizer, token_ids: Iterable[int], stops: Iterable[str] = (), **kept: bool) -> str:
    """Return the pieces of a streamed answer, joined."""
    stream = TextStream(tokenizer, stops, **kept)
    return "".join([*map(stream.push, token_ids), stream.finish()])


def _visual(images: tuple[GoldenImage, ...], tokens_per_tile: int) -> VisualSegment:
    return VisualSegment(
        tuple(
            EmbeddingRef(image.name, image.num_tiles, image.num_tiles * tokens_per_tile, 64, "float32", "")
            for image in images
        )
    )


def _written(piece: Piece) -> str:
    match piece:
        case Control(token):
            return token
        case Text(text):
            return text
        case Placeholder():
            return IMG_CONTEXT * piece.length
        case AnswerStart():
            return ""
