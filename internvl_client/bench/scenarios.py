"""Workloads by name: what a system for pictures and text meets, each in its simplest form."""

from collections.abc import Mapping
from typing import Final

from internvl_client.bench.workload import Workload

_TWELVE_TILES: Final = (1344, 1792)  # cut into 3 x 4 tiles, and a thumbnail

SCENARIOS: Final[Mapping[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload("text1"),
        Workload("text16", dialogues=16),
        Workload("single", pictures=1),
        Workload("same", pictures=1, asked_before=True),
        Workload("distinct8", pictures=1, dialogues=8),
        Workload("same8", pictures=1, dialogues=8, same_pictures=True),
        Workload("turns4", pictures=1, turns=4),
        Workload("prefill", prompt_tokens=3300, output_tokens=16),
        Workload("tiles12", pictures=1, picture_size=_TWELVE_TILES, output_tokens=16),
    )
}
DESCRIPTIONS: Final[Mapping[str, str]] = {
    "text1": "one question without a picture",
    "text16": "16 questions without a picture, all at once",
    "single": "one question about a new picture of one tile",
    "same": "another question about a picture that was asked about before",
    "distinct8": "8 questions at once, each about a new picture of its own",
    "same8": "8 questions at once about one new picture",
    "turns4": "4 questions, one after another, about one new picture",
    "prefill": "a long text, and a short answer",
    "tiles12": "a new picture of 12 tiles and a thumbnail, and a short answer",
}
