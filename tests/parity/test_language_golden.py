"""The language side says what the reference says: prompts, ids, logits, generated ids and text, in float32."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from llm_service.admission import Admission
from llm_service.answerer import Answerer, Delta, Finished, GenerationOptions
from llm_service.app import LoadedModel
from llm_service.embeddings import EmbeddingReader
from llm_service.engine.engine import PagedEngine
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import EngineRequest, FinishReason, SamplingParams, Sequence
from llm_service.prompt.dialogue import Dialogue, EmbeddingRef, Role, Segment, TextSegment, Turn, VisualSegment
from llm_service.prompt.splice import splice
from llm_service.settings import LlmSettings
from shared.checkpoint import Checkpoint, read_config
from shared.digest import digest_of_fields
from shared.embedding import Embedding, EmbeddingInfo
from shared.store import LocalEmbeddingCache, NoEmbeddingStore
from shared.tensors import bytes_of, tensor_of
from tests.golden_cases import CHECKPOINTS, GOLDEN, UNSAFE_CASES, GoldenImage, GoldenTurn, pieces_of, turns
from tests.prompt_text import prompt_text
from vision_service.model.loader import load_tower
from vision_service.model.tower import TowerConfig
from vision_service.preprocess.image import preprocess
from vision_service.preprocess.tiling import TilingSpec

CASES = [turn for checkpoint in CHECKPOINTS for turn in turns(checkpoint)]
SAFE_CASES = [case for case in CASES if case.name not in UNSAFE_CASES]
LOGIT_TOLERANCE = 2e-4


def named(case: GoldenTurn) -> str:
    return f"{case.checkpoint}-{case.name}"


class GoldenVision:
    """Stands in for the vision replicas: encodes the golden pictures with the real tower, on demand."""

    def __init__(self, checkpoint: str) -> None:
        directory = GOLDEN / "checkpoints" / checkpoint
        self._config = read_config(directory)
        loaded = load_tower(Checkpoint(directory), TowerConfig.of(self._config), torch.device("cpu"), torch.float32)
        self._tower = loaded.tower
        self._images: dict[str, GoldenImage] = {}

    def ref(self, image: GoldenImage) -> EmbeddingRef:
        digest = digest_of_fields(image.name, image.content, image.max_tiles)
        self._images[digest] = image
        tokens = image.num_tiles * self._config.tokens_per_tile
        return EmbeddingRef(digest, image.num_tiles, tokens, self._config.hidden_size, "float32", "")

    async def fetch(self, ref: EmbeddingRef) -> Embedding:
        image = self._images[ref.digest]
        spec = TilingSpec.of(self._config).adjusted(image.max_tiles, None)
        picture = preprocess(image.content, spec, 10**8)
        with torch.inference_mode():
            rows = self._tower(torch.tensor(picture.tiles)).flatten(0, 1)
        info = EmbeddingInfo(len(picture.tiles), len(rows), ref.hidden_size, "float32", 1, 1, 1, 1)
        return Embedding(ref.digest, info, bytes_of(rows))

    def dialogue(self, case: GoldenTurn) -> Dialogue:
        groups = list(case.groups)
        turns_of_case = []
        for role, text in case.tagged_texts:
            parts = pieces_of(text, groups) if role == "user" else [text]
            segments: list[Segment] = [
                TextSegment(part) if isinstance(part, str) else VisualSegment(tuple(map(self.ref, part)))
                for part in parts
            ]
            turns_of_case.append(Turn(Role(role), tuple(segments)))
        return Dialogue(tuple(turns_of_case), case.system_message)


@dataclass(frozen=True)
class Side:
    """Both sides of one golden checkpoint, ready to be asked."""

    model: LoadedModel
    vision: GoldenVision


@cache
def side(checkpoint: str) -> Side:
    settings = LlmSettings(model=GOLDEN / "checkpoints" / checkpoint, kv_cache_bytes=32 << 20)
    return Side(LoadedModel(settings), GoldenVision(checkpoint))


@pytest.fixture(scope="module", autouse=True)
def drop_models() -> Iterator[None]:
    yield
    side.cache_clear()


@pytest.fixture
async def engines() -> AsyncIterator[dict[str, PagedEngine]]:
    """Engines started in this test's loop, by checkpoint."""
    started = {checkpoint: side(checkpoint).model.engine() for checkpoint in CHECKPOINTS}
    for engine in started.values():
        engine.start()
    yield started
    for engine in started.values():
        engine.stop()
        assert engine.stats().num_free_blocks == engine.stats().num_blocks


