"""What was computed once is found again, and nothing else is ever taken for it."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.pace import StepLimits
from llm_service.engine.prefix import PrefixKeys, always_plain
from llm_service.engine.sequence import EngineRequest, Probe, SamplingParams, TokenOutput, candidates_of
from llm_service.model.config import RopeConfig
from llm_service.model.rope import rotation_of
from llm_service.prompt.splice import PlaceholderRange, PromptTokens
from shared.digest import digest_of
from shared.errors import EmbeddingNotFound
from tests.engine_outputs import each
from tests.llm_service.fakes_llm import FakeRunner, continuation, ref, request, running

VISUAL = 999  # the token at every placeholder


async def collect(engine: PagedEngine, asked: EngineRequest) -> list[TokenOutput]:
    async with aclosing(each(engine.generate(asked))) as outputs:
        return [output async for output in outputs]


async def said(engine: PagedEngine, asked: EngineRequest) -> tuple[list[int], int | None]:
    """Return an answer and how many of its prompt's tokens were cached."""
    outputs = await collect(engine, asked)
    assert all(output.num_cached is None for output in outputs[1:])
    return [output.token_id for output in outputs], outputs[0].num_cached


class Pictures:
    """Embeddings of one number a row, by name; records which placeholders were fetched."""

    def __init__(self, **rows: Sequence[int]) -> None:
        self.rows = rows
        self.fetched: list[str] = []

    def asked(self, *parts: int | str | tuple[str, int, int], tokens: int = 4) -> EngineRequest:
        """Ask with a prompt of ids and pictures; (name, start, end) stands for some of a picture's rows."""
        ids: list[int] = []
        places: list[PlaceholderRange] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            name, start, end = (part, 0, len(self.rows[part])) if isinstance(part, str) else part
            places.append(PlaceholderRange(len(ids), end - start, ref(digest_of(name.encode())), start))
            ids += [VISUAL] * (end - start)
        names = [part if isinstance(part, str) else part[0] for part in parts if not isinstance(part, int)]

        async def fetch(indices: tuple[int, ...]) -> Mapping[int, torch.Tensor]:
            await asyncio.sleep(0)
            self.fetched += [names[index] for index in indices]
            return {index: self._rows(names[index], places[index]) for index in indices}

        return EngineRequest(PromptTokens(tuple(ids), tuple(places)), (), SamplingParams(tokens), fetch=fetch)

    def meant(self, asked: EngineRequest) -> list[int]:
        """The prompt as the fake model sees it."""
        ids = list(asked.prompt.ids)
        by_digest = {digest_of(name.encode()): rows for name, rows in self.rows.items()}
        for place in asked.prompt.placeholders:
            rows = by_digest[place.ref.digest][place.offset : place.offset + place.length]
            ids[place.start : place.start + place.length] = rows
        return ids

    def _rows(self, name: str, place: PlaceholderRange) -> torch.Tensor:
        if name not in self.rows:
            raise EmbeddingNotFound("gone")
        return torch.tensor(self.rows[name][place.offset : place.offset + place.length])


async def test_a_prompt_that_was_read_is_not_read_again_but_for_its_last_tokens() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        prompt = list(range(1, 22))
        assert await said(engine, request(prompt, 3)) == (continuation(prompt, 3), 0)
        runner.batches.clear()
        assert await said(engine, request(prompt, 3)) == (continuation(prompt, 3), 20)
    assert runner.batches == [[1], [1], [1]]


async def test_the_last_token_is_computed_even_where_all_blocks_are_known() -> None:
    async with running(FakeRunner()) as engine:
        prompt = list(range(1, 17))
        assert (await said(engine, request(prompt, 3)))[1] == 0
        assert await said(engine, request(prompt, 3)) == (continuation(prompt, 3), 12)


async def test_the_next_turn_finds_the_answer_too() -> None:
    async with running(FakeRunner()) as engine:
        first = [*range(1, 11)]
        answer, _ = await said(engine, request(first, 14))
        second = [*first, *answer, 5, 6, 7]
        assert await said(engine, request(second, 4)) == (continuation(second, 4), 20)  # 23 were computed


async def test_prompts_share_their_beginning_while_both_run() -> None:
    runner = FakeRunner()
    async with running(runner) as engine:
        common = list(range(1, 25))
        async with aclosing(each(engine.generate(request([*common, 30], 50)))) as outputs:
            await anext(outputs)
            assert await said(engine, request([*common, 31], 5)) == (continuation([*common, 31], 5), 24)
            assert [(await anext(outputs)).token_id for _ in range(6)] == continuation([*common, 30], 7)[1:]


