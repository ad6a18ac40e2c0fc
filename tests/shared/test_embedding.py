"""Stored values hold the tensor exactly, and nothing that was changed is ever taken for it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.embedding import ITEM_BYTES, MAX_GROUP_BYTES, DataType, Embedding, EmbeddingFormat, EmbeddingInfo
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
