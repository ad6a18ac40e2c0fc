"""The golden conversations as dialogues: which pictures go where, and what the reference made of them."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("internvl3-8b-tiny", "internvl2_5-4b-tiny", "internvl2-1b-tiny")
ALL_CHECKPOINTS = tuple(sorted(path.name for path in (GOLDEN / "checkpoints").iterdir()))

# Cases in which the reference turns what a client typed into control tokens. Here typed text stays text, so prompt ids
# and everything after them differ on purpose.
UNSAFE_CASES = {
    "literal_special_text": "the reference reads the typed <|im_end|> and <ref> as control tokens",
    "img_context_in_text_without_image": "the reference reads the typed <IMG_CONTEXT> as a placeholder",
}


@dataclass(frozen=True)
class GoldenImage:
    """An encoded picture and the most tiles it may be cut into."""

    name: str
    content: bytes
    max_tiles: int
    num_tiles: int


@dataclass(frozen=True)
class GoldenTurn:
    """One call of the reference. `groups` are the pictures of each `<image>` tag, in text order."""

    checkpoint: str
    name: str
    question: str
    history: tuple[tuple[str, str], ...]
    groups: tuple[tuple[GoldenImage, ...], ...]
    system_message: str | None
    config: dict[str, Any]
    prompt: str
    input_ids: list[int]
    output_ids: list[int]
    response: str
    first_logits: Any = field(repr=False)

    @property
    def tagged_texts(self) -> Iterator[tuple[str, str]]:
        """Role and text of every turn, `<image>` tags included."""
        for question, answer in self.history:
            yield "user", question
            yield "assistant", answer
        yield "user", self.question


def turns(checkpoint: str) -> list[GoldenTurn]:
    """Return every case of a checkpoint that the reference answered, multi-turn and batch cases in their parts."""
    cases = json.loads((GOLDEN / "expected" / checkpoint / "cases.json").read_text())["cases"]
    return [turn for case in cases if not case["name"].startswith("err_") for turn in _turns_of(checkpoint, case)]


def header(checkpoint: str) -> dict[str, Any]:
    """Return what the reference says of a checkpoint as a whole: ids of control tokens, sizes, the template."""
    cases = json.loads((GOLDEN / "expected" / checkpoint / "cases.json").read_text())
    return {key: value for key, value in cases.items() if key != "cases"}


def pieces_of(text: str, groups: list[tuple[GoldenImage, ...]]) -> list[str | tuple[GoldenImage, ...]]:
    """Split a user's tagged text at `<image>`, taking a group for each tag until none is left."""
    parts: list[str | tuple[GoldenImage, ...]] = []
    for index, chunk in enumerate(text.split("<image>")):
        if index and groups:
            parts += [groups.pop(0), chunk]
        elif index:
            parts[-1] = f"{parts[-1]}<image>{chunk}"
        else:
            parts.append(chunk)
    return [part for part in parts if part]


def expand(prompt: str) -> str:
    """Write out the runs that the golden files shorten to `<IMG_CONTEXT>*N`."""
    return re.sub(r"<IMG_CONTEXT>\*(\d+)", lambda match: "<IMG_CONTEXT>" * int(match[1]), prompt)


def _turns_of(checkpoint: str, case: dict[str, Any]) -> Iterator[GoldenTurn]:
    if case["kind"] == "batch":
        yield from _batch_rows(checkpoint, case)
        return
    images = _images(checkpoint, case)
    for index, turn in enumerate(case.get("turns", [case])):
        suffix = f".{index}" if "turns" in case else ""
        yield _turn(checkpoint, case, {**case, **turn}, case["name"] + suffix, images)


def _turn(
    checkpoint: str, case: dict[str, Any], turn: dict[str, Any], name: str, images: list[GoldenImage]
) -> GoldenTurn:
    question = turn["question"]
    if turn["history_in"] is None and images and "<image>" not in question:
        question = f"<image>\n{question}"
    return GoldenTurn(
        checkpoint=checkpoint,
        name=name,
        question=question,
        history=tuple((asked, answered) for asked, answered in turn["history_in"] or ()),
        groups=_groups(images, case["num_patches_list"]),
        system_message=turn.get("system_message"),
        config=case["generation_config"],
        prompt=expand(turn["prompt"]),
        input_ids=turn["input_ids"],
        output_ids=turn["output_ids"],
        response=turn["response"],
        first_logits=_first_logits(checkpoint, f"{name}.first_logits"),
    )


def _first_logits(checkpoint: str, name: str) -> Any:
    """Return the reference's logits [vocab] after the prompt; None for a beam search, which recorded none."""
    tensors = _tensors(checkpoint)
    return tensors[name][0] if name in tensors else None


def _batch_rows(checkpoint: str, case: dict[str, Any]) -> Iterator[GoldenTurn]:
    images = _images(checkpoint, case)
    stop_id = json.loads((GOLDEN / "expected" / checkpoint / "cases.json").read_text())["eos_token_id"]
    for row, question in enumerate(case["questions"]):
        own = [images[row]] if images else []
        tagged = f"<image>\n{question}" if own and "<image>" not in question else question
        output = case["output_ids"][row]
        end = output.index(stop_id) + 1 if stop_id in output else len(output)
        mask = case["attention_mask"][row]
        yield GoldenTurn(
            checkpoint=checkpoint,
            name=f"{case['name']}.{row}",
            question=tagged,
            history=(),
            groups=_groups(own, None),
            system_message=None,
            config=case["generation_config"],
            prompt=expand(case["prompt"][row]),
            input_ids=[token for token, kept in zip(case["input_ids"][row], mask, strict=True) if kept],
            output_ids=output[:end],
            response=case["responses"][row],
            first_logits=_tensors(checkpoint)[f"{case['name']}.first_logits"][row],
        )


def _groups(images: Sequence[GoldenImage], num_patches: list[int] | None) -> tuple[tuple[GoldenImage, ...], ...]:
    if not images:
        return ()
    if num_patches is None:
        return (tuple(images),)
    assert [image.num_tiles for image in images] == num_patches
    return tuple((image,) for image in images)


def _images(checkpoint: str, case: dict[str, Any]) -> list[GoldenImage]:
    if "video" in case:
        frames = _tensors(checkpoint)[f"video.{case['name']}.pixel_u8"]
        return [GoldenImage(f"frame{index}", png_of(frame), 1, 1) for index, frame in enumerate(frames)]
    return [
        GoldenImage(entry["file"], (GOLDEN / "images" / entry["file"]).read_bytes(), entry["max_num"], entry["n_tiles"])
        for entry in case["images"]
    ]


def png_of(frame: Any) -> bytes:
    """Return pixels [height, width, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(frame)).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def _tensors(checkpoint: str) -> dict[str, Any]:
    return load_file(GOLDEN / "expected" / checkpoint / "case_tensors.safetensors")
