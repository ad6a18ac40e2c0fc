"""Embeddings go to a file and come back into any store, unchanged or not at all."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.archive_file import ArchiveDamaged, read_contents, writing
from shared.embedding import Embedding, EmbeddingKey, VideoFrame
from shared.embedding_archive import export_embeddings, import_embeddings
from shared.redis_link import StoreFailed
from shared.tensors import tensor_of
from tests.shared.stored import KEY, embedding, info_of, key_of, store_over
from tests.valkey import Valkey, running_valkey

CLIP = replace(info_of(4, 4, 8), frames=(VideoFrame(3, 0.12), VideoFrame(9, 0.36)))
VARIED = [
    embedding(tiles=4, hidden=3584),
    embedding(tiles=1, hidden=8, key=key_of(1)),
    embedding(tiles=2, hidden=16, key=key_of(2, tenant="other")),
    Embedding(key_of(3, tenant=""), info_of(2, 4, 8, "int8_rows"), bytes(range(96))),
    Embedding(key_of(4), CLIP, bytes(CLIP.size_bytes)),
]


@pytest.fixture
async def valkey() -> AsyncIterator[Valkey]:
    async with running_valkey() as server:
        yield server


@pytest.fixture
async def target() -> AsyncIterator[Valkey]:
    async with running_valkey() as server:
        yield server


async def test_everything_comes_back_in_a_store_with_another_secret(
    valkey: Valkey, target: Valkey, tmp_path: Path
) -> None:
    file = tmp_path / "embeddings.safetensors"
    async with store_over(valkey.url, key="one") as (store, link):
        for entry in VARIED:
            assert await store.put(entry)
        assert await export_embeddings(link, store, file, None) == len(VARIED)
    async with store_over(target.url, key="two") as (store, _):
        assert await import_embeddings(store, file) == len(VARIED)
        for entry in VARIED:
            read = await store.get(entry.key)
            assert read is not None
            assert (read.info, bytes(read.payload)) == (entry.info, bytes(entry.payload))
        assert await import_embeddings(store, file) == 0, "what is there is not written again"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


async def test_the_file_is_one_that_safetensors_reads(valkey: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.safetensors"
    async with store_over(valkey.url) as (store, link):
        for entry in VARIED:
            await store.put(entry)
        await export_embeddings(link, store, file, None)
    tensors = load_file(file)
    name = KEY.name
    assert len(tensors) == len(VARIED)
    stored = tensors[f"{name.tenant_tag}/{name.media_digest}/{name.digest}"]
    assert torch.equal(stored.view(torch.uint8), tensor_of(VARIED[0]).view(torch.uint8))


@pytest.mark.parametrize(("tenant", "count"), [("acme", 3), ("other", 1), ("", 1), ("nobody", 0), (None, 5)])
async def test_a_tenants_embeddings_can_be_exported_alone(
    valkey: Valkey, tmp_path: Path, tenant: str | None, count: int
) -> None:
    file = tmp_path / "embeddings.safetensors"
    async with store_over(valkey.url) as (store, link):
        for entry in VARIED:
            await store.put(entry)
        assert await export_embeddings(link, store, file, tenant) == count
    with file.open("rb") as stream:
        assert len(read_contents(stream)) == count


async def test_what_is_damaged_in_the_store_is_left_out(valkey: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.safetensors"
    async with store_over(valkey.url) as (store, link):
        for entry in VARIED:
            await store.put(entry)
        await link.redis.setrange(KEY.name.group_key(1).decode(), 500, b"\x00\x01\x02")
        assert await export_embeddings(link, store, file, None) == len(VARIED) - 1
    assert len(load_file(file)) == len(VARIED) - 1


async def test_an_export_that_fails_leaves_the_old_file_as_it_was(valkey: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.safetensors"
    file.write_bytes(b"old")
    async with store_over(valkey.url) as (store, link):
        for entry in VARIED:
            await store.put(entry)
        reading = store.read

        async def failing(name: object) -> object:
            valkey.kill()
            return await reading(name)  # type: ignore[arg-type]

        store.read = failing  # type: ignore[method-assign, assignment]
        with pytest.raises(StoreFailed):
            await export_embeddings(link, store, file, None)
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def archive(file: Path, *entries: Embedding) -> Path:
    with writing(file, [(entry.key.name, entry.info) for entry in entries]) as writer:
        for entry in entries:
            writer.add(entry.key.name, entry.info, entry.payload)
    return file


async def test_a_file_that_was_changed_is_refused_and_nothing_wrong_is_stored(valkey: Valkey, tmp_path: Path) -> None:
    good = archive(tmp_path / "good", VARIED[1]).read_bytes()
    async with store_over(valkey.url) as (store, link):
        for position in range(0, len(good), max(1, len(good) // 150)):
            file = tmp_path / "changed"
            file.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
            with suppress(ArchiveDamaged):
                await import_embeddings(store, file)
            read = await store.get(VARIED[1].key)
            assert read is None or bytes(read.payload) == bytes(VARIED[1].payload)
            await link.redis.flushall()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 100,
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x04\0\0\0\0\0\0\0null",
        b"\x14\0\0\0\0\0\0\0" + b'{"__metadata__": {}}',
        b"\x07\0\0\0\0\0\0\0" + b"\x80\x04\x95pickl",
    ],
)
def test_whatever_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with file.open("rb") as stream, pytest.raises(ArchiveDamaged):
        read_contents(stream)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_count": 1 << 40},
        {"token_count": 3},
        {"hidden_size": -8},
        {"data_type": "float64"},
        {"data_type": "float16"},
        {"tile_count": 0},
        {"frames": [[1, 2]]},
        {"width": 0},
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    file = archive(tmp_path / "file", VARIED[1])
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    (name,) = set(header) - {"__metadata__"}
    described = json.loads(header["__metadata__"][name])
    described["info"] |= changes
    header["__metadata__"][name] = json.dumps(described)
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    with file.open("rb") as stream, pytest.raises(ArchiveDamaged):
        read_contents(stream)


async def test_the_command_exports_and_imports(valkey: Valkey, target: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.safetensors"
    async with store_over(valkey.url, key="one") as (store, _):
        await store.put(VARIED[0])

    async def command(*arguments: str, key: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "shared.embedding_archive", *arguments]
        environment = {"ARCHIVE_EMBEDDING_KEY": key, "PYTHONPATH": ".:protos/gen"}
        return await asyncio.to_thread(
            subprocess.run, program, capture_output=True, text=True, env=environment, check=False
        )

    done = await command("export", str(file), "--redis-url", valkey.url, "--tenant", "acme", key="one")
    assert done.returncode == 0, done.stderr
    done = await command("import", str(file), "--redis-url", target.url, key="two")
    assert done.returncode == 0, done.stderr
    assert "archive_done" in done.stderr
    async with store_over(target.url, key="two") as (store, _):
        assert await store.get(EmbeddingKey(KEY.digest, KEY.media_digest, "acme")) is not None
    missing = await command("import", str(tmp_path / "none"), "--redis-url", target.url, key="two")
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].endswith("none: No such file or directory")
    wrong = await command("import", str(file), "--redis-url", "http://x", key="two")
    assert wrong.returncode == 2
