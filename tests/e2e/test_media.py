"""Media without a question, against a running system."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image as Picture

from deploy.local import LocalStack
from internvl_client import CacheTier, Client, Image, InvalidRequestError, NotFoundError, Receipt

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def drawn(width: int, height: int, colour: str, kind: str = "JPEG") -> Image:
    content = BytesIO()
    Picture.new("RGB", (width, height), colour).save(content, kind)
    return Image.from_bytes(content.getvalue())


def test_a_question_about_a_prefetched_picture_waits_for_no_encoding(client: Client) -> None:
    picture = drawn(900, 450, "navy")
    receipt, error = client.prefetch([picture, Image.from_bytes(b"no picture")])
    assert isinstance(receipt, Receipt)
    assert receipt.cache_tier is CacheTier.NONE
    assert isinstance(error, InvalidRequestError)
    assert (error.reason, error.field) == ("MEDIA_UNREADABLE", "media[1]")
    (asked,) = client.ask(picture, "What?", max_output_tokens=2).receipts
    assert (asked.cache_hit, asked.num_tokens) == (True, receipt.num_tokens)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_an_estimate_is_what_the_picture_takes(client: Client, kind: str) -> None:
    picture = drawn(1000, 900, "teal", kind)
    found = client.estimate(picture)
    (receipt,) = client.prefetch([picture])
    assert isinstance(receipt, Receipt)
    assert (found.width, found.height) == (1000, 900)
    assert (found.columns, found.rows) == (receipt.columns, receipt.rows)
    assert (found.num_tiles, found.num_tokens) == (receipt.num_tiles, receipt.num_tokens)


def test_a_medium_that_was_deleted_is_in_no_cache(client: Client) -> None:
    picture = drawn(500, 500, "olive")
    client.upload(picture)
    receipts = client.prefetch([Image.from_digest(picture.digest), Image.from_digest(picture.digest, thumbnail=False)])
    assert [type(receipt) for receipt in receipts] == [Receipt] * 2
    client.delete_medium(picture)
    assert client.find_missing([picture.digest]) == [picture.digest]
    (missing,) = client.prefetch([Image.from_digest(picture.digest)])
    assert isinstance(missing, NotFoundError)
    (again,) = client.ask(picture, "What?", max_output_tokens=2).receipts
    assert again.cache_tier is CacheTier.NONE


def test_the_example_runs(stack: LocalStack, tmp_path: Path) -> None:
    picture = drawn(640, 480, "maroon").content
    assert picture is not None
    (tmp_path / "picture.jpg").write_bytes(picture)
    done = subprocess.run(
        [sys.executable, ROOT / "examples/prefetch.py", stack.address, tmp_path / "picture.jpg"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a cache held the picture" in done.stdout
