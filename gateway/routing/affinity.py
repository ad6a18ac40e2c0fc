"""What a prompt has in common with earlier ones: the key by which all of them go to the replica that has read it."""

from collections.abc import Iterable
from typing import Final

from gateway.prompt import Prompt, Segment, TextSegment, VisualSegment
from shared.digest import digest_of

_HEAD_CHARACTERS: Final = 1024  # some 16 blocks of the KV cache: what begins alike for so long is worth finding again


def affinity_of(prompt: Prompt) -> str:
    """Return the key of a prompt: the first turn's first medium, by far the most of it, else how the prompt begins.

    All turns of a dialogue have the same one, and so have questions that begin with one picture, and those that a long
    system message precedes. What comes after the first turn counts for nothing: only equal beginnings are found again.
    """
    first = prompt.turns[0].segments if prompt.turns else ()
    for segment in first:
        if isinstance(segment, VisualSegment) and segment.handles:
            return f"medium:{segment.handles[0].digest}"
    return f"head:{digest_of(_head(prompt.system_message or '', first).encode())}"


def _head(said: str, segments: Iterable[Segment]) -> str:
    for segment in segments:
        if len(said) >= _HEAD_CHARACTERS:
            break
        said += f"\n{segment.text[:_HEAD_CHARACTERS]}" if isinstance(segment, TextSegment) else ""
    return said[:_HEAD_CHARACTERS]
