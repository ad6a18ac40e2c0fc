"""A gateway between two replicas of each stage, over real channels: who is asked, and who instead."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from internvl_serving.common.v1 import embedding_pb2
from shared.digest import digest_of
from shared.errors import NotReady, QueueFull
from tests.rpc.scripted_stages import (
    Client,
    ScriptedLlm,
    ScriptedVision,
    Stage,
    error_of,
    gateway_over,
    stages_of,
    text_of,
    until_serving,
)


class Fleet:
    """Two replicas of each stage."""

    def __init__(self) -> None:
        self.llms, self.visions = (ScriptedLlm(), ScriptedLlm()), (ScriptedVision(), ScriptedVision())
        self.vision_stages: list[Stage] = []
        self.llm_stages: list[Stage] = []

    @property
    def asked(self) -> list[int]:
        """How many questions each LLM replica got."""
        return [len(llm.requests) for llm in self.llms]


@asynccontextmanager
async def running(tmp_path: Path, redis_url: str, **settings: Any) -> AsyncIterator[tuple[Client, Fleet]]:
    fleet = Fleet()
    for vision, llm in zip(fleet.visions, fleet.llms, strict=True):
        vision_stage, llm_stage = await stages_of(vision, llm)
        fleet.vision_stages.append(vision_stage)
        fleet.llm_stages.append(llm_stage)
    targets = [",".join(stage.address for stage in stages) for stages in (fleet.vision_stages, fleet.llm_stages)]
    async with gateway_over(tmp_path, *targets, redis_url, **settings) as channel:
        await until_serving(channel)
        yield Client(channel, fleet.visions[0], fleet.llms[0]), fleet
    for stage in (*fleet.vision_stages, *fleet.llm_stages):
        await stage.server.stop(None)


async def used_both(client: Client, fleet: Fleet) -> None:
    """Ask until both replicas of each stage are known to serve."""
    number = 0
    while not (all(fleet.asked) and all(vision.known for vision in fleet.visions)):
        number += 1
        await client.ask(f"question {number}")
        await client.ask(b"a picture %d" % number)
    for vision in fleet.visions:
        vision.known.clear()


async def test_every_turn_of_a_conversation_goes_to_one_replica(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as (client, fleet):
        await used_both(client, fleet)
        homes: set[int] = set()
        number = 0
        while homes != {0, 1}:
            number += 1
            before = fleet.asked
            conversation_id = await client.conversation()
            for turn in ("What?", "Where?", "When?"):
                await client.ask(f"{turn} {number}", conversation_id=conversation_id)
            asked = [after - earlier for after, earlier in zip(fleet.asked, before, strict=True)]
            assert sorted(asked) == [0, 3]
            homes.add(asked.index(3))


async def test_a_dialogue_that_is_sent_whole_goes_where_its_beginning_went(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as (client, fleet):
        await used_both(client, fleet)
        for content in (bytes([number]) * 100 for number in range(8)):
            before = fleet.asked
            for question in ("What?", "Where?", "When?"):
                await client.ask(content, question)
            assert sorted(after - earlier for after, earlier in zip(fleet.asked, before, strict=True)) == [0, 3]


async def test_a_full_replica_is_passed_over(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as (client, fleet):
        await used_both(client, fleet)
        before = sum(fleet.asked)
        for llm in fleet.llms:
            llm.errors = [QueueFull("Later.", retry_after_s=9.0)]
        assert (await error_of(client.ask("Hi"))).retry_after_s == 9.0
        assert sum(fleet.asked) - before == 2
        fleet.llms[0].errors = [QueueFull("Later.")] * 100
        for number in range(8):
            assert text_of(await client.ask(f"question {number}")) == "A cat."


async def test_a_replica_that_drains_costs_nobody_an_answer(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as (client, fleet):
        await used_both(client, fleet)
        fleet.llms[0].errors = [NotReady("Shutting down.") for _ in range(100)]
        for number in range(8):
            assert text_of(await client.ask(f"question {number}")) == "A cat."


async def test_a_medium_goes_to_the_replica_that_had_it(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as (client, fleet):
        await used_both(client, fleet)
        pictures = [bytes([number]) * 100 for number in range(16)]
        for content in pictures * 2:
            events = await client.ask(content, "What?")
        assert events[-1].finished.receipts[0].cache_tier == embedding_pb2.CACHE_TIER_STORE
        known = [vision.known.keys() for vision in fleet.visions]
        assert known[0] | known[1] == set(map(digest_of, pictures))
        assert not known[0] & known[1]
        assert all(known)


async def test_a_lost_vision_replica_is_left_for_the_other(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as (client, fleet):
        await fleet.vision_stages[0].server.stop(None)
        for number in range(8):
            assert text_of(await client.ask(bytes([number]) * 100, "What?")) == "A cat."
        assert len(fleet.visions[1].known) == 8
