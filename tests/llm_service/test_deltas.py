"""Tokens that come together make one delta, and say what they say one by one."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import pytest

from llm_service.admission import Admission
from llm_service.answerer import Answerer, Finished
from llm_service.candidate import Delta
from llm_service.embeddings import EmbeddingReader
from llm_service.engine.engine import EngineStats
from llm_service.engine.sequence import EngineRequest, FinishReason, ProbeOutput, TokenOutput
from shared.local_cache import LocalEmbeddingCache
from shared.store import NoEmbeddingStore
from tests.golden_cases import turns
from tests.golden_models import golden_model
from tests.llm_service.golden_answering import CHECKPOINT, Asking, asking, loaded

(CASE,) = [case for case in turns(CHECKPOINT) if case.name == "text_only"]
COUNT = len(CASE.output_ids)


@pytest.fixture(scope="module", autouse=True)
def drop_models() -> Iterator[None]:
    yield
    loaded.cache_clear()
    golden_model.cache_clear()


class BatchingEngine:
    """Says the tokens of a golden answer, some at a time."""

    max_tokens = 1000

    def __init__(self, token_ids: Sequence[int], sizes: Sequence[int]) -> None:
        self._token_ids, self._sizes = token_ids, sizes
        self.said = 0

    async def generate(
        self, request: EngineRequest, ended: AbstractSet[int] = frozenset()
    ) -> AsyncGenerator[tuple[TokenOutput, ...]]:
        for size in self._sizes:
            if ended:
                return
            tokens = self._token_ids[self.said : self.said + size]
            self.said += size
            is_last = self.said == len(self._token_ids)
            yield tuple(
                TokenOutput(token, FinishReason.LENGTH if is_last and token is tokens[-1] else None, logprob=-1.0)
                for token in tokens
            )

    async def probe(self, request: EngineRequest) -> ProbeOutput:
        raise NotImplementedError

    def forget(self) -> None:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError


def answering(system: Asking, engine: BatchingEngine) -> Asking:
    reader = EmbeddingReader(LocalEmbeddingCache(0), NoEmbeddingStore(), system.media)
    facts, writer, schemas = system.answerer.facts, system.model.writer(), system.model.schemas()
    return replace(system, answerer=Answerer(facts, writer, schemas, reader, engine, Admission(8, 1)))


async def test_tokens_that_come_together_are_told_together() -> None:
    async with asking() as system:
        scripted = answering(system, BatchingEngine(CASE.output_ids, (1, COUNT - 3, 2)))
        options = system.options(tells_logprobs=True, top_logprobs=0)
        events = [event async for event in scripted.answerer.answer(system.media.dialogue(CASE), options)]
        (told,) = (await system.ask(system.media.dialogue(CASE), system.options(COUNT))).texts
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [len(delta.token_ids) for delta in deltas] == [len(delta.logprobs) for delta in deltas] == [1, COUNT - 3, 2]
    assert "".join(delta.text for delta in deltas) == told
    assert isinstance(events[-1], Finished)
    assert events[-1].num_output_tokens == COUNT


async def test_what_comes_together_with_a_stop_sequence_is_not_told() -> None:
    async with asking() as system:
        whole = await system.ask(system.media.dialogue(CASE), system.options(COUNT))
        stop = whole.texts[0][3]
        scripted = answering(system, BatchingEngine(CASE.output_ids, (COUNT - 1, 1)))
        said = await scripted.ask(system.media.dialogue(CASE), system.options(stop_sequences=(stop,)))
    assert said.texts == [whole.texts[0].partition(stop)[0].rstrip()]
    assert said.finished.reason is FinishReason.STOP
    assert said.ids[0] == CASE.output_ids[: len(said.ids[0])]
    assert len(said.ids[0]) == said.finished.num_output_tokens < COUNT
