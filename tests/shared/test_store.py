"""The embedding store over a real server: what is stored comes back verified, and its absence is only ever a miss."""

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from blake3 import blake3
from pydantic import SecretStr

from shared.breaker import CircuitBreaker
from shared.embedding import Embedding, EmbeddingInfo
from shared.embedding_values import EmbeddingFormat
from shared.errors import StoreUnavailable
from shared.patience import Patience
from shared.redis_link import RedisLink, open_link
from shared.settings import EmbeddingStoreSettings
from shared.store import NoEmbeddingStore, open_embedding_store
from tests.shared.stored import KEY, Recorder, embedding, key_of, store_over
from tests.valkey import Valkey, running_valkey

MANIFEST = KEY.name.manifest_key


@pytest.fixture
async def valkey() -> AsyncIterator[Valkey]:
    async with running_valkey() as server:
        yield server


async def test_what_is_put_can_be_described_and_read(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        assert await store.describe(KEY, Patience()) is None
        assert await store.get(KEY) is None
        assert await store.put(embedding())
        assert await store.describe(KEY, Patience()) == embedding().info
        read = await store.get(KEY)
        assert read is not None
        assert (read.key, bytes(read.payload)) == (KEY, bytes(embedding().payload))
        keys = await link.redis.keys()
        assert max([await link.redis.strlen(key) for key in keys]) <= (2 << 20) + 256
        assert all([0 < await link.redis.ttl(key) <= 60 for key in keys])


async def test_another_tenant_does_not_see_what_is_stored(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, _):
        assert await store.put(embedding(tiles=1, hidden=8, key=key_of(1, tenant="acme")))
        assert await store.get(key_of(1, tenant="")) is None
        assert await store.get(key_of(1, tenant="other")) is None
        assert await store.get(key_of(1, media=2, tenant="acme")) is None
        assert await store.get(key_of(1, tenant="acme")) is not None


async def test_an_embedding_that_lost_a_group_is_a_miss_and_can_be_put_again(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        await store.put(embedding())
        await link.redis.delete(KEY.name.group_key(1))
        assert await store.describe(KEY, Patience()) is None
        assert await store.get(KEY) is None
        await store.put(embedding())
        assert await store.get(KEY) is not None


async def test_a_damaged_group_is_a_miss_and_is_forgotten(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        await store.put(embedding())
        await link.redis.setrange(KEY.name.group_key(0).decode(), 5000, b"\x00\x01\x02")
        assert await store.get(KEY) is None
        assert await store.describe(KEY, Patience()) is None, "the next encode writes it anew"


async def test_values_of_another_type_or_key_are_misses(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link), store_over(valkey.url, key="other") as (foreign, _):
        await link.redis.lpush(MANIFEST.decode(), "x")
        assert await store.get(KEY) is None
        await link.redis.flushall()
        await foreign.put(embedding())
        assert await store.get(KEY) is None


async def test_a_server_that_dies_and_comes_back_is_a_miss_in_between(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        await store.put(embedding())
        valkey.kill()
        for _ in range(5):
            assert await store.get(KEY) is None
            assert not await store.put(embedding())
        assert link.breaker.is_open
        await valkey.restart()
        await closed(link)
        assert await store.put(embedding())
        assert await store.get(KEY) is not None


async def closed(link: RedisLink) -> None:
    """Return once the breaker has been closed by its probes."""
    async with asyncio.timeout(10):
        while link.breaker.is_open:
            await asyncio.sleep(0.01)


async def test_a_frozen_server_is_a_miss_and_not_even_asked_once_the_breaker_is_open(valkey: Valkey) -> None:
    seen = Recorder()
    async with store_over(valkey.url, timeout_s=0.25, observer=seen) as (store, _):
        with valkey.frozen():
            for _ in range(50):
                assert await store.get(KEY) is None
                assert not await store.put(embedding(tiles=1, hidden=8))
        outcomes = Counter(outcome for _, outcome in seen.commands)
        assert outcomes["failed"] == 3
        assert outcomes["ok"] == 0
        assert set(seen.dropped) == {"breaker_open", "failed"}


async def test_no_request_probes_a_frozen_server_however_long_it_stays_so(valkey: Valkey) -> None:
    async with store_over(valkey.url, probe_every_s=3600) as (store, link):
        with valkey.frozen():
            for _ in range(3):
                assert await store.describe(KEY, Patience(0.01)) is None
            assert link.breaker.is_open
        # It answers again, but nobody has probed it.
        assert await link.redis.ping()
        assert await store.describe(KEY, Patience()) is None
        assert not await store.put(embedding())
        with pytest.raises(StoreUnavailable):
            await store.erase("acme", None)
        assert link.breaker.is_open


async def test_all_commands_of_a_request_share_its_patience(valkey: Valkey) -> None:
    async with store_over(valkey.url, timeout_s=60, breaker=CircuitBreaker(threshold=100)) as (store, _):
        await store.put(embedding(tiles=1, hidden=8))
        patience = Patience(0.05)
        with valkey.frozen():
            async with asyncio.timeout(30):  # and not sixty seconds
                for _ in range(5):
                    assert await store.describe(KEY, patience) is None
        assert patience.left_s == 0


async def test_a_reader_that_leaves_is_cancelled_and_harms_no_other(valkey: Valkey) -> None:
    large = embedding(tiles=4, hidden=3584)
    async with store_over(valkey.url) as (store, _):
        assert await store.put(large)
        for delay_ms in range(8):
            reading = asyncio.create_task(store.get(KEY))
            await asyncio.sleep(delay_ms / 1000)
            reading.cancel()
            read = await store.get(KEY)
            assert read is not None
            assert bytes(read.payload) == large.payload
            assert reading.cancelled() or reading.result() is not None


@pytest.mark.parametrize("limit_s", [0.02, 60])
async def test_a_cancellation_is_never_lost_whenever_it_comes(valkey: Valkey, limit_s: float) -> None:
    async with store_over(valkey.url, timeout_s=0.02, breaker=CircuitBreaker(threshold=10**6)) as (store, _):

        async def endless() -> None:
            while True:
                await store.describe(KEY, Patience(limit_s))

        with valkey.frozen():
            for step in range(40):
                asking = asyncio.create_task(endless())
                await asyncio.sleep(0.01 + step / 2000)  # around the time limit of redis-py, and of the patience
                asking.cancel()
                await asyncio.wait({asking}, timeout=5)
                assert asking.cancelled()


async def test_a_full_server_refuses_quietly(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        await link.redis.config_set("maxmemory", "3mb")
        await link.redis.config_set("maxmemory-policy", "noeviction")
        assert not await store.put(embedding())
        assert await store.get(KEY) is None


async def test_a_replica_that_may_not_be_written_to_is_read_and_lives(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        assert await store.put(embedding(tiles=1))
        await link.redis.replicaof("127.0.0.1", "1")  # of nobody: it keeps what it has
        for _ in range(5):
            assert not await store.put(embedding(tiles=1, key=key_of(7)))
        assert not link.breaker.is_open
        assert await store.get(KEY) is not None


async def test_a_hundred_readers_at_once_all_read_the_right_value(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, _):
        small = [embedding(tiles=1, hidden=64, key=key_of(index)) for index in range(20)]
        for entry in small:
            await store.put(entry)
        reads = await asyncio.gather(*(store.get(small[index % 20].key) for index in range(100)))
        assert all(
            read is not None and bytes(read.payload) == bytes(small[index % 20].payload)
            for index, read in enumerate(reads)
        )


async def test_a_service_without_a_store_only_misses() -> None:
    async with (
        open_link(EmbeddingStoreSettings()) as link,
        open_embedding_store(link, EmbeddingStoreSettings()) as store,
    ):
        assert isinstance(store, NoEmbeddingStore)
        assert not await store.put(embedding(tiles=1, hidden=8))
        assert await store.describe(KEY, Patience()) is None
        assert await store.get(KEY) is None
        assert await store.erase("acme", None) == 0
        await store.delete(KEY)


async def test_what_is_queued_is_written_before_the_store_closes(valkey: Valkey) -> None:
    settings = EmbeddingStoreSettings(redis_url=SecretStr(valkey.url), embedding_key=SecretStr("k"), redis_timeout_s=10)
    async with open_link(settings) as link:
        async with open_embedding_store(link, settings) as store:
            writes = [store.put(embedding(tiles=2, key=key_of(index))) for index in range(5)]
        assert all(write.result() for write in writes)
        async with open_embedding_store(link, settings) as store:
            assert await store.get(key_of(4)) is not None


@asynccontextmanager
async def slow_link(port: int, bytes_per_s: float) -> AsyncIterator[str]:
    """Yield the URL of a server behind a link that all its connections share."""
    next_free = 0.0

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        nonlocal next_free
        loop = asyncio.get_running_loop()
        try:
            while data := await source.read(64 << 10):
                next_free = max(next_free, loop.time()) + len(data) / bytes_per_s
                await asyncio.sleep(next_free - loop.time())
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection("127.0.0.1", port, limit=64 << 10)
        await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=64 << 10)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_the_timeout_bounds_one_value_and_not_a_whole_embedding(valkey: Valkey) -> None:
    large = embedding(tiles=13, hidden=3584)  # 24 MB: 4 s on this link, and 0.3 s for each value
    async with slow_link(valkey.port, 6e6) as url, store_over(url, timeout_s=3) as (store, _):
        assert await store.put(large)
        read = await store.get(KEY)
        assert read is not None
        assert bytes(read.payload) == bytes(large.payload)


async def test_many_large_embeddings_at_once_take_turns_and_are_all_read(valkey: Valkey) -> None:
    large = [embedding(tiles=2, hidden=3584, key=key_of(index)) for index in range(12)]
    async with store_over(valkey.url) as (store, _):
        assert all(await asyncio.gather(*map(store.put, large)))
        reads = await asyncio.gather(*(store.get(large[index % 12].key) for index in range(48)))
        assert all(read is not None for read in reads)


async def test_a_server_that_refuses_lives_so_the_breaker_stays_closed(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        await store.put(embedding())
        for index in range(5):
            await link.redis.lpush(key_of(index).name.manifest_key.decode(), "x")
            assert await store.get(key_of(index)) is None
        await link.redis.config_set("maxmemory", "1")
        for _ in range(5):
            assert not await store.put(embedding(key=key_of(9)))
        assert await store.get(KEY) is not None, "neither WRONGTYPE nor OOM has opened the breaker"


async def test_a_server_that_lets_nobody_in_opens_the_breaker(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (_, admin):
        await admin.redis.config_set("requirepass", "secret")
        async with store_over(valkey.url.replace("//", "//:wrong@")) as (store, link):
            for _ in range(3):
                assert await store.get(KEY) is None
            assert link.breaker.is_open


async def test_a_password_a_database_and_tls_free_urls_reach_the_bulk_connections(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (_, admin):
        await admin.redis.config_set("requirepass", "secret")
        url = f"redis://:secret@127.0.0.1:{valkey.port}/5"
        async with store_over(url) as (store, _):
            assert await store.put(embedding())
            assert await store.get(KEY) is not None


async def test_forged_values_with_a_fitting_mac_are_misses_and_are_forgotten(valkey: Valkey) -> None:
    async with store_over(valkey.url, key="") as (store, link):
        for name, value in {
            "64 TiB": (1 << 24, 1 << 22, 0),
            "1 TiB": (1 << 22, 1 << 16, 0),
            "type 9": (1, 1, 9),
        }.items():
            await link.redis.set(MANIFEST, forged_manifest(*value))
            assert await store.describe(KEY, Patience()) is None, name
            assert not await link.redis.exists(MANIFEST), name
        await store.put(embedding())
        await link.redis.copy(KEY.name.group_key(0).decode(), KEY.name.group_key(1).decode(), replace=True)
        assert await store.get(KEY) is None, "a group in another's place"
        assert not await link.redis.exists(MANIFEST)


def forged_manifest(tokens: int, hidden: int, data_type: int) -> bytes:
    """Return a manifest as anybody can make it where there is no key."""
    manifest = EmbeddingFormat("").manifest(KEY.name, embedding(tiles=1, hidden=8).info)
    numbers = struct.pack("<III", 1, tokens, hidden)
    fields = manifest[:6] + bytes([data_type]) + manifest[7:8] + numbers + manifest[20:-32]
    key = blake3(b"", derive_key_context="internvl-serving embedding values v1").digest()
    return fields + blake3(fields, key=key).digest()


async def test_what_cannot_be_stored_is_refused_quietly(valkey: Valkey) -> None:
    huge = Embedding(KEY, EmbeddingInfo(5000, 5000, 1, "float32", 1, 1, 1, 1), bytes(20_000))
    async with store_over(valkey.url) as (store, link):
        assert not await store.put(huge)
        assert not await link.redis.keys()


async def test_a_put_that_fails_on_the_way_leaves_no_manifest(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        await link.redis.config_set("maxmemory", "6mb")
        assert not await store.put(embedding(tiles=13, hidden=3584))
        await link.redis.config_set("maxmemory", "0")
        assert not await link.redis.exists(MANIFEST)
        assert await store.describe(KEY, Patience()) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n",
        b"-\xff\xfe\r\n",
        b"-LOADING\r\n",
        b":7\r\n",
        b"*1\r\n$1\r\nx\r\n",
        b"$99999999999\r\nx",
        b"$9999999999999999999999999999999999999999\r\nx",
        b"+OK\r\n",
        b"$1\r\nx\r\n",
        b"$-1\r\n",
        b"\n",
        b"$",
        b"",
    ],
)
async def test_whatever_a_server_answers_is_a_miss(answer: bytes) -> None:
    breaker = CircuitBreaker(threshold=100)
    async with (
        lying_server(lambda command: answer) as url,
        store_over(url, timeout_s=0.1, breaker=breaker) as (store, _),
    ):
        assert await store.describe(KEY, Patience()) is None
        assert await store.get(KEY) is None
        await store.put(embedding(tiles=1, hidden=8))
        await store.delete(KEY)


@pytest.mark.parametrize(
    "answer",
    [
        b"$-1\r\n",
        b"$5\r\nhello\r\n",
        b"$99999999999\r\nx",
        b"$7\r\nxxxxxxxyyy",
        b"+OK\r\n",
        b"-ERR no\r\n",
        b"-LOADING\r\n",
        b"x" * 5000,
        b"",
    ],
)
async def test_whatever_a_server_answers_for_a_group_is_a_miss(answer: bytes) -> None:
    manifest = EmbeddingFormat("k").manifest(KEY.name, embedding().info)

    def answers(command: bytes) -> bytes:
        if MANIFEST + b"\r\n" in command and b"GET" in command:
            return b"$%d\r\n%b\r\n" % (len(manifest), manifest)
        return b":1\r\n" if b"UNLINK" in command else b"+OK\r\n" if b"CLIENT" in command else answer

    breaker = CircuitBreaker(threshold=100)
    async with lying_server(answers) as url, store_over(url, timeout_s=0.1, breaker=breaker) as (store, _):
        assert await store.get(KEY) is None


async def test_a_server_that_trickles_is_given_up(valkey: Valkey) -> None:
    manifest = EmbeddingFormat("k").manifest(KEY.name, embedding().info)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while command := await reader.read(64 << 10):
            if MANIFEST + b"\r\n" in command:
                writer.write(b"$%d\r\n%b\r\n" % (len(manifest), manifest))
            elif b"GET" in command:
                writer.write(b"$99\r\n")
                while not writer.is_closing():
                    writer.write(b"x")
                    await asyncio.sleep(0.001)
            else:
                writer.write(b"+OK\r\n" * command.count(b"CLIENT"))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with store_over(url, timeout_s=0.1, breaker=CircuitBreaker(threshold=100)) as (store, _):
            async with asyncio.timeout(5):
                assert await store.get(KEY) is None


@asynccontextmanager
async def lying_server(answers: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """Yield the URL of a server that gives whatever `answers` says for what it receives; nothing: it hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (command := await reader.read(64 << 10)) and (answer := answers(command)):
            writer.write(answer * max(1, command.count(b"CLIENT")))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
