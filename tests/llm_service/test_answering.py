"""Answers of a golden checkpoint with all that a request can ask for beside plain text."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_service.answerer import Started
from llm_service.embeddings import FetchTier
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import EngineRequest, FinishReason, SamplingParams, Sequence
from llm_service.prompt.dialogue import Dialogue, Role, TextSegment, Tool, Turn, VisualSegment
from llm_service.prompt.positions import positions
from llm_service.prompt.splice import PlaceholderRange, PromptTokens, splice
from shared import critic
from shared.errors import InvalidJsonSchema, InvalidRequest, NotSupportedByModel, QueueFull
from tests.engine_outputs import each
from tests.golden_cases import GOLDEN, GoldenImage, turns
from tests.golden_models import golden_model
from tests.llm_service.fakes_llm import ref
from tests.llm_service.golden_answering import CHECKPOINT, Asking, asking, loaded, plain

TEXT_CASES = [case for case in turns(CHECKPOINT) if not case.groups and case.name == "text_only"]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer", "maximum": 99}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module", autouse=True)
def drop_models() -> Iterator[None]:
    yield
    loaded.cache_clear()
    golden_model.cache_clear()


async def test_the_first_candidate_of_a_seed_is_the_single_answer_of_that_seed() -> None:
    async with asking() as system:
        single = system.options(temperature=1.5, seed=7)
        alone = await system.ask(plain("Hi"), single)
        several = dataclasses.replace(
            single, num_candidates=4, sampling=dataclasses.replace(single.sampling, top_logprobs=0)
        )
        first, _, again = await asyncio.gather(
            system.ask(plain("Hi"), several),
            system.ask(plain("Something else"), system.options(temperature=1.5, num_candidates=3, top_logprobs=0)),
            system.ask(plain("Hi"), several),
        )
    assert first.ids[0] == alone.ids[0]
    assert first.ids == again.ids, "whatever else runs"
    assert len({tuple(ids) for ids in first.ids}) > 1
    assert first.finished.num_output_tokens == sum(map(len, first.ids))


async def test_what_one_tenant_has_asked_is_not_found_by_another() -> None:
    async with asking() as system:
        shared = plain("one word after another " * 10)
        asked = [dataclasses.replace(shared, tenant=tenant) for tenant in ("acme", "umbrella", "", "acme", "")]
        finished = [(await system.ask(dialogue, system.options(2))).finished for dialogue in asked]
    cached = [each.num_cached for each in finished]
    assert cached[:3] == [0, 0, 0]
    assert cached[3] == cached[4] > 0


async def test_greedy_candidates_are_the_same_answer() -> None:
    (case,) = TEXT_CASES
    async with asking() as system:
        said = await system.ask(
            system.media.dialogue(case), system.options(case.config["max_new_tokens"], num_candidates=3, top_logprobs=0)
        )
    assert said.ids == [case.output_ids] * 3
    assert said.texts == [case.response] * 3


async def test_a_stop_sequence_ends_its_own_candidate_only() -> None:
    async with asking() as system:
        options = system.options(24, temperature=1.5, seed=3, num_candidates=4, top_logprobs=0)
        whole = await system.ask(plain("Hi"), options)
        stop = whole.texts[2][3:5]
        cut = await system.ask(plain("Hi"), dataclasses.replace(options, stop_sequences=(stop,)))
    for index, text in enumerate(whole.texts):
        expected = text[: text.index(stop)] if stop in text else text
        assert cut.texts[index] == expected.strip()
        reason = FinishReason.STOP if stop in text else whole.finished.candidates[index].reason
        assert cut.finished.candidates[index].reason is reason
    assert len(cut.ids[2]) < len(whole.ids[2])


async def test_logprobs_are_the_models_own_before_penalty_temperature_and_truncation() -> None:
    async with asking() as system:
        options = system.options(
            temperature=2.0, seed=5, top_k=9, repetition_penalty=1.4, top_logprobs=3, tells_logprobs=True
        )
        said = await system.ask(plain("Hi"), options)
        dialogue_ids = splice(system.model.template.render(plain("Hi")), system.model.tokenizer).ids
        everything = PromptTokens((*dialogue_ids, *said.ids[0]))
        scores = golden_model(CHECKPOINT).logits(EngineRequest(everything, (), SamplingParams(1))).log_softmax(-1)
    (entries,) = said.logprobs
    assert [entry.token_id for entry in entries] == said.ids[0]
    for step, entry in enumerate(entries):
        row = scores[len(dialogue_ids) - 1 + step]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert [top.token_id for top in entry.top] == row.topk(3).indices.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert entry.token == system.model.tokenizer.bytes_of(entry.token_id)
    (candidate,) = said.finished.candidates
    assert candidate.mean_logprob == pytest.approx(sum(entry.logprob for entry in entries) / len(entries))


async def test_the_reason_is_the_likeliest_candidates() -> None:
    async with asking() as system:
        said = await system.ask(
            plain("Hi"), system.options(30, temperature=2.0, seed=1, num_candidates=8, top_logprobs=0)
        )
    best = max(said.finished.candidates, key=lambda candidate: candidate.mean_logprob)
    assert said.finished.reason is best.reason
    assert len({candidate.mean_logprob for candidate in said.finished.candidates}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0, 100.0])
async def test_a_constrained_answer_meets_its_schema_beside_answers_that_do_not_change(temperature: float) -> None:
    (case,) = TEXT_CASES
    async with asking() as system:
        constrained = system.options(
            500, temperature=temperature, seed=11, json_schema=SCHEMA, num_candidates=3, top_logprobs=0
        )
        said, free = await asyncio.gather(
            system.ask(plain("Who?"), constrained),
            system.ask(system.media.dialogue(case), system.options(case.config["max_new_tokens"])),
        )
    assert free.ids == [case.output_ids]
    for text, candidate in zip(said.texts, said.finished.candidates, strict=True):
        assert candidate.reason is FinishReason.STOP, text
        value = json.loads(text)
        assert set(value) == {"name", "count"}
        assert len(value["name"]) <= 8
        assert isinstance(value["count"], int)
        assert value["count"] <= 99


@pytest.mark.parametrize(
    "checkpoint", ["internvl2-8b-tiny", "internvl2-4b-tiny", "internvl2-40b-tiny", "internvl2-llama3-76b-tiny"]
)
async def test_constrained_answers_of_other_families_meet_their_schema(checkpoint: str) -> None:
    async with asking(checkpoint) as system:
        given = {"temperature": 2.0, "seed": 1, "num_candidates": 8, "top_logprobs": 0}
        said = await system.ask(plain("Who?"), system.options(500, json_schema=SCHEMA, **given))
    for text, candidate in zip(said.texts, said.finished.candidates, strict=True):
        assert candidate.reason is FinishReason.STOP, text
        value = json.loads(text)
        assert set(value) == {"name", "count"}
        assert len(value["name"]) <= 8


async def test_a_constrained_answer_that_is_cut_says_so() -> None:
    async with asking() as system:
        said = await system.ask(plain("Who?"), system.options(3, json_schema=SCHEMA))
    assert said.finished.reason is FinishReason.LENGTH
    assert len(said.ids[0]) == 3


async def test_an_unsound_schema_is_refused_before_anything_is_fetched() -> None:
    async with asking() as system:
        image = GoldenImage("rgb_landscape.png", (GOLDEN / "images/rgb_landscape.png").read_bytes(), 1, 1)
        asked = Dialogue((Turn(Role.USER, (VisualSegment((system.media.ref([image]),)), TextSegment("?"))),))
        with pytest.raises(InvalidJsonSchema):
            await system.ask(asked, system.options(json_schema='{"type": "thing"}'))
        assert system.media.fetched == []


class Unfollowable:
    """A constraint that fails at its third token."""

    def __init__(self, num_tokens: int = 0) -> None:
        self.num_tokens = num_tokens

    def copy(self) -> "Unfollowable":
        return Unfollowable(self.num_tokens)

    def allowed(self) -> torch.Tensor:
        if self.num_tokens == 2:
            raise InvalidJsonSchema("too much")
        return torch.ones(golden_model(CHECKPOINT).decoder.config.vocab_size, dtype=torch.bool)

    def accept(self, token_id: int) -> None:
        self.num_tokens += 1


async def test_a_constraint_that_cannot_be_followed_fails_alone_and_with_its_reason() -> None:
    (case,) = TEXT_CASES

    async with asking() as system:
        free = asyncio.create_task(
            system.ask(system.media.dialogue(case), system.options(case.config["max_new_tokens"]))
        )
        prompt = PromptTokens(tuple(case.input_ids))
        outputs = each(system.engine.generate(EngineRequest(prompt, (), SamplingParams(20), constraint=Unfollowable())))
        for _ in range(2):
            await anext(outputs)
        with pytest.raises(InvalidJsonSchema):
            await anext(outputs)
        assert (await free).ids == [case.output_ids]


@pytest.mark.parametrize("checkpoint", ["internvl3-8b-tiny", "internvl2-8b-tiny"])
async def test_a_critics_scores_are_the_references(checkpoint: str) -> None:
    golden = json.loads((GOLDEN / "expected" / checkpoint / "prm.json").read_text())
    picture = golden["image"]
    image = GoldenImage(
        picture["file"], (GOLDEN / "images" / picture["file"]).read_bytes(), picture["max_num"], picture["n_tiles"]
    )
    async with asking(checkpoint) as system:
        asked = [critic_dialogue(system, golden, entry, image) for entry in golden["candidates"]]
        scores = await asyncio.gather(*(system.answerer.score(dialogue, critic.CHOICES) for dialogue in asked))
        prompts = [await system.answerer.tokenize(dialogue) for dialogue in asked]
    for entry, prompt, turns_of_entry in zip(golden["candidates"], prompts, scores, strict=True):
        assert list(prompt.ids) == entry["input_ids"][: len(prompt.ids)]
        assert [start - 1 for start in prompt.answer_starts] == entry["positions"]
        assert [right for right, _ in turns_of_entry] == pytest.approx(entry["step_scores"], abs=1e-4)
        assert [right + wrong for right, wrong in turns_of_entry] == pytest.approx([1.0] * len(turns_of_entry))
    means = [critic.answer_score([right for right, _ in turns_of_entry]) for turns_of_entry in scores]
    assert means == pytest.approx([entry["mean_score"] for entry in golden["candidates"]], abs=1e-4)
    assert sorted(range(len(means)), key=lambda index: -means[index]) == golden["ranking_by_mean"]


def critic_dialogue(system: Asking, golden: dict[str, Any], entry: dict[str, Any], image: GoldenImage) -> Dialogue:
    """Return the dialogue in which a critic judges a candidate's steps."""
    seen = VisualSegment((system.media.ref([image]),))
    asked: list[str | VisualSegment] = [seen, f"\n{golden['question']}"]
    said = [
        Turn(
            Role.ASSISTANT if turn.is_critic else Role.USER,
            tuple(TextSegment(part) if isinstance(part, str) else part for part in turn.parts),
        )
        for turn in critic.critic_turns(asked, entry["steps"])
    ]
    return Dialogue(tuple(said), critic.SYSTEM_MESSAGE)


