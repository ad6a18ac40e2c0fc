"""Stored values hold the tensor exactly, and nothing that was changed is ever taken for it."""

import random
import struct
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.embedding import (
    ITEM_BYTES,
    MAX_GROUP_BYTES,
    DataType,
    Embedding,
    EmbeddingFormat,
    EmbeddingInfo,
    VideoFrame,
)
from shared.tensors import bytes_of, data_type_of, tensor_of

DIGEST, OTHER_DIGEST = "ab" * 32, "cd" * 32
FORMAT = EmbeddingFormat("key")


def info(tiles: int = 3, tokens_per_tile: int = 4, hidden: int = 8, data_type: DataType = "bfloat16") -> EmbeddingInfo:
    return EmbeddingInfo(tiles, tiles * tokens_per_tile, hidden, data_type, 640, 480, 2, 1)


def embedding(of: EmbeddingInfo, seed: int = 0) -> Embedding:
    return Embedding(DIGEST, of, random.Random(seed).randbytes(of.size_bytes))


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


@pytest.mark.parametrize("of", [info(), info(1, 1, 1, "float32"), info(13, 256, 896), info(2, 256, 8192)])
def test_what_is_packed_comes_back(of: EmbeddingInfo) -> None:
    manifest, groups = FORMAT.pack(embedding(of))
    assert FORMAT.unpack_manifest(DIGEST, manifest) == of
    unpacked = FORMAT.unpack(DIGEST, of, groups)
    assert unpacked is not None
    assert bytes(unpacked.payload) == bytes(embedding(of).payload)


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


def test_two_hundred_changed_values_are_all_misses() -> None:
    rng = random.Random(1)
    of = info()
    manifest, groups = FORMAT.pack(embedding(of))
    for _ in range(100):
        assert FORMAT.unpack_manifest(DIGEST, mutations(manifest, rng)) is None
        changed = list(groups)
        changed[rng.randrange(len(groups))] = mutations(groups[0], rng)
        assert FORMAT.unpack(DIGEST, of, changed) is None


def test_a_value_under_another_key_digest_position_or_shape_is_a_miss() -> None:
    of = info(13, 256, 896)
    manifest, groups = FORMAT.pack(embedding(of))
    assert len(groups) > 1
    assert FORMAT.unpack_manifest(OTHER_DIGEST, manifest) is None
    assert EmbeddingFormat("another key").unpack_manifest(DIGEST, manifest) is None
    assert FORMAT.unpack(DIGEST, of, [groups[1], groups[0], *groups[2:]]) is None
    assert FORMAT.unpack(DIGEST, of, groups[:-1]) is None
    assert FORMAT.unpack(DIGEST, of, [*groups, groups[-1]]) is None
    assert FORMAT.unpack(DIGEST, info(13, 256, 448, "float32"), groups) is None
    assert FORMAT.unpack_manifest(DIGEST, groups[0]) is None


@pytest.mark.parametrize("data_type", list(ITEM_BYTES))
def test_tensors_come_back_bit_for_bit(data_type: DataType) -> None:
    import torch

    of = info(data_type=data_type)
    tensor = torch.randn(of.token_count, of.hidden_size).to(getattr(torch, data_type))
    assert data_type_of(tensor) == data_type
    assert torch.equal(tensor_of(Embedding(DIGEST, of, bytes_of(tensor))), tensor)


def test_groups_are_verified_one_by_one_into_their_places() -> None:
    of = info(13, 256, 896)
    _, groups = FORMAT.pack(embedding(of))
    payload = bytearray(of.size_bytes)
    for index in reversed(range(of.group_count)):
        assert FORMAT.unpack_group(DIGEST, of, index, groups[index], payload)
    assert bytes(payload) == bytes(embedding(of).payload)
    untouched = bytes(payload)
    assert not FORMAT.unpack_group(DIGEST, of, 0, groups[1], payload)
    assert not FORMAT.unpack_group(DIGEST, of, 1, groups[1][:-2], payload)
    assert not FORMAT.unpack_group(DIGEST, of, of.group_count, groups[0], payload)
    assert bytes(payload) == untouched


