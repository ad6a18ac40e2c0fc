"""Measures how an embedding travels between Redis and a service: `python -m benchmarks.transfer`.

A Valkey server of its own holds the embedding of a picture of 12 tiles and a thumbnail. Every round does everything, in
turns: redis-py's MGET of the very same values, with its asyncio client and with its blocking client on a thread, which
verifies nothing; the store's `get`, everything verified; the same as a tensor; redis-py's SETs and the store's write,
sealing included. A ratio is the median over the rounds of a way's time to that of the way it is compared with.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import SecretStr
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from deploy.local.valkey import LocalValkey
from shared.embedding import DataType, Embedding, EmbeddingInfo, EmbeddingKey
from shared.redis_link import open_link
from shared.settings import EmbeddingStoreSettings
from shared.store import RedisEmbeddingStore, open_embedding_store
from shared.tensors import tensor_of

KEY: Final = EmbeddingKey("ab" * 32, "cd" * 32)
_TILES, _TOKENS_PER_TILE = 13, 256
_IGNORED_ROUNDS: Final = 3  # while connections open and memory is first touched


@dataclass(frozen=True, slots=True)
class Way:
    """One way of moving the embedding, and the way that it is compared with."""

    name: str
    work: Callable[[], Awaitable[object]]
    beside: tuple[str, ...] = ()
    times_ms: list[float] = field(default_factory=list)

    async def take(self) -> None:
        """Do it once."""
        started = time.perf_counter()
        result = await self.work()
        self.times_ms.append((time.perf_counter() - started) * 1e3)
        del result  # freed outside of the measured time


class Ways:
    """What is measured, over one server."""

    def __init__(self, store: RedisEmbeddingStore, url: str, embedding: Embedding) -> None:
        self._store = store
        self._embedding = embedding
        self._redis, self._blocking = Redis.from_url(url), BlockingRedis.from_url(url)
        self._keys = [KEY.name.group_key(index) for index in range(embedding.info.group_count)]
        self._dtype = torch.float32 if embedding.info.data_type == "int8_rows" else None

    def all(self) -> list[Way]:
        """Return the ways, in the order of a round."""
        return [
            Way("MGET, asyncio", self._mget),
            Way("MGET, blocking", self._mget_blocking),
            Way("store.get", self._get, ("MGET, asyncio", "MGET, blocking")),
            Way("store.get as a tensor", self._tensor, ("MGET, asyncio", "MGET, blocking")),
            Way("SET each, asyncio", self._set),
            Way("store write", self._write, ("SET each, asyncio",)),
        ]

    async def check(self) -> None:
        """Store the embedding, and assert that it comes back."""
        await self._write()
        assert (await self._get()).payload == self._embedding.payload

    async def _mget(self) -> object:
        return await self._redis.mget(self._keys)

    async def _mget_blocking(self) -> object:
        return await asyncio.to_thread(self._blocking.mget, self._keys)

    async def _get(self) -> Embedding:
        found = await self._store.get(KEY)
        assert found is not None
        return found

    async def _tensor(self) -> object:
        return tensor_of(await self._get(), self._dtype)

    async def _set(self) -> object:
        rows = memoryview(self._embedding.payload)
        for index in range(self._embedding.info.group_count):
            await self._redis.set(f"other:{index}", rows[self._embedding.info.group_slice(index)], ex=60)
        return None

    async def _write(self) -> object:
        await self._store.write(KEY.name, self._embedding.info, self._embedding.payload)
        return None


@asynccontextmanager
async def opened(hidden_size: int, data_type: DataType) -> AsyncIterator[Ways]:
    """Yield the ways over a server of their own."""
    info = EmbeddingInfo(_TILES, _TILES * _TOKENS_PER_TILE, hidden_size, data_type, 1792, 1344, 4, 3)
    with tempfile.TemporaryDirectory() as directory:
        server = LocalValkey(Path(directory))
        try:
            settings = EmbeddingStoreSettings(redis_url=SecretStr(server.url(0)), redis_timeout_s=10.0)
            async with open_link(settings) as link, open_embedding_store(link, settings) as store:
                assert isinstance(store, RedisEmbeddingStore)
                yield Ways(store, server.url(0), Embedding(KEY, info, os.urandom(info.size_bytes)))
        finally:
            server.process.kill()


async def measure(rounds: int, hidden_size: int, data_type: DataType) -> list[Way]:
    """Return what every way took in every round."""
    async with opened(hidden_size, data_type) as ways:
        await ways.check()
        measured = ways.all()
        for index in range(_IGNORED_ROUNDS + rounds):
            for way in measured:
                await way.take()
                if index < _IGNORED_ROUNDS:
                    way.times_ms.clear()
        return measured


def report(ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Print a line per way and return the figures."""
    by_name = {way.name: way for way in ways}
    figures: list[dict[str, Any]] = []
    print(f"{'':24} {'median':>9}   {'10 % to 90 %':16} ratio")
    for way in ways:
        median, deciles = statistics.median(way.times_ms), statistics.quantiles(way.times_ms, n=10)
        ratios = {
            name: statistics.median(map(float.__truediv__, way.times_ms, by_name[name].times_ms)) for name in way.beside
        }
        shown = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items())
        print(f"{way.name:24} {median:6.1f} ms   {deciles[0]:5.1f} to {deciles[-1]:5.1f}   {shown}")
        figures.append({"way": way.name, "times_ms": way.times_ms, "ratios": ratios})
    return figures


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--hidden-size", type=int, default=3584, help="of the language model; 3584 is InternVL3-8B's")
    parser.add_argument("--data-type", choices=("bfloat16", "float32", "int8_rows"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = report(asyncio.run(measure(arguments.rounds, arguments.hidden_size, arguments.data_type)))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
