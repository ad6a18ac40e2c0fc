"""Turns the model card's tagged text (`<image>` placeholders) into parts and messages of this API."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from internvl_client.types import Image, ImageGroup, Message, Part

IMAGE_TAG: Final = "<image>"


def parts_from_card(
    question: str, images: Sequence[Image], num_patches_list: Sequence[int] | None = None
) -> tuple[Part, ...]:
    """Return the parts of a first question whose prompt is exactly that of the card's `model.chat(...)`.

    Without a tag, `<image>` and a newline go in front. Without `num_patches_list` all pictures stand at the first tag
    as one run of tiles, the combined form; with it, one entry per picture, each picture stands at its own tag. (The
    server counts the tiles: only the list's length matters.) Tags that are left over stay literal text.

    Raises `ValueError` when there are more pictures than tags, when `num_patches_list` does not have an entry per
    picture, when several pictures meet several tags without it, and for the one thing that this API cannot say: a tag
    followed directly by another tag or by text that does not begin with white space.
    """
    return messages_from_card(question, images, num_patches_list)[-1].parts


def messages_from_card(
    question: str,
    images: Sequence[Image],
    num_patches_list: Sequence[int] | None = None,
    history: Iterable[tuple[str, str]] | None = None,
) -> list[Message]:
    """Return the dialogue that the card's `model.chat(..., history=history)` means; see `parts_from_card`.

    As on the card, pictures take the tags of old questions first, and no tag is added where there is a history.
    """
    if history is None and images and IMAGE_TAG not in question:
        question = f"{IMAGE_TAG}\n{question}"
    turns = list(history or ())
    num_tags = sum(asked.count(IMAGE_TAG) for asked in [*(asked for asked, _ in turns), question])
    runs = deque(_runs(images, num_patches_list, num_tags))
    messages: list[Message] = []
    for asked, answered in turns:
        messages += [Message.user(*_filled(asked, runs)), Message.assistant(answered)]
    return [*messages, Message.user(*_filled(question, runs))]


def _runs(images: Sequence[Image], num_patches_list: Sequence[int] | None, num_tags: int) -> list[Image | ImageGroup]:
    """Return what stands at each tag."""
    if num_patches_list is not None and len(num_patches_list) != len(images):
        raise ValueError(f"num_patches_list has {len(num_patches_list)} entries for {len(images)} pictures.")
    if num_patches_list is None and len(images) > 1:
        if num_tags > 1:
            raise ValueError(
                f"{num_tags} {IMAGE_TAG} tags and {len(images)} pictures: give num_patches_list an entry per picture "
                "to put each at its own tag."
            )
        runs: list[Image | ImageGroup] = [ImageGroup(tuple(images))]
    else:
        runs = list(images)
    if len(runs) > num_tags:
        raise ValueError(f"There are {len(runs)} pictures to place but {num_tags} {IMAGE_TAG} tags.")
    return runs


def _filled(text: str, runs: deque[Image | ImageGroup]) -> list[Part]:
    parts: list[Part] = []
    while runs and IMAGE_TAG in text:
        before, _, text = text.partition(IMAGE_TAG)
        _check_gap(parts, before)
        parts += [before, runs.popleft()] if before else [runs.popleft()]
    _check_gap(parts, text or " ")
    return [*parts, text] if text else parts


def _check_gap(parts: list[Part], following: str) -> None:
    if parts and not following[:1].isspace():
        raise ValueError(
            f"Put white space after {IMAGE_TAG}: the server would insert a newline before {following[:20]!r}."
            if following
            else f"Put white space between {IMAGE_TAG} tags: the server would insert a newline."
        )
