"""Checkpoints are read as data, and what is wrong with one is said by file and tensor."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoint import Checkpoint, read_config
from shared.errors import CheckpointError
from tests.golden_cases import CHECKPOINTS, GOLDEN

NAME = "vision_model.embeddings.class_embedding"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "checkpoints" / CHECKPOINTS[0], tmp_path / "model"))


def rewrite(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "-"}))


def sharded(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def test_config_has_what_the_file_says(directory: Path) -> None:
    config = read_config(directory)
    assert (config.image_size, config.tokens_per_tile, config.hidden_size) == (56, 4, 64)
    assert (config.template, config.system_message, config.max_tiles) == ("internvl2_5", None, 12)


def test_tensors_of_one_file_and_of_shards_are_the_same(directory: Path) -> None:
    single = dict(Checkpoint(directory).load(Checkpoint(directory).entries))
    sharded(directory)
    shards = dict(Checkpoint(directory).load(Checkpoint(directory).entries))
    assert single.keys() == shards.keys()
    assert all(torch.equal(single[name], shards[name]) for name in single)


def test_only_what_is_asked_for_is_yielded_as_stored(directory: Path) -> None:
    loaded = dict(Checkpoint(directory).load([NAME]))
    assert list(loaded) == [NAME]
    stored = load_file(directory / "model.safetensors")[NAME]
    assert loaded[NAME].dtype == stored.dtype
    assert torch.equal(loaded[NAME], stored)


@pytest.mark.parametrize("piece_bytes", [1, 100, 1000, 10**9])
def test_pieces_are_the_rows_in_order_however_small_they_are(directory: Path, piece_bytes: int) -> None:
    checkpoint = Checkpoint(directory, piece_bytes)
    for name, stored in load_file(directory / "model.safetensors").items():
        pieces = [piece.clone() for piece in checkpoint.pieces(name)]
        row_bytes = stored[0].nbytes
        assert all(piece.nbytes <= max(piece_bytes, row_bytes) for piece in pieces)
        assert torch.equal(torch.cat(pieces), stored), name


def test_a_file_that_shrinks_while_it_is_read_is_named(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    file = directory / "model.safetensors"
    last = max(checkpoint.entries, key=lambda name: checkpoint.entries[name].begin)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors was cut short while tensor '{last}'"):
        list(checkpoint.pieces(last))


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["two"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
    ],
)
def test_a_header_that_makes_no_sense_is_damaged(directory: Path, entry: Any) -> None:
    header = json.dumps({NAME: entry}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a damaged"):
        Checkpoint(directory)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.such\.tensor"):
        list(Checkpoint(directory).load(["no.such.tensor"]))


@pytest.mark.parametrize("cut", [1, 1000, 400_000])
def test_a_shard_that_is_cut_short_is_named_with_a_tensor(directory: Path, cut: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short: tensor '[\w.]+'"):
        Checkpoint(directory)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 100, (50).to_bytes(8, "little") + b"{" * 50])
def test_a_file_that_is_no_safetensors_file_is_named(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(directory)


def test_a_missing_shard_is_named(directory: Path) -> None:
    sharded(directory)
    (directory / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        Checkpoint(directory)


def test_an_index_cannot_point_outside_the_directory(directory: Path) -> None:
    sharded(directory)
    index = {"weight_map": {NAME: "../a.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(directory / "a.safetensors", directory.parent / "a.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint(directory)


@pytest.mark.parametrize("key", ["llm_config", "vision_config", "downsample_ratio", "template", "use_thumbnail"])
def test_a_config_without_a_needed_key_is_refused_by_name(directory: Path, key: str) -> None:
    rewrite(directory, **{key: "-"})
    with pytest.raises(CheckpointError, match=key):
        read_config(directory)


def test_a_config_with_a_null_template_is_refused_by_name(directory: Path) -> None:
    rewrite(directory, template=None)
    with pytest.raises(CheckpointError, match="template"):
        read_config(directory)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"'])
def test_a_config_that_is_no_object_is_refused(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(directory)


def test_a_directory_that_is_none_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--model"):
        read_config(tmp_path / "nowhere")
