"""Stored values hold the tensor exactly, and nothing that was changed is ever taken for it."""

import random
import struct
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.embedding import ITEM_BYTES, MAX_GROUP_BYTES, DataType, EmbeddingInfo, EmbeddingKey, VideoFrame, max_tiles
from shared.embedding_values import HEADER_BYTES, EmbeddingFormat
from shared.stored_name import StoredName, keys_of, name_of, tenant_tag_of
from tests.shared.stored import DIGEST, MEDIA
from tests.shared.stored import info_of as info

OTHER_DIGEST = "ef" * 32
NAME = EmbeddingKey(DIGEST, MEDIA, "acme").name
FORMAT = EmbeddingFormat("key")


def rows_of(of: EmbeddingInfo) -> list[bytes]:
    """Return the rows of each group."""
    payload = random.Random(0).randbytes(of.size_bytes)
    return [payload[of.group_slice(index)] for index in range(of.group_count)]


def group_values(of: EmbeddingInfo, name: StoredName = NAME, key: str = "key") -> list[bytes]:
    sealer = EmbeddingFormat(key)
    return [sealer.group_header(name, of, index, rows) + rows for index, rows in enumerate(rows_of(of))]


def verifies(of: EmbeddingInfo, index: int, value: bytes, name: StoredName = NAME) -> bool:
    return FORMAT.verify_group(name, of, index, value[:HEADER_BYTES], value[HEADER_BYTES:])


@settings(max_examples=60, deadline=None)
@given(
    tiles=st.integers(1, 14),
    tokens_per_tile=st.sampled_from([1, 16, 256]),
    hidden=st.sampled_from([8, 896, 4096, 8192]),
    data_type=st.sampled_from(list(ITEM_BYTES)),
)
def test_groups_hold_everything_within_the_limit(
    tiles: int, tokens_per_tile: int, hidden: int, data_type: DataType
) -> None:
    of = info(tiles, tokens_per_tile, hidden, data_type)
    assert of.group_bytes <= max(MAX_GROUP_BYTES, of.row_bytes)
    assert of.group_bytes % of.row_bytes == 0
    assert (of.group_count - 1) * of.group_bytes < of.size_bytes <= of.group_count * of.group_bytes


def test_a_row_of_int8_ends_with_its_scale() -> None:
    of = info(hidden=64, data_type="int8_rows")
    assert of.row_bytes == 68
    assert of.size_bytes == of.token_count * 68
    assert max_tiles(256, 3584, "int8_rows", 256 * 3588 * 3) == 3


@pytest.mark.parametrize(
    "of", [info(), info(1, 1, 1, "float32"), info(13, 256, 896), info(2, 256, 8192), info(5, 16, 8, "int8_rows")]
)
def test_what_is_packed_verifies(of: EmbeddingInfo) -> None:
    assert FORMAT.read_manifest(NAME, FORMAT.manifest(NAME, of)) == of
    assert all(verifies(of, index, value) for index, value in enumerate(group_values(of)))


def mutations(value: bytes, rng: random.Random) -> bytes:
    """Return the value with a flipped bit, cut, extended, or filled with something else."""
    kind = rng.randrange(5)
    position = rng.randrange(len(value))
    if kind == 0:
        return value[:position] + bytes([value[position] ^ (1 << rng.randrange(8))]) + value[position + 1 :]
    if kind == 1:
        return value[:position]
    if kind == 2:
        return value + rng.randbytes(1 + rng.randrange(8))
    if kind == 3:
        return rng.randbytes(len(value))
    return b"\x80\x04\x95" + value[3:]  # begins like a pickle


def test_changed_values_are_all_misses() -> None:
    rng = random.Random(1)
    of = info()
    manifest, groups = FORMAT.manifest(NAME, of), group_values(of)
    for _ in range(100):
        assert FORMAT.read_manifest(NAME, mutations(manifest, rng)) is None
        assert not verifies(of, 0, mutations(groups[0], rng))