async def test_a_preempted_sequence_finds_what_it_had_and_says_the_same() -> None:
    limits = EngineLimits(max_sequences=4, step=StepLimits(64), max_tokens=64)
    prompts = [[index] * 10 for index in range(1, 5)]
    async with running(FakeRunner(), num_blocks=16, limits=limits) as engine:
        answers = await asyncio.gather(*(said(engine, request(prompt, 30)) for prompt in prompts))
        assert engine.stats().num_preemptions
    assert [ids for ids, _ in answers] == [continuation(prompt, 30) for prompt in prompts]


async def test_nothing_is_found_any_more_once_it_is_to_be_forgotten() -> None:
    async with running(FakeRunner()) as engine:
        prompt = list(range(1, 22))
        await said(engine, request(prompt, 3))
        assert engine.stats().num_kept_blocks
        engine.forget()
        assert (await said(engine, request(prompt, 3)))[1] == 0


async def test_what_a_running_sequence_holds_is_not_found_once_it_is_to_be_forgotten() -> None:
    async with running(FakeRunner()) as engine:
        prompt = list(range(1, 22))
        async with aclosing(each(engine.generate(request(prompt, 50)))) as outputs:
            await anext(outputs)
            engine.forget()
            assert (await said(engine, request(prompt, 3)))[1] == 0
            assert [(await anext(outputs)).token_id for _ in range(6)] == continuation(prompt, 7)[1:]


async def test_a_picture_that_is_cached_is_not_fetched() -> None:
    pictures = Pictures(cat=range(100, 112))
    async with running(FakeRunner()) as engine:
        first = pictures.asked(1, 2, "cat", 3)
        assert await said(engine, first) == (continuation(pictures.meant(first), 4), 0)
        again = pictures.asked(1, 2, "cat", 4, 5)
        assert await said(engine, again) == (continuation(pictures.meant(again), 4), 12)
        assert pictures.fetched == ["cat", "cat"], "its last rows are in a block with what comes behind"
        third = pictures.asked(1, 2, "cat", 4, 5, 6, 7, 8)
        assert await said(engine, third) == (continuation(pictures.meant(third), 4), 16)
    assert pictures.fetched == ["cat", "cat"]


async def test_two_pictures_of_one_size_are_never_taken_for_each_other() -> None:
    pictures = Pictures(cat=range(100, 112), dog=range(200, 212))
    async with running(FakeRunner()) as engine:
        for names in (("cat", "dog"), ("dog", "cat"), ("cat", "cat"), ("dog", "dog"), ("cat", "dog")):
            asked = pictures.asked(1, *names, 2)
            assert (await said(engine, asked))[0] == continuation(pictures.meant(asked), 4)


async def test_rows_of_a_picture_are_told_apart_by_their_offset() -> None:
    pictures = Pictures(film=range(100, 140))
    async with running(FakeRunner()) as engine:
        for start in (0, 8, 16, 8):
            asked = pictures.asked(("film", start, start + 16), 1)
            assert (await said(engine, asked))[0] == continuation(pictures.meant(asked), 4)


async def test_the_beginning_of_a_picture_is_found_where_its_end_is_not() -> None:
    pictures = Pictures(cat=range(100, 140))
    async with running(FakeRunner()) as engine:
        await said(engine, pictures.asked(("cat", 0, 20), 1))
        asked = pictures.asked("cat", 1)
        assert await said(engine, asked) == (continuation(pictures.meant(asked), 4), 20)


async def test_only_the_embeddings_behind_what_is_cached_are_fetched() -> None:
    pictures = Pictures(cat=range(100, 112), dog=range(200, 212))
    async with running(FakeRunner()) as engine:
        await said(engine, pictures.asked("cat", 1, 2, 3, 4))
        pictures.fetched.clear()
        asked = pictures.asked("cat", 1, 2, 3, 4, "dog", 5)
        assert (await said(engine, asked))[0] == continuation(pictures.meant(asked), 4)
    assert pictures.fetched == ["dog"]


async def test_an_embedding_that_cannot_be_had_fails_its_request_alone() -> None:
    pictures = Pictures(cat=range(100, 112))
    lost = pictures.asked(1, "cat", 2)
    async with running(FakeRunner()) as engine:
        stream = asyncio.create_task(said(engine, request([3, 4], 20)))
        rows, pictures.rows = pictures.rows, {}
        with pytest.raises(EmbeddingNotFound):
            await said(engine, lost)
        pictures.rows = rows
        assert (await stream)[0] == continuation([3, 4], 20)
        assert (await said(engine, pictures.asked(1, "cat", 2)))[1] == 0