def video(frames: int = 3, tiles_per_frame: int = 2) -> EmbeddingInfo:
    seen = tuple(VideoFrame(7 * number, 0.28 * number) for number in range(frames))
    return replace(info(frames * tiles_per_frame), frames=seen)


def test_the_frames_of_a_video_come_back_with_the_manifest() -> None:
    of = video()
    manifest, groups = FORMAT.pack(embedding(of))
    assert FORMAT.unpack_manifest(DIGEST, manifest) == of
    assert FORMAT.unpack(DIGEST, of, groups) is not None
    # The groups say how many frames there are, so a picture's are no video's.
    assert FORMAT.unpack(DIGEST, replace(of, frames=()), groups) is None


def test_a_manifest_whose_frames_were_changed_is_a_miss() -> None:
    rng = random.Random(2)
    manifest = FORMAT.pack_manifest(embedding(video()))
    for _ in range(100):
        assert FORMAT.unpack_manifest(DIGEST, mutations(manifest, rng)) is None


HEADER = struct.Struct("<4sHBBIIIIIIIIII32s")
FRAME = struct.Struct("<Id")


def forged(frames_content: bytes = b"", **changes: int | bytes) -> bytes:
    """Return a value that whoever knows that there is no key can make: every field as wished, and a MAC that fits."""
    fields: dict[str, int | bytes] = {
        "magic": b"IVLE", "version": 2, "data_type": 0, "reserved": 0, "tiles": 1, "tokens": 1, "hidden": 1,
        "width": 1, "height": 1, "columns": 1, "grid_rows": 1, "frames": 0, "group": 0xFFFFFFFF, "groups": 1,
        "digest": bytes.fromhex(DIGEST),
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
    assert nobodys_key.unpack_manifest(DIGEST, forged(FRAME.pack(7, 0.5), frames=1)) is not None
    assert nobodys_key.unpack_manifest(DIGEST, forged(**changes)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"data_type": 3},
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
        {"version": 1},
        {"version": 3},
        {"magic": b"RIFF"},
        {"group": 0},
        {"digest": bytes.fromhex(OTHER_DIGEST)},
    ],
)
def test_a_forged_header_is_a_miss_even_where_its_mac_fits(changes: dict[str, int | bytes]) -> None:
    nobodys_key = EmbeddingFormat("")
    assert nobodys_key.unpack_manifest(DIGEST, forged()) is not None
    assert nobodys_key.unpack_manifest(DIGEST, forged(**changes)) is None


@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(st.integers(0, 0xFFFFFFFF), min_size=10, max_size=10), data_type=st.integers(0, 255))
def test_no_forged_header_raises_or_asks_for_much(numbers: list[int], data_type: int) -> None:
    names = ("tiles", "tokens", "hidden", "width", "height", "columns", "grid_rows", "frames", "group", "groups")
    value = forged(data_type=data_type, **dict(zip(names, numbers, strict=True)))
    found = EmbeddingFormat("").unpack_manifest(DIGEST, value)
    assert found is None or found.size_bytes <= 1 << 30


def test_what_no_model_makes_is_implausible_and_what_the_largest_makes_is_not() -> None:
    assert info(41, 256, 8192, "float32").plausible()
    assert info(4096, 1, 64).plausible()
    assert not replace(info(), width=-1).plausible()
    assert not replace(info(), data_type="int8").plausible()  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [b"", b"x", bytes(76 + 32), None, 7, "text", [b"x"]])
def test_whatever_a_store_answers_is_a_miss(value: object) -> None:
    assert FORMAT.unpack_manifest(DIGEST, value) is None  # type: ignore[arg-type]
    assert FORMAT.unpack(DIGEST, info(), [value]) is None  # type: ignore[list-item]