@pytest.mark.parametrize(
    "other",
    [
        EmbeddingKey(OTHER_DIGEST, MEDIA, "acme").name,
        EmbeddingKey(DIGEST, OTHER_DIGEST, "acme").name,
        EmbeddingKey(DIGEST, MEDIA, "").name,
        EmbeddingKey(DIGEST, MEDIA, "acme ").name,
    ],
)
def test_a_value_under_another_name_is_a_miss(other: StoredName) -> None:
    of = info(13, 256, 896)
    assert FORMAT.read_manifest(other, FORMAT.manifest(NAME, of)) is None
    assert not verifies(of, 0, group_values(of)[0], other)


def test_a_value_under_another_key_position_or_shape_is_a_miss() -> None:
    of = info(13, 256, 896)
    manifest, groups = FORMAT.manifest(NAME, of), group_values(of)
    assert len(groups) > 1
    assert EmbeddingFormat("another key").read_manifest(NAME, manifest) is None
    assert not verifies(of, 1, groups[0])
    assert not verifies(of, of.group_count, groups[0])
    assert not verifies(of, 0, groups[0][:-2])
    assert not verifies(info(13, 256, 448, "float32"), 0, groups[0])
    assert not verifies(replace(of, width=of.height, height=of.width), 0, groups[0])
    assert FORMAT.read_manifest(NAME, groups[0]) is None
    assert not verifies(of, 0, manifest)


def video(frames: int = 3, tiles_per_frame: int = 2) -> EmbeddingInfo:
    seen = tuple(VideoFrame(7 * number, 0.28 * number) for number in range(frames))
    return replace(info(frames * tiles_per_frame), frames=seen)


def test_the_frames_of_a_video_come_back_with_the_manifest() -> None:
    of = video()
    assert FORMAT.read_manifest(NAME, FORMAT.manifest(NAME, of)) == of
    (group,) = group_values(of)
    assert verifies(of, 0, group)
    # The groups say how many frames there are, so a picture's are no video's.
    assert not verifies(replace(of, frames=()), 0, group)


def test_a_manifest_whose_frames_were_changed_is_a_miss() -> None:
    rng = random.Random(2)
    manifest = FORMAT.manifest(NAME, video())
    for _ in range(100):
        assert FORMAT.read_manifest(NAME, mutations(manifest, rng)) is None


HEADER = struct.Struct("<4sHBBIIIIIIIIII32s32s16s")
FRAME = struct.Struct("<Id")


