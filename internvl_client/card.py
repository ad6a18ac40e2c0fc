"""Turns the model card's tagged text (`<image>` and `<video>` placeholders) into parts and messages of this API."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from internvl_client.content import Image, ImageGroup, Media, Message, Part, Video

IMAGE_TAG: Final = "<image>"
VIDEO_TAG: Final = "<video>"
_TAG: Final = re.compile(f"{IMAGE_TAG}|{VIDEO_TAG}")


def parts_from_card(
    question: str,
    media: Sequence[Media],
    num_patches_list: Sequence[int] | None = None,
    *,
    literal_tags: bool = False,
) -> tuple[Part, ...]:
    """Return the parts of a first question whose prompt is exactly that of the card's `model.chat(...)`.

    Without a tag, `<image>` (or `<video>`) and a newline go in front. Without `num_patches_list` all pictures stand at
    the first `<image>` as one run of tiles, the combined form; with it, one entry per picture, each picture stands at
    its own tag. (The server counts the tiles: only the list's length matters.) Videos stand at the `<video>` tags in
    order; the server writes the card's `Frame1: ` lines there.

    Raises `ValueError` when there are more media than tags, or more tags than media unless `literal_tags` leaves those
    in the text, as the card does; when `num_patches_list` does not have an entry per picture; when several pictures
    meet several tags without it; and for the one thing that this API cannot say: a tag followed directly by another
    tag or by text that does not begin with white space.
    """
    return messages_from_card(question, media, num_patches_list, literal_tags=literal_tags)[-1].parts


def messages_from_card(
    question: str,
    media: Sequence[Media],
    num_patches_list: Sequence[int] | None = None,
    history: Iterable[tuple[str, str]] | None = None,
    *,
    literal_tags: bool = False,
) -> list[Message]:
    """Return the dialogue that the card's `model.chat(..., history=history)` means; see `parts_from_card`.

    As on the card, media take the tags of old questions first, and no tag is added where there is a history.
    """
    if history is None and media:
        question = _tagged(question, media)
    turns = list(history or ())
    asked = "".join(text for text, _ in turns) + question
    images = [medium for medium in media if isinstance(medium, Image)]
    runs = _Runs(
        _image_runs(images, num_patches_list, asked.count(IMAGE_TAG)),
        [medium for medium in media if isinstance(medium, Video)],
    )
    runs.check(asked, literal_tags=literal_tags)
    messages: list[Message] = []
    for old_question, answered in turns:
        messages += [Message.user(*_filled(old_question, runs)), Message.assistant(answered)]
    return [*messages, Message.user(*_filled(question, runs))]


def batch_from_card(questions: Sequence[str], images: Sequence[Image | None]) -> list[tuple[Part, ...]]:
    """Return the items that the card's `model.batch_chat(...)` means, one picture or none for each question.

    Raises `ValueError` where the lists differ in length, and as `parts_from_card` does.
    """
    if len(questions) != len(images):
        raise ValueError(f"There are {len(questions)} questions for {len(images)} pictures.")
    return [
        parts_from_card(question, [image] if image else []) for question, image in zip(questions, images, strict=True)
    ]


class _Runs:
    """What stands at the tags of each kind, in order."""

    def __init__(self, images: Sequence[Part], videos: Sequence[Part]) -> None:
        self._left: dict[str, deque[Part]] = {IMAGE_TAG: deque(images), VIDEO_TAG: deque(videos)}

    def check(self, text: str, *, literal_tags: bool) -> None:
        """Raise `ValueError` unless there is one medium for each tag."""
        for tag, kind in ((IMAGE_TAG, "pictures"), (VIDEO_TAG, "videos")):
            num_media, num_tags = len(self._left[tag]), text.count(tag)
            if num_media > num_tags:
                raise ValueError(f"There are {num_media} {kind} to place but {num_tags} {tag} tags.")
            if num_media < num_tags and not literal_tags:
                raise ValueError(
                    f"There are {num_tags} {tag} tags but {num_media} {kind} to place. With literal_tags=True the tags "
                    "that are left over stay text."
                )

    def take(self, tag: str) -> Part | None:
        """Return what stands at the next tag of this kind; None: the tag is text."""
        left = self._left[tag]
        return left.popleft() if left else None


def _tagged(question: str, media: Sequence[Media]) -> str:
    """Return the question with a tag in front for each kind of media that has none."""
    kinds = {VIDEO_TAG if isinstance(medium, Video) else IMAGE_TAG for medium in media}
    for tag in sorted(kinds, reverse=True):
        if tag not in question:
            question = f"{tag}\n{question}"
    return question


def _image_runs(
    images: Sequence[Image], num_patches_list: Sequence[int] | None, num_tags: int
) -> Sequence[Image | ImageGroup]:
    if num_patches_list is not None and len(num_patches_list) != len(images):
        raise ValueError(f"num_patches_list has {len(num_patches_list)} entries for {len(images)} pictures.")
    if num_patches_list is not None or len(images) < 2:
        return images
    if num_tags > 1:
        raise ValueError(
            f"{num_tags} {IMAGE_TAG} tags and {len(images)} pictures: give num_patches_list an entry per picture "
            "to put each at its own tag."
        )
    return [ImageGroup(tuple(images))]


def _filled(text: str, runs: _Runs) -> list[Part]:
    parts: list[Part] = []
    said = ""
    position = 0
    for tag in _TAG.finditer(text):
        said += text[position : tag.start()]
        position = tag.end()
        medium = runs.take(tag[0])
        if medium is None:
            said += tag[0]
            continue
        _check_gap(parts, said)
        parts += [said, medium] if said else [medium]
        said = ""
    said += text[position:]
    _check_gap(parts, said or " ")
    return [*parts, said] if said else parts


def _check_gap(parts: list[Part], following: str) -> None:
    if parts and not following[:1].isspace():
        raise ValueError(
            f"Put white space after a tag: the server would insert a newline before {following[:20]!r}."
            if following
            else "Put white space between tags: the server would insert a newline."
        )