def answerer(checkpoint: str, engine: PagedEngine) -> Answerer:
    chosen = side(checkpoint)
    reader = EmbeddingReader(LocalEmbeddingCache(64 << 20), NoEmbeddingStore(), chosen.vision)
    model = chosen.model
    return Answerer(model.facts(), model.template, model.tokenizer, reader, engine, Admission(100, 64 << 20))


def options(case: GoldenTurn) -> GenerationOptions:
    facts = side(case.checkpoint).model.facts()
    params = SamplingParams(
        max_output_tokens=case.config["max_new_tokens"],
        repetition_penalty=case.config.get("repetition_penalty", 1.0),
        stop_token_ids=facts.stop_token_ids,
    )
    return GenerationOptions(params, num_beams=case.config.get("num_beams", 1))


async def answer(case: GoldenTurn, engine: PagedEngine) -> tuple[list[int], str, Finished]:
    ids: list[int] = []
    text = ""
    dialogue = side(case.checkpoint).vision.dialogue(case)
    async with aclosing(answerer(case.checkpoint, engine).answer(dialogue, options(case))) as events:
        async for event in events:
            if isinstance(event, Delta):
                ids += event.token_ids
                text += event.text
    assert isinstance(event, Finished)
    return ids, text, event


@pytest.mark.parametrize("case", SAFE_CASES, ids=named)
def test_prompt_and_ids_are_the_references(case: GoldenTurn) -> None:
    model = side(case.checkpoint).model
    pieces = model.template.render(side(case.checkpoint).vision.dialogue(case))
    assert prompt_text(pieces) == case.prompt
    assert list(splice(pieces, model.tokenizer).ids) == case.input_ids


@pytest.mark.parametrize("case", [case for case in SAFE_CASES if case.first_logits is not None], ids=named)
async def test_first_logits_are_within_tolerance(case: GoldenTurn) -> None:
    chosen = side(case.checkpoint)
    prompt = splice(chosen.model.template.render(chosen.vision.dialogue(case)), chosen.model.tokenizer)
    tensors = [tensor_of(await chosen.vision.fetch(placeholder.ref)) for placeholder in prompt.placeholders]
    seq = Sequence(EngineRequest(prompt, tuple(tensors), SamplingParams(1)), lambda output: None, 0.0)
    runner, blocks = chosen.model.runner()
    assert blocks.grow(seq, len(prompt.ids))
    logits = runner.prompt_logits([ScheduledTokens(seq, len(prompt.ids))])[-1]
    difference = (logits - torch.from_numpy(case.first_logits)).abs().max().item()
    assert difference < LOGIT_TOLERANCE


@pytest.mark.parametrize("case", SAFE_CASES, ids=named)
async def test_generated_ids_and_text_are_the_references(case: GoldenTurn, engines: dict[str, PagedEngine]) -> None:
    ids, text, finished = await answer(case, engines[case.checkpoint])
    assert ids == case.output_ids
    assert text == case.response
    stopped = case.output_ids[-1] in side(case.checkpoint).model.facts().stop_token_ids
    assert finished.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
async def test_all_cases_at_once_say_what_they_say_alone(checkpoint: str, engines: dict[str, PagedEngine]) -> None:
    cases = [case for case in SAFE_CASES if case.checkpoint == checkpoint]
    answers = await asyncio.gather(*(answer(case, engines[checkpoint]) for case in cases))
    assert {case.name: ids for case, (ids, _, _) in zip(cases, answers, strict=True)} == {
        case.name: case.output_ids for case in cases
    }


@pytest.mark.parametrize("case", [case for case in CASES if case.name in UNSAFE_CASES], ids=named)
def test_typed_control_tokens_stay_text_where_the_reference_obeys_them(case: GoldenTurn) -> None:
    model = side(case.checkpoint).model
    prompt = splice(model.template.render(side(case.checkpoint).vision.dialogue(case)), model.tokenizer)
    assert list(prompt.ids) != case.input_ids
    plain = Dialogue((Turn(Role.USER, (TextSegment("Hi"),)),))
    control = [token for token in splice(model.template.render(plain), model.tokenizer).ids if is_control(model, token)]
    assert [token for token in prompt.ids if is_control(model, token)] == control


def is_control(model: LoadedModel, token: int) -> bool:
    return token in model.tokenizer.control_ids
