"""Reads InternVL checkpoint directories: config.json and safetensors shards. Nothing in them is ever executed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import CheckpointError
from shared.hf_config import original_form

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100 << 20
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class InternVLConfig:
    """The parts of config.json that the services read. Defaults are the released models' values, never the class's.

    `vision` and `llm` have the original layout's keys, whichever layout the file has.
    """

    name: str
    image_size: int
    patch_size: int
    downsample_ratio: float
    ps_version: str
    select_layer: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    template: str
    system_message: str | None
    vision: Mapping[str, Any]
    llm: Mapping[str, Any]

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: patches after pixel shuffle."""
        return int((self.image_size // self.patch_size) ** 2 * self.downsample_ratio**2)

    @property
    def hidden_size(self) -> int:
        """Width of a visual token and of the language model."""
        return int(self.llm["hidden_size"])


def read_config(directory: Path) -> InternVLConfig:
    """Return the configuration of a checkpoint directory, or raise `CheckpointError` naming what is wrong."""
    try:
        raw = original_form(read_json(directory / "config.json"))
        vision, llm = raw["vision_config"], raw["llm_config"]
        # A null system message means the template's own. A null template means nothing: the released code fails, too.
        return InternVLConfig(
            name=directory.resolve().name,
            image_size=int(raw.get("force_image_size") or vision["image_size"]),
            patch_size=int(vision["patch_size"]),
            downsample_ratio=float(raw["downsample_ratio"]),
            ps_version=str(raw["ps_version"]),
            select_layer=int(raw["select_layer"]),
            min_tiles=int(raw["min_dynamic_patch"]),
            max_tiles=int(raw["max_dynamic_patch"]),
            use_thumbnail=bool(raw["use_thumbnail"]),
            template=_text(raw, "template"),
            system_message=raw.get("system_message"),
            vision=vision,
            llm=llm,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{directory / 'config.json'} has no {error.args[0]!r}: is it an InternVL model?"
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'} has a value of the wrong type: {error}") from None


def _text(raw: Mapping[str, Any], key: str) -> str:
    if raw[key] is None:
        raise KeyError(key)
    return str(raw[key])


class Naming(Enum):
    """How a checkpoint's tensors are called."""

    ORIGINAL = "original"  # the layout of the model cards
    HF = "hf"  # the -hf repositories as they were released
    HF_NATIVE = "hf-native"  # the library's own state dict


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: its shard, first byte in it, shape, element type as safetensors names it, and size."""

    file: Path
    begin: int
    shape: tuple[int, ...]
    data_type: str
    size_bytes: int


class Checkpoint:
    """The tensors of a checkpoint directory, by name. Reads only the bytes of what is asked for.

    Files are read and not mapped: a mapped file counts as this process's memory until it is dropped, and a shard that
    is cut short by somebody meanwhile would end the process.
    """

    def __init__(self, directory: Path, piece_bytes: int = 16 << 20) -> None:
        """Read the headers; raise `CheckpointError` naming file and tensor where a shard is missing or cut short.

        `piece_bytes` is how much is read at a time, unless a row of a tensor has more.
        """
        self.directory = directory
        self._piece_bytes = piece_bytes
        self.entries: dict[str, TensorEntry] = {}
        for file in _shards(directory):
            self.entries |= _read_header(file)

    @property
    def naming(self) -> Naming:
        """How the tensors are called."""
        if any(name.startswith(("model.vision_tower.", "model.language_model.")) for name in self.entries):
            return Naming.HF_NATIVE
        if any(name.startswith("vision_tower.") for name in self.entries):
            return Naming.HF
        return Naming.ORIGINAL

    def require(self, names: Iterable[str]) -> None:
        """Raise `CheckpointError` naming the first of `names` that the checkpoint does not have as floats."""
        for name in names:
            if name not in self.entries:
                raise CheckpointError(f"{self.directory} has no tensor {name!r}: the checkpoint is incomplete.")
            entry = self.entries[name]
            if entry.data_type not in _FLOATS:
                raise CheckpointError(f"{entry.file}: tensor {name!r} is of the type {entry.data_type}, not a float.")

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor's rows in order, as stored, some megabytes at a time. A piece is valid until the next one."""
        import torch

        self.require([name])
        entry = self.entries[name]
        rows, *row_shape = entry.shape or (1,)
        row_bytes = max(1, entry.size_bytes // max(1, rows))
        step = max(1, self._piece_bytes // row_bytes)
        # Not from the heap: between the weights that are kept it would leave holes.
        buffer = mmap(-1, max(1, min(step * row_bytes, entry.size_bytes)))
        data_type = getattr(torch, _FLOATS[entry.data_type][0])
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.begin)
            for start in range(0, rows if entry.size_bytes else 0, step):
                count = min(step, rows - start)
                _read_into(memoryview(buffer)[: count * row_bytes], stream, entry.file, name)
                yield torch.frombuffer(buffer, dtype=data_type, count=count * prod(row_shape)).view(count, *row_shape)

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each named tensor whole, as stored."""
        import torch

        wanted = list(names)
        self.require(wanted)
        for name in wanted:
            pieces = [piece.clone() for piece in self.pieces(name)]
            yield name, torch.cat(pieces).view(self.entries[name].shape)


# safetensors' name of an element type: torch's name, and bytes per element.
_FLOATS: Mapping[str, tuple[str, int]] = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}


def _read_into(buffer: memoryview, stream: io.RawIOBase, file: Path, name: str) -> None:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise CheckpointError(f"{file} was cut short while tensor {name!r} was read.")
        done += count


def _shards(directory: Path) -> list[Path]:
    if (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map", {})
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [directory / SINGLE_FILE]
    for file in files:
        if not file.is_file() or file.parent != directory:
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete.")
    return files


def _read_header(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file} is no safetensors file or is cut short within its header.")
        try:
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        except ValueError:
            raise CheckpointError(f"{file} has a damaged safetensors header.") from None
    try:
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + header_bytes, stored) for name, stored in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} has a damaged safetensors header.") from None
    for name, entry in entries.items():
        if entry.begin + entry.size_bytes > size:
            raise CheckpointError(f"{file} is cut short: tensor {name!r} is not complete. Copy the file again.")
    return entries


def _entry(file: Path, data_begin: int, stored: dict[str, Any]) -> TensorEntry:
    begin, end = map(int, stored["data_offsets"])
    shape, data_type = tuple(map(int, stored["shape"])), str(stored["dtype"])
    if not 0 <= begin <= end or any(side < 0 for side in shape):
        raise ValueError("offsets")
    if data_type in _FLOATS and end - begin != prod(shape) * _FLOATS[data_type][1]:
        raise ValueError("size")
    return TensorEntry(file, data_begin + begin, shape, data_type, end - begin)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint, or raise `CheckpointError` naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: give --model a checkpoint directory.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({type(error).__name__}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object.")
    return content