def forged(frames_content: bytes = b"", **changes: int | bytes) -> bytes:
    """Return a value that whoever knows that there is no key can make: every field as wished, and a MAC that fits."""
    fields: dict[str, int | bytes] = {
        "magic": b"IVLE", "version": 3, "data_type": 0, "reserved": 0, "tiles": 1, "tokens": 1, "hidden": 1,
        "width": 1, "height": 1, "columns": 1, "grid_rows": 1, "frames": 0, "group": 0xFFFFFFFF, "groups": 1,
        "digest": bytes.fromhex(DIGEST), "media": bytes.fromhex(MEDIA), "tag": bytes.fromhex(NAME.tenant_tag),
    }  # fmt: skip
    header = HEADER.pack(*(fields | changes).values())
    key = blake3(b"", derive_key_context="internvl-serving embedding values v1").digest()
    return header + blake3(header, key=key).update(frames_content).digest() + frames_content


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 1},
        {"frames": 1, "frames_content": FRAME.pack(0, 0.0)[:-1]},
        {"frames": 0, "frames_content": FRAME.pack(0, 0.0)},
        {"frames": 2, "frames_content": FRAME.pack(0, 0.0) * 2},  # of one tile
        {"frames": 1, "frames_content": FRAME.pack(1 << 31, 0.0)},
        {"frames": 1, "frames_content": FRAME.pack(0, float("nan"))},
        {"frames": 1, "frames_content": FRAME.pack(0, float("inf"))},
        {"frames": 1, "frames_content": FRAME.pack(0, -1.0)},
        {"frames": 0xFFFFFFFF},
        {"frames": 4097, "tiles": 4097, "tokens": 4097, "frames_content": FRAME.pack(0, 0.0) * 4097},
    ],
)
def test_forged_frames_are_a_miss_even_where_their_mac_fits(changes: dict[str, Any]) -> None:
    nobodys_key = EmbeddingFormat("")
    assert nobodys_key.read_manifest(NAME, forged(FRAME.pack(7, 0.5), frames=1)) is not None
    assert nobodys_key.read_manifest(NAME, forged(**changes)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"data_type": 4},
        {"data_type": 9},
        {"data_type": 255},
        {"tokens": 1 << 24, "hidden": 1 << 22, "groups": 1 << 25},  # 64 TiB
        {"tiles": 0},
        {"tokens": 0},
        {"hidden": 0},
        {"tiles": 1 << 31, "tokens": 1 << 31},
        {"tiles": 4097, "tokens": 4097},
        {"tokens": (1 << 22) + 1},
        {"hidden": (1 << 16) + 1},
        {"tokens": 1 << 22, "hidden": 1 << 16, "groups": 1 << 19},  # each within its bound, 1 TiB together
        {"tiles": 2, "tokens": 3},
        {"columns": 1 << 20},
        {"grid_rows": 0},
        {"width": 0xFFFFFFFF},
        {"groups": 0},
        {"groups": 2},
        {"groups": 0xFFFFFFFF},
        {"version": 2},
        {"version": 4},
        {"magic": b"RIFF"},
        {"group": 0},
        {"digest": bytes.fromhex(OTHER_DIGEST)},
        {"media": bytes.fromhex(OTHER_DIGEST)},
        {"tag": bytes.fromhex(tenant_tag_of(""))},
    ],
)
def test_a_forged_header_is_a_miss_even_where_its_mac_fits(changes: dict[str, int | bytes]) -> None:
    nobodys_key = EmbeddingFormat("")
    assert nobodys_key.read_manifest(NAME, forged()) is not None
    assert nobodys_key.read_manifest(NAME, forged(**changes)) is None


@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(st.integers(0, 0xFFFFFFFF), min_size=10, max_size=10), data_type=st.integers(0, 255))
def test_no_forged_header_raises_or_asks_for_much(numbers: list[int], data_type: int) -> None:
    names = ("tiles", "tokens", "hidden", "width", "height", "columns", "grid_rows", "frames", "group", "groups")
    value = forged(data_type=data_type, **dict(zip(names, numbers, strict=True)))
    found = EmbeddingFormat("").read_manifest(NAME, value)
    assert found is None or found.size_bytes <= 1 << 30


def test_what_no_model_makes_is_implausible_and_what_the_largest_makes_is_not() -> None:
    assert info(41, 256, 8192, "float32").plausible()
    assert info(4096, 1, 64).plausible()
    assert not replace(info(), width=-1).plausible()
    assert not replace(info(), data_type="int8").plausible()  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [b"", b"x", bytes(HEADER_BYTES), None, 7, "text", [b"x"]])
def test_whatever_a_store_answers_is_a_miss(value: object) -> None:
    assert FORMAT.read_manifest(NAME, value) is None  # type: ignore[arg-type]


def test_names_and_keys_are_told_apart() -> None:
    assert NAME.manifest_key.decode() == f"ivl:embedding:{tenant_tag_of('acme')}:{MEDIA}:{DIGEST}"
    assert name_of(NAME.manifest_key) == NAME
    assert name_of(NAME.group_key(3)) is None
    assert name_of(b"ivl:embedding:x") is None
    assert keys_of(NAME.tenant_tag, MEDIA) == f"ivl:embedding:{NAME.tenant_tag}:{MEDIA}:*"
    assert keys_of(NAME.tenant_tag) == f"ivl:embedding:{NAME.tenant_tag}:*:*"
    assert len(NAME.tenant_tag) == 32
