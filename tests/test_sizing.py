"""The table of models is what the script writes, and its numbers are the weights'."""

import gzip
import json
from pathlib import Path

import pytest

from deploy.sizing import ROWS, document, sizing_of

ROOT = Path(__file__).parents[1]


def test_the_document_is_what_the_script_writes() -> None:
    assert (ROOT / "docs/models.md").read_text() == document(), "run python -m deploy.sizing > docs/models.md"


@pytest.mark.parametrize("name", ["InternVL2-26B", "InternVL3-8B"])
def test_both_services_together_keep_the_published_bytes(name: str) -> None:
    row = json.loads(gzip.decompress((ROWS / f"{name}.json.gz").read_bytes()))
    sizing = sizing_of(row)
    assert sizing.vision_bf16 + sizing.language_bf16 == row["bf16_bytes"]
    assert 0.5 < sizing.language_int8 / sizing.language_bf16 < 0.6


def test_the_cache_and_the_embedding_of_a_model_that_is_known() -> None:
    row = json.loads(gzip.decompress((ROWS / "InternVL3-8B.json.gz").read_bytes()))
    sizing = sizing_of(row)
    assert sizing.kv_per_token == 28 * 2 * 4 * 128 * 2
    assert sizing.embedding_per_tile == 256 * 3584 * 2
