"""The language side as a whole says what the reference says: from dialogue to text, for every golden conversation."""

import asyncio
from collections.abc import Iterator

import pytest

from llm_service.engine.sequence import FinishReason
from tests.golden_cases import ALL_CHECKPOINTS, UNSAFE_CASES, GoldenTurn, header, turns
from tests.golden_models import golden_model
from tests.llm_service.golden_answering import Asking, Said, asking, loaded


@pytest.fixture(scope="module", autouse=True)
def drop_models() -> Iterator[None]:
    yield
    loaded.cache_clear()
    golden_model.cache_clear()


async def answer(system: Asking, case: GoldenTurn, stop_id: int) -> Said:
    options = system.options(
        case.config["max_new_tokens"],
        repetition_penalty=case.config.get("repetition_penalty", 1.0),
        num_beams=case.config.get("num_beams", 1),
        stop_token_ids=frozenset({stop_id}),  # the one at which the reference stops
    )
    return await system.ask(system.media.dialogue(case), options)


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
async def test_answers_and_why_they_end_are_the_references(checkpoint: str) -> None:
    stop_id = header(checkpoint)["eos_token_id"]
    cases = [case for case in turns(checkpoint) if case.name not in UNSAFE_CASES]
    assert len(cases) > 25
    async with asking(checkpoint) as system:
        said = await asyncio.gather(*(answer(system, case, stop_id) for case in cases))
    for case, answered in zip(cases, said, strict=True):
        assert answered.ids == [case.output_ids], case.name
        assert answered.texts == [case.response], case.name
        stopped = case.output_ids[-1] == stop_id
        (result,) = answered.finished.candidates
        assert result.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH), case.name