@pytest.mark.parametrize(
    ("judged", "choices"),
    [("+", ("+", "not one token")), ("+", ("+", "+")), ("two words", ("+", "-")), ("", ("+", "-"))],
)
async def test_a_word_of_several_tokens_cannot_be_scored(judged: str, choices: tuple[str, ...]) -> None:
    said = (
        Turn(Role.USER, (TextSegment("a"),)),
        Turn(Role.ASSISTANT, (TextSegment(judged),)),
        Turn(Role.USER, (TextSegment("b"),)),
    )
    async with asking() as system:
        with pytest.raises(InvalidRequest):
            await system.answerer.score(Dialogue(said), choices)


VIDEO_CASES = [case for case in turns(CHECKPOINT) if case.name.startswith("video")]


@pytest.mark.parametrize("case", VIDEO_CASES, ids=[case.name for case in VIDEO_CASES])
async def test_the_frames_of_one_embedding_say_what_pictures_of_their_own_say(case: Any) -> None:
    async with asking() as system:
        dialogue = system.media.dialogue(case, as_video=True)
        said = await system.ask(dialogue, system.options(case.config["max_new_tokens"]))
        assert (await system.answerer.tokenize(dialogue)).ids == tuple(case.input_ids)
        assert len(system.media.fetched) == 1, "all frames of one fetch"
    assert said.ids == [case.output_ids]
    assert len(said.finished.transfers) == 1


