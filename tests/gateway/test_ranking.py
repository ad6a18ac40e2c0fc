"""Which candidate is the best: by a critic, held to the golden scores, else by log-probability."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.content import Message, TextPart, ToolCall
from gateway.critic import StepCritic
from gateway.dialogue import Dialogue
from gateway.encoder import MediaEncoder
from gateway.events import Candidate, CandidateResult, FinishReason, RankingMethod
from gateway.media import LocalMediaCache, MediaLibrary
from gateway.prompt import Prompt, TextSegment, VisualSegment
from gateway.ranking import Ranking, best_of
from shared.errors import (
    CriticUnavailable,
    DeadlineExceeded,
    EmbeddingNotFound,
    InvalidRequest,
    LlmUnavailable,
    NoCritic,
    PromptTooLong,
    QueueFull,
    ServiceError,
    VisionUnavailable,
)
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    FakeVision,
    MemoryMediaStore,
    assistant,
    gateway_without_redis,
    inline,
    user,
)

GOLDEN = sorted((Path(__file__).parents[1] / "golden/expected").glob("*/prm.json"))
CRITIC, LOG_PROBABILITY, UNSPECIFIED = (
    RankingMethod.CRITIC,
    RankingMethod.LOG_PROBABILITY,
    RankingMethod.UNSPECIFIED,
)
HI = Dialogue(None, (), (user("Hi"),))


class FakeScorer:
    """Knows how likely `+` is for some steps, 0.5 for all others; raises the next of `errors` first."""

    def __init__(self, known: dict[str, float] | None = None, errors: Sequence[Exception] = ()) -> None:
        self.known = known or {}
        self.errors = list(errors)
        self.prompts: list[Prompt] = []

    async def score_turns(self, prompt: Prompt, choices: Sequence[str]) -> list[tuple[float, ...]]:
        assert choices == ("+", "-")
        self.prompts.append(prompt)
        if self.errors:
            raise self.errors.pop(0)
        return [(score, 1 - score) for score in map(self._score, steps_of(prompt))]

    def _score(self, step: str) -> float:
        return self.known.get(step, 0.5)


def steps_of(prompt: Prompt) -> list[str]:
    """The steps that a critic is asked to judge, read back out of the dialogue."""
    texts = [turn.segments[-1].text for turn in prompt.turns[::2] if isinstance(turn.segments[-1], TextSegment)]
    return [text.rpartition("### Solution Process:\n")[2] for text in texts]


def written(prompt: Prompt) -> list[str]:
    return [
        "".join(s.text if isinstance(s, TextSegment) else "<image>" for s in turn.segments) for turn in prompt.turns
    ]


def critic_of(scorer: FakeScorer, vision: FakeVision | None = None) -> StepCritic:
    library = MediaLibrary(MemoryMediaStore(), LocalMediaCache(1 << 20), 1 << 20)
    return StepCritic(scorer, MediaEncoder(vision or FakeVision([CAT]), library, 8))


def candidate(text: str, mean_logprob: float = 0.0) -> Candidate:
    return Candidate(text, CandidateResult(FinishReason.STOP, 1, mean_logprob))


async def seen(*messages: Message) -> Dialogue:
    """The dialogue as the gateway hands it to a critic: with the digests of its media."""
    return await gateway_without_redis().library.identify(Dialogue(None, (), messages))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
async def test_the_golden_candidates_are_asked_about_and_ranked_as_the_reference_does(path: Path) -> None:
    golden: dict[str, Any] = json.loads(path.read_text())
    entries = golden["candidates"]
    known = {step: score for entry in entries for step, score in zip(entry["steps"], entry["step_scores"], strict=True)}
    scorer = FakeScorer(known)
    dialogue = await seen(user(inline(CAT), golden["question"]))
    ranked = await Ranking(critic_of(scorer)).rank(CRITIC, dialogue, [candidate(e["candidate"]) for e in entries])
    for entry, prompt, each in zip(entries, scorer.prompts, ranked, strict=True):
        assert prompt.system_message == golden["system_message"]
        first, *others = entry["steps"]
        question = f"### Question:\n<image>\n{golden['question']}\n\n### Solution Process:\n{first}"
        assert written(prompt) == [question, *(text for step in others for text in ("+", step))]
        assert each.step_scores == tuple(entry["step_scores"])
        assert each.score == pytest.approx(entry["mean_score"])
    order = sorted(range(len(ranked)), key=lambda index: -ranked[index].score)
    assert order == golden["ranking_by_mean"]
    assert best_of(ranked) == golden["ranking_by_mean"][0]


async def test_a_critic_reads_the_whole_dialogue_with_its_pictures() -> None:
    scorer, vision = FakeScorer(), FakeVision()
    dialogue = await seen(user(inline(CAT), "What?"), assistant("A cat."), user(inline(DOG), "And this?"))
    await critic_of(scorer, vision).score(dialogue, ["A dog."])
    assert written(scorer.prompts[0]) == [
        "### Question:\n<image>\nWhat?\n\nA cat.\n\n<image>\nAnd this?\n\n### Solution Process:\nA dog."
    ]
    assert sorted(vision.encodes) == sorted([CAT, DOG])
    visuals = [segment for segment in scorer.prompts[0].turns[0].segments if isinstance(segment, VisualSegment)]
    assert len(visuals) == 2


async def test_a_critic_reads_calls_of_tools_as_text() -> None:
    scorer = FakeScorer()
    answer = Message(assistant().role, (TextPart("Let me see: "), ToolCall("f", '{"x": 1}')))
    await critic_of(scorer).score(await seen(user("What?"), answer, user("Well?")), ["3"])
    assert 'Let me see: f({"x": 1})' in written(scorer.prompts[0])[0]


async def test_without_a_critic_log_probability_decides() -> None:
    ranked = await Ranking().rank(UNSPECIFIED, HI, [candidate("a", -2.0), candidate("b", -0.5), candidate("c", -0.5)])
    assert [each.score for each in ranked] == [-2.0, -0.5, -0.5]
    assert all(each.step_scores == () for each in ranked)
    assert best_of(ranked) == 1


async def test_a_critic_is_not_asked_where_log_probability_is_wished_or_nothing_is_to_choose() -> None:
    scorer = FakeScorer({"b": 0.9})
    ranking = Ranking(critic_of(scorer))
    ranked = await ranking.rank(LOG_PROBABILITY, HI, [candidate("a", -0.1), candidate("b", -3.0)])
    assert best_of(ranked) == 0
    await ranking.rank(UNSPECIFIED, HI, [candidate("a")])
    assert scorer.prompts == []


async def test_a_critic_that_is_wished_scores_a_single_answer_too() -> None:
    (ranked,) = await Ranking(critic_of(FakeScorer({"a": 0.75}))).rank(CRITIC, HI, [candidate("a")])
    assert (ranked.step_scores, ranked.score) == ((0.75,), 0.75)


async def test_a_critic_decides_where_there_is_one() -> None:
    ranked = await Ranking(critic_of(FakeScorer({"b": 0.9}))).rank(
        UNSPECIFIED, HI, [candidate("a", -0.1), candidate("b", -3.0)]
    )
    assert best_of(ranked) == 1


async def test_a_critic_that_there_is_not_cannot_be_wished() -> None:
    Ranking().check(UNSPECIFIED)
    Ranking(critic_of(FakeScorer())).check(CRITIC)
    with pytest.raises(NoCritic):
        Ranking().check(CRITIC)


FAULTS = [LlmUnavailable("Away."), QueueFull("Later."), EmbeddingNotFound("Gone."), PromptTooLong("Too long.")]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_critic_that_fails_unasked_gives_way_to_log_probability(fault: ServiceError) -> None:
    scorer = FakeScorer(errors=[fault] * 20)
    ranked = await Ranking(critic_of(scorer)).rank(UNSPECIFIED, HI, [candidate("a", -0.1), candidate("b", -3.0)])
    assert [each.score for each in ranked] == [-0.1, -3.0]


@pytest.mark.parametrize("fault", FAULTS[:3])
async def test_a_critic_that_fails_is_unavailable_to_who_asked_for_it(fault: ServiceError) -> None:
    scorer = FakeScorer(errors=[fault] * 20)
    with pytest.raises(CriticUnavailable):
        await Ranking(critic_of(scorer)).rank(CRITIC, HI, [candidate("a"), candidate("b")])


async def test_a_dialogue_that_a_critic_cannot_read_is_the_request_s_fault() -> None:
    scorer = FakeScorer(errors=[PromptTooLong("Too long.", field="prompt")])
    with pytest.raises(InvalidRequest) as caught:
        await Ranking(critic_of(scorer)).rank(CRITIC, HI, [candidate("a")])
    assert (caught.value.reason, caught.value.field) == ("PROMPT_TOO_LONG", "messages")


async def test_a_deadline_is_a_deadline() -> None:
    with pytest.raises(DeadlineExceeded):
        await critic_of(FakeScorer(errors=[DeadlineExceeded("Late.")])).score(HI, ["a"])


async def test_a_critic_s_vision_service_that_is_away_is_the_critic_s_fault() -> None:
    vision = FakeVision()
    vision.errors = [VisionUnavailable("Away.")] * 4
    with pytest.raises(CriticUnavailable):
        await critic_of(FakeScorer(), vision).score(await seen(user(inline(CAT))), ["a"])


async def test_an_embedding_that_the_critic_has_lost_is_made_again() -> None:
    vision, scorer = FakeVision([CAT]), FakeScorer(errors=[EmbeddingNotFound("Gone.")])
    assert await critic_of(scorer, vision).score(await seen(user(inline(CAT))), ["a"]) == [(0.5,)]
    assert vision.encodes == [CAT]
