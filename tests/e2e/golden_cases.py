"""The golden conversations as calls of the client."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from internvl_client import GenerationConfig, Image
from tests.golden_cases import CHECKPOINTS, GOLDEN, png_of


def checkpoint_directory(checkpoint: str) -> Path:
    """Return the folder that services are given."""
    return GOLDEN / "checkpoints" / checkpoint


def read_cases(checkpoint: str) -> dict[str, Any]:
    """Return cases.json of a checkpoint."""
    content: dict[str, Any] = json.loads((GOLDEN / "expected" / checkpoint / "cases.json").read_text(encoding="utf-8"))
    return content


def case_ids(kind: str) -> list[tuple[str, str]]:
    """Return checkpoint and name of every case of a kind that has an expected output."""
    return [
        (checkpoint, case["name"])
        for checkpoint in CHECKPOINTS
        for case in read_cases(checkpoint)["cases"]
        if kind_of(case) == kind
    ]


def kind_of(case: dict[str, Any]) -> str:
    """Return chat, turns, batch or error."""
    if case["name"].startswith("err_"):
        return "error"
    return "turns" if "turns" in case else str(case["kind"])


def find_case(checkpoint: str, name: str) -> dict[str, Any]:
    """Return a case by name."""
    found: dict[str, Any] = next(case for case in read_cases(checkpoint)["cases"] if case["name"] == name)
    return found


def images_of(checkpoint: str, case: dict[str, Any]) -> list[Image]:
    """Return the pictures of a case; the frames of a video as pictures of one tile."""
    if "video" in case:
        tensors = load_file(GOLDEN / "expected" / checkpoint / "case_tensors.safetensors")
        return [Image.from_bytes(png_of(frame), max_tiles=1) for frame in tensors[f"video.{case['name']}.pixel_u8"]]
    return [golden_image(image["file"], image["max_num"]) for image in case["images"]]


def golden_image(name: str, max_tiles: int) -> Image:
    """Return a picture of the golden set."""
    return Image.open(GOLDEN / "images" / name, max_tiles=max_tiles)


def config_of(case: dict[str, Any]) -> GenerationConfig:
    """Return the generation settings of a case."""
    given = case["generation_config"]
    return GenerationConfig(
        max_output_tokens=given["max_new_tokens"],
        repetition_penalty=given.get("repetition_penalty"),
        num_beams=given.get("num_beams"),
    )


def up_to_stop(token_ids: list[int], stop_id: int) -> list[int]:
    """Return the row of a batch without its padding."""
    return token_ids[: token_ids.index(stop_id) + 1] if stop_id in token_ids else token_ids