PICTURE_CASES = [case for case in turns(CHECKPOINT) if case.groups and "num_beams" not in case.config]


@pytest.mark.parametrize("case", PICTURE_CASES, ids=[case.name for case in PICTURE_CASES])
async def test_what_is_kept_of_a_prompt_changes_nothing_in_the_answer(case: Any) -> None:
    async with asking() as system:
        penalty = case.config.get("repetition_penalty", 1.0)
        options = system.options(case.config["max_new_tokens"], repetition_penalty=penalty)
        dialogue = system.media.dialogue(case)
        first = await system.ask(dialogue, options)
        again = await system.ask(dialogue, options)
    assert first.ids == again.ids == [case.output_ids]
    assert (first.finished.num_cached, again.finished.num_cached) == (0, (len(case.input_ids) - 1) // 16 * 16)


async def test_the_next_turn_on_a_picture_fetches_nothing() -> None:
    image = GoldenImage("rgb_landscape.png", (GOLDEN / "images/rgb_landscape.png").read_bytes(), 1, 1)
    async with asking() as system:
        question = Turn(Role.USER, (VisualSegment((system.media.ref([image]),)), TextSegment("What is this?")))
        said = await system.ask(Dialogue((question,)), system.options(8))
        assert [transfer.tier for transfer in said.finished.transfers] == [FetchTier.VISION]
        answer = Turn(Role.ASSISTANT, (TextSegment(said.texts[0]),))
        second = Dialogue((question, answer, Turn(Role.USER, (TextSegment("And now?"),))))
        system.media.fetched.clear()
        said = await system.ask(second, system.options(8))
    assert system.media.fetched == []
    assert [transfer.tier for transfer in said.finished.transfers] == [FetchTier.PREFIX]
    assert said.finished.num_cached > image.num_tiles


def test_there_are_video_cases() -> None:
    assert VIDEO_CASES


def logits_of(request: EngineRequest, chunks: list[int], **config: Any) -> torch.Tensor:
    model = loaded(CHECKPOINT)
    rope = model.decoder.config.rope
    runner, blocks = model.runner()
    runner._rope._config = dataclasses.replace(rope, **config)
    seq = Sequence(request, lambda output: None, 0.0)
    assert blocks.grow(seq, sum(chunks))
    parts = []
    for count in chunks:
        parts.append(runner.prompt_logits([ScheduledTokens(seq, count)]))
        seq.num_computed += count
    return torch.cat(parts)


def with_picture(stride: int, generated: tuple[int, ...] = (), *, explicit: bool = True) -> EngineRequest:
    visual = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    place = PlaceholderRange(5, 12, ref(tiles=3))
    prompt = PromptTokens(tuple(range(100, 130)), (place,))
    own = torch.from_numpy(positions(prompt, stride)) if explicit else None
    return EngineRequest(prompt, (visual,), SamplingParams(4), generated, positions=own)


def test_the_ordinary_stride_changes_no_bit_and_a_smaller_one_changes_the_answer() -> None:
    ordinary = logits_of(with_picture(256, explicit=False), [30])
    assert torch.equal(logits_of(with_picture(256), [30]), ordinary)
    assert not torch.allclose(logits_of(with_picture(16), [30])[-1], ordinary[-1], atol=1e-3)


@pytest.mark.parametrize("chunks", [[10, 10, 14], [30, 1, 1, 1, 1], [6, 28]])
def test_chunks_and_recomputation_change_nothing_about_variable_positions(chunks: list[int]) -> None:
    request = with_picture(64, generated=(7, 8, 9, 10))
    torch.testing.assert_close(logits_of(request, chunks), logits_of(request, [34]), atol=1e-4, rtol=1e-4)


def test_generated_tokens_stand_one_by_one_behind_the_prompts_last() -> None:
    request = with_picture(64, generated=(7, 8, 9))
    assert request.positions is not None
    last = request.positions[-1]
    longer = PromptTokens((*request.prompt.ids, 7, 8, 9), request.prompt.placeholders)
    spelled = torch.cat((request.positions, last + torch.arange(1, 4)))
    expected = logits_of(EngineRequest(longer, request.embeddings, SamplingParams(4), positions=spelled), [33])
    assert torch.equal(logits_of(request, [33]), expected)


def test_variable_positions_are_never_stretched() -> None:
    stretched = {"kind": "dynamic", "factor": 4.0, "max_positions": 8}
    plain_rope = {"kind": "default"}
    assert torch.equal(logits_of(with_picture(64), [30], **stretched), logits_of(with_picture(64), [30], **plain_rope))
    ordinary = with_picture(256, explicit=False)
    assert not torch.equal(logits_of(ordinary, [30], **stretched), logits_of(ordinary, [30], **plain_rope))


async def test_a_stride_reaches_the_engine() -> None:
    image = GoldenImage("rgb_landscape.png", (GOLDEN / "images/rgb_landscape.png").read_bytes(), 1, 1)
    async with asking() as system:
        asked = Dialogue((Turn(Role.USER, (VisualSegment((system.media.ref([image]),)), TextSegment("?"))),))
        ordinary, explicit, near = [
            await system.ask(asked, system.options(**given, top_logprobs=1, tells_logprobs=True))
            for given in ({}, {"visual_stride": 256}, {"visual_stride": 1})
        ]
    assert explicit.ids == ordinary.ids
    assert explicit.logprobs[0][0].logprob == pytest.approx(ordinary.logprobs[0][0].logprob, abs=1e-4)
    assert near.logprobs[0][0].logprob != pytest.approx(ordinary.logprobs[0][0].logprob, abs=1e-3)


async def test_candidates_count_as_answers() -> None:
    async with asking() as system:
        waiting = system.answerer.answer(plain("Hi"), system.options(num_candidates=16, top_logprobs=0))
        opened = [system.answerer.answer(plain("Hi"), system.options(num_candidates=16)) for _ in range(6)]
        for events in opened:
            assert isinstance(await anext(events), Started)
        with pytest.raises(QueueFull):
            await anext(waiting)
        for events in opened:
            await events.aclose()


async def test_special_tokens_stay_where_they_are_asked_for() -> None:
    (case,) = [case for case in turns(CHECKPOINT) if case.name == "text_only_zh"]
    async with asking() as system:
        stop = system.model.tokenizer.bytes_of(case.output_ids[-1]).decode()
        included = system.options(case.config["max_new_tokens"], include_special_tokens=True)
        said = await system.ask(system.media.dialogue(case), included)
    assert said.ids == [case.output_ids]
    assert said.texts == [case.response + stop]
    assert said.finished.reason is FinishReason.STOP


async def test_tools_of_a_model_that_knows_none_are_refused() -> None:
    async with asking("internvl2-1b-tiny") as system:
        with pytest.raises(NotSupportedByModel):
            await system.ask(plain("Hi", tools=(Tool("look"),)), system.options())


async def test_grounding_makes_the_markers_tokens_in_what_the_user_says() -> None:
    async with asking() as system:
        grounded = await system.answerer.tokenize(plain("Where is <ref>it</ref>?", grounding=True))
        typed = await system.answerer.tokenize(plain("Where is <ref>it</ref>?"))
    markers = system.model.tokenizer.marker_ids
    assert len([token for token in grounded.ids if token in markers]) == 2
    assert not markers.intersection(typed.ids)
