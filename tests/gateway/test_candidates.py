"""Turns with several candidates, tools and videos, through the heart of the gateway with fake stages."""

from collections.abc import AsyncIterator, Sequence

import pytest

from gateway.chat import Chat
from gateway.content import MediaPart, Medium, Message, PreprocessOptions, Role, TextPart, ToolCall, VideoOptions
from gateway.dialogue import Dialogue
from gateway.encoder import MediaEncoder
from gateway.events import (
    CandidateResult,
    Delta,
    FinishReason,
    Generated,
    GenerationConfig,
    RankingMethod,
    TokenLogprob,
)
from gateway.prompt import TextSegment, Tool, VisualSegment
from gateway.ranking import Ranking
from shared.errors import CriticUnavailable, NoCritic
from tests.gateway.fakes_gateway import (
    CAT,
    STARTED,
    Gateway,
    Script,
    answer_of,
    ask,
    gateway_on,
    gateway_without_redis,
    inline,
    user,
)

STOP = FinishReason.STOP


def two_candidates() -> Script:
    results = (CandidateResult(STOP, 2, -1.5), CandidateResult(FinishReason.LENGTH, 3, -0.5))
    deltas = [Delta("A ", (1,), 0), Delta("The ", (4,), 1), Delta("cat.", (2,), 0), Delta("dog.", (5,), 1)]
    return [STARTED, *deltas, Generated(STOP, candidates=results)]


class FakeCritic:
    """Gives every answer one step and its score by its text; raises `error`, if there is one."""

    def __init__(self, scores: dict[str, float], error: Exception | None = None) -> None:
        self.scores, self.error = scores, error

    async def score(self, dialogue: Dialogue, answers: Sequence[str]) -> list[tuple[float, ...]]:
        if self.error:
            raise self.error
        return [(self.scores[answer],) for answer in answers]


def with_critic(gateway: Gateway, critic: FakeCritic) -> Gateway:
    encoder = MediaEncoder(gateway.vision, gateway.library, parallel=8)
    gateway.chat = Chat(gateway.llm, encoder, gateway.library, gateway.conversations, gateway.limits, Ranking(critic))
    return gateway


@pytest.fixture
async def gateway(store_url: str) -> AsyncIterator[Gateway]:
    async with gateway_on(store_url) as made:
        yield made


async def kept(gateway: Gateway, conversation_id: str) -> tuple[Message, ...]:
    return (await gateway.conversations.list_messages(conversation_id, 0, "")).messages


async def test_candidates_are_told_apart_and_ranked() -> None:
    gateway = gateway_without_redis(two_candidates())
    finished = await gateway.finished(ask(user("Hi"), config=GenerationConfig(candidate_count=2)))
    assert [candidate.text for candidate in finished.candidates] == ["A cat.", "The dog."]
    assert [candidate.score for candidate in finished.candidates] == [-1.5, -0.5]
    assert (finished.best_index, finished.best.result.finish_reason) == (1, FinishReason.LENGTH)


async def test_an_llm_service_that_names_no_candidates_has_made_one() -> None:
    finished = await gateway_without_redis(answer_of("Good ", "day.")).finished(ask(user("Hi")))
    assert [candidate.text for candidate in finished.candidates] == ["Good day."]
    assert finished.best_index == 0


async def test_log_probabilities_are_passed_on() -> None:
    logprob = TokenLogprob(3, b"A", -0.25, (TokenLogprob(3, b"A", -0.25), TokenLogprob(4, b"The", -1.5)))
    script = [STARTED, Delta("A", (3,), 0, (logprob,)), Generated(STOP)]
    events = await gateway_without_redis(script).answer(ask(user("Hi")))
    assert events[1] == script[1]


async def test_the_best_candidate_is_the_one_that_is_kept(gateway: Gateway) -> None:
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    gateway.llm.scripts = [two_candidates()]
    finished = await gateway.finished(ask(user("Hi"), conversation_id=conversation_id))
    assert finished.message_id
    assert (await kept(gateway, conversation_id))[1].text == "The dog."