async def test_leaving_while_an_embedding_is_fetched_leaves_nothing_behind() -> None:
    fetching = asyncio.Event()

    async def fetch(indices: tuple[int, ...]) -> Mapping[int, torch.Tensor]:
        fetching.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with running(FakeRunner()) as engine:
        asked = replace(Pictures(cat=range(100, 112)).asked(1, "cat", 2), fetch=fetch)
        task = asyncio.create_task(said(engine, asked))
        await fetching.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await said(engine, request([1, 2], 3)))[0] == continuation([1, 2], 3)
        assert engine.stats().num_waiting == 0


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.lists(st.sampled_from(["cat", "dog", 1, 2, ("cat", 3, 9), ("dog", 0, 6)]), min_size=1, max_size=8),
            st.integers(1, 20),
        ),
        min_size=1,
        max_size=14,
    ),
    num_blocks=st.integers(26, 60),
    max_sequences=st.integers(1, 4),
)
async def test_whatever_is_shared_evicted_and_preempted_each_sequence_says_what_it_says_alone(
    asked: list[tuple[list[int | str | tuple[str, int, int]], int]], num_blocks: int, max_sequences: int
) -> None:
    pictures = Pictures(cat=range(100, 110), dog=range(200, 207))
    requests = [pictures.asked(*parts, tokens=tokens) for parts, tokens in asked]
    limits = EngineLimits(max_sequences, StepLimits(8), max_tokens=104)
    async with running(FakeRunner(), num_blocks=num_blocks, limits=limits) as engine:
        answers = await asyncio.gather(*(said(engine, each) for each in requests))
    assert [ids for ids, _ in answers] == [
        continuation(pictures.meant(each), each.params.max_output_tokens) for each in requests
    ]


async def test_a_probe_finds_every_position_though_the_prompt_is_cached() -> None:
    async with running(FakeRunner()) as engine:
        prompt = list(range(1, 22))
        await said(engine, request(prompt, 3))
        asked = replace(request(prompt), probe=Probe((9, 20), (1, 2)))
        found = await engine.probe(asked)
    assert [row[0] for row in found.probabilities] == [
        float(continuation(prompt[: position + 1], 1)[0]) for position in (9, 20)
    ]


def keys_of(asked: EngineRequest, rope: RopeConfig | None = None, num_blocks: int = 4) -> list[bytes]:
    rotation = (lambda length: rotation_of(rope, length)) if rope else always_plain
    (seq,) = candidates_of(asked, lambda output: None, 0.0)
    return PrefixKeys(4, rotation).extend(seq, num_blocks)


def test_tokens_that_stand_elsewhere_have_other_keys() -> None:
    asked = request(list(range(16)))
    moved = replace(asked, positions=torch.arange(16) / 2)
    assert set(keys_of(asked)).isdisjoint(keys_of(moved))
    assert keys_of(moved) == keys_of(replace(asked, positions=torch.arange(16) / 2))


@pytest.mark.parametrize(
    ("kind", "same_when_long"), [("default", True), ("dynamic", False), ("longrope", True)], ids=str
)
def test_prompts_that_are_rotated_otherwise_have_other_keys(kind: str, *, same_when_long: bool) -> None:
    rope = RopeConfig(10_000.0, kind, 2.0, max_positions=20, original_max_positions=20)
    short, longer, longest = (keys_of(request(list(range(length))), rope) for length in (20, 24, 28))
    assert (short == longer) == (kind == "default")
    assert (longer == longest) == same_when_long


def test_a_key_says_all_that_came_before() -> None:
    here, there = list(range(16)), [7, *range(1, 16)]
    assert set(keys_of(request(here))).isdisjoint(keys_of(request(there)))


def test_a_tenant_s_prompts_have_keys_of_their_own() -> None:
    asked = request(list(range(16)))
    kept = [keys_of(replace(asked, tenant=tenant)) for tenant in ("", "acme", "umbrella", "acme")]
    assert kept[1] == kept[3]
    assert len({key for keys in kept[:3] for key in keys}) == 12


async def test_what_was_read_for_a_tenant_is_read_again_for_another() -> None:
    prompt = list(range(1, 21))
    async with running(FakeRunner()) as engine:
        for tenant, num_cached in (("acme", 0), ("umbrella", 0), ("", 0), ("acme", 16), ("", 16)):
            asked = replace(request(prompt, 3), tenant=tenant)
            assert await said(engine, asked) == (continuation(prompt, 3), num_cached)


def test_keys_go_on_where_they_were() -> None:
    keys = PrefixKeys(4, always_plain)
    (seq,) = candidates_of(request(list(range(10))), lambda output: None, 0.0)
    before = keys.extend(seq, 2)
    seq.token_ids += [20, 21, 22]
    assert keys.extend(seq, 3)[:2] == before
    assert keys.extend(seq, 3) == keys_of(request([*range(10), 20, 21]), num_blocks=3)
    assert keys.extend(seq, 1) == before[:1]


def test_a_block_manager_is_not_needed_to_name_blocks() -> None:
    assert BlockManager(4, 4).find(keys_of(request(list(range(16))))) == []
