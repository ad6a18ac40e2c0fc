"""A rendered prompt as one string, to compare with the reference's."""

from llm_service.prompt.template import IMG_CONTEXT, Control, Piece, Placeholder, Text


def prompt_text(pieces: list[Piece]) -> str:
    """Return the prompt as the reference would write it, run by run."""
    return "".join(_written(piece) for piece in pieces)


def _written(piece: Piece) -> str:
    match piece:
        case Control(token):
            return token
        case Text(text):
            return text
        case Placeholder(ref):
            return IMG_CONTEXT * ref.token_count
