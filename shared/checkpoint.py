"""Reads InternVL checkpoint directories: config.json and safetensors shards. Nothing in them is ever executed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100 << 20
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class InternVLConfig:
    """The parts of config.json that the services read. Defaults are the released models' values, never the class's."""

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
    raw = read_json(directory / "config.json")
    try:
        vision, llm = raw["vision_config"], raw["llm_config"]
        # A null template or system message means "the usual one", as in the released code.
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
            template=str(raw["template"]),
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


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: its shard, shape, element type as safetensors names it, and size in bytes."""

    file: Path
    shape: tuple[int, ...]
    data_type: str
    size_bytes: int


class Checkpoint:
    """The tensors of a checkpoint directory, by name. Opens only the shards that hold what is asked for."""

    def __init__(self, directory: Path) -> None:
        """Read the headers; raise `CheckpointError` naming file and tensor where a shard is missing or cut short."""
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        for file in _shards(directory):
            self.entries |= _read_header(file)

    def require(self, names: Iterable[str]) -> None:
        """Raise `CheckpointError` naming the first of `names` that the checkpoint does not have."""
        for name in names:
            if name not in self.entries:
                raise CheckpointError(f"{self.directory} has no tensor {name!r}: the checkpoint is incomplete.")

    def load(
        self, names: Iterable[str], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each named tensor as stored, shard by shard; `progress` gets bytes read so far and in all."""
        from safetensors import SafetensorError, safe_open

        wanted = list(names)
        self.require(wanted)
        total = sum(self.entries[name].size_bytes for name in wanted)
        done = 0
        for file in dict.fromkeys(self.entries[name].file for name in wanted):
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in (name for name in wanted if self.entries[name].file == file):
                        yield name, shard.get_tensor(name)
                        done += self.entries[name].size_bytes
                        progress(done, total)
            except SafetensorError as error:
                raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from None


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
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + header_bytes + end > size:
            raise CheckpointError(f"{file} is cut short: tensor {name!r} is not complete. Copy the file again.")
        entries[name] = TensorEntry(file, tuple(entry["shape"]), entry["dtype"], end - begin)
    return entries


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