async def test_a_critic_chooses_what_is_kept(gateway: Gateway) -> None:
    with_critic(gateway, FakeCritic({"A cat.": 0.9, "The dog.": 0.2}))
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    gateway.llm.scripts = [two_candidates()]
    finished = await gateway.finished(ask(user("Hi"), conversation_id=conversation_id))
    assert (finished.best_index, finished.best.step_scores) == (0, (0.9,))
    assert (await kept(gateway, conversation_id))[1].text == "A cat."


async def test_a_critic_that_fails_as_asked_for_leaves_no_trace(gateway: Gateway) -> None:
    with_critic(gateway, FakeCritic({}, CriticUnavailable("Away.")))
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    gateway.llm.scripts = [two_candidates(), two_candidates()]
    with pytest.raises(CriticUnavailable):
        await gateway.answer(ask(user("Hi"), conversation_id=conversation_id, ranking_method=RankingMethod.CRITIC))
    assert await kept(gateway, conversation_id) == ()
    finished = await gateway.finished(ask(user("Hi"), conversation_id=conversation_id))
    assert finished.best_index == 1


async def test_a_critic_that_there_is_not_is_missed_before_any_work() -> None:
    gateway = gateway_without_redis()
    with pytest.raises(NoCritic):
        await gateway.answer(ask(user(inline(CAT)), ranking_method=RankingMethod.CRITIC))
    assert gateway.vision.finds == []


TOOL = Tool("add", "Adds.", '{"type": "object"}')


async def test_calls_of_tools_are_kept_with_their_results_and_go_back_to_the_model(gateway: Gateway) -> None:
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    calls = (ToolCall("add", '{"a": 1}'), ToolCall("add", '{"a": 2}'))
    results = (CandidateResult(FinishReason.TOOL_CALLS, 9, tool_calls=calls),)
    gateway.llm.scripts = [[STARTED, Delta("Let me add."), Generated(FinishReason.TOOL_CALLS, candidates=results)]]
    asked = await gateway.finished(ask(user("Add."), conversation_id=conversation_id, tools=(TOOL,)))
    named = asked.best.result.tool_calls
    assert [(call.name, call.arguments_json) for call in named] == [("add", '{"a": 1}'), ("add", '{"a": 2}')]
    assert len({call.tool_call_id for call in named} - {""}) == 2
    answers = [Message(Role.TOOL, (TextPart(text),)) for text in ("one", "")]
    await gateway.answer(ask(*answers, conversation_id=conversation_id, tools=(TOOL,)))

    prompt = gateway.llm.requests[1].prompt
    assert prompt.tools == gateway.llm.requests[0].prompt.tools == (TOOL,)
    assert [turn.role for turn in prompt.turns] == [Role.USER, Role.ASSISTANT, Role.TOOL, Role.TOOL]
    assert prompt.turns[1].segments == (TextSegment("Let me add."), *named)
    assert [turn.segments for turn in prompt.turns[2:]] == [(TextSegment("one"),), ()]
    assert [message.role for message in await kept(gateway, conversation_id)] == [
        *(turn.role for turn in prompt.turns),
        Role.ASSISTANT,
    ]


async def test_a_video_is_remembered_with_its_frames(gateway: Gateway) -> None:
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    options = PreprocessOptions(video=VideoOptions(2, 0.5, 3.0))
    clip = MediaPart((Medium("", options, CAT),))
    await gateway.answer(ask(user(clip, "What?"), conversation_id=conversation_id))
    await gateway.answer(ask(user("And?"), conversation_id=conversation_id))
    turn = gateway.llm.requests[1].prompt.turns[0]
    visuals = [segment for segment in turn.segments if isinstance(segment, VisualSegment)]
    assert [visual.frame for visual in visuals] == [0, 1]
    assert {medium.options for medium in gateway.vision.finds} == {options}


async def test_a_tile_budget_is_for_new_media_and_is_kept(gateway: Gateway) -> None:
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    await gateway.answer(ask(user(inline(CAT)), conversation_id=conversation_id, max_total_tiles=5))
    await gateway.answer(ask(user(inline(CAT, 7)), conversation_id=conversation_id, max_total_tiles=4))
    await gateway.answer(ask(user("And?"), conversation_id=conversation_id))
    media = [medium for message in await kept(gateway, conversation_id) for medium in message.media]
    assert [medium.options.max_tiles for medium in media] == [4, 3]
