"""The model in training form computes what the services compute."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.nano.accuracy import answer_ids, hidden_states, right_answers
from examples.nano.batches import KINDS, NO_TARGET, TRUNK, Batch, BatchMaker
from examples.nano.model import Nano, attention_mask, tensors_of
from examples.nano.world import Kind, Situation, held_out, situation
from llm_service.app import LoadedModel
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import EngineRequest, SamplingParams, Sequence
from llm_service.settings import LlmSettings
from shared.checkpoint import Checkpoint, read_config
from shared.digest import digest_of
from tests.engine_outputs import each
from vision_service.model.loader import load_tower
from vision_service.model.tower import TowerConfig, VisionTower

TOLERANCE = 1e-4
SITUATIONS = list(held_out(55, 6))


@pytest.fixture(scope="module")
def served(directory: Path) -> LoadedModel:
    return LoadedModel(LlmSettings(model=directory, kv_cache_bytes=4 << 20))


@pytest.fixture(scope="module")
def tower(directory: Path) -> VisionTower:
    config = TowerConfig.of(read_config(directory))
    return load_tower(Checkpoint(directory), config, torch.device("cpu"), torch.float32).tower


def request_of(maker: BatchMaker, tower: VisionTower, found: Situation, stop_ids: frozenset[int]) -> EngineRequest:
    """The engine's request for the situation's question, its embeddings made by the vision service's tower."""
    tiles = [maker.view(medium).tiles.copy() for medium in found.media]
    prompt = maker.writer.prompt(found.dialogues[0], [len(of_one) for of_one in tiles], found.system_message)
    with torch.inference_mode():
        rows = [tower(torch.from_numpy(of_one)).flatten(0, 1) for of_one in tiles]
    embeddings = tuple(rows[int(place.ref.digest)] for place in prompt.placeholders)
    shown = [digest_of(of_one.tobytes()) for of_one in tiles]
    placeholders = tuple(
        replace(place, ref=replace(place.ref, digest=shown[int(place.ref.digest)])) for place in prompt.placeholders
    )
    prompt = replace(prompt, placeholders=placeholders)
    return EngineRequest(prompt, embeddings, SamplingParams(48, stop_token_ids=stop_ids))


def served_logits(served: LoadedModel, request: EngineRequest) -> torch.Tensor:
    seq = Sequence(request, lambda output: None, 0.0)
    runner, blocks = served.runner()
    assert blocks.grow(seq, len(request.prompt.ids))
    return runner.prompt_logits([ScheduledTokens(seq, len(request.prompt.ids))])


def test_visual_tokens_are_those_of_the_vision_service(model: Nano, maker: BatchMaker, tower: VisionTower) -> None:
    batch = maker.batch(0)
    tiles = torch.from_numpy(batch.tiles)
    with torch.inference_mode():
        assert torch.allclose(model.visual_tokens(tiles), tower(tiles).flatten(0, 1), atol=TOLERANCE)


def test_every_dialogue_of_a_tree_has_the_logits_that_the_engine_gives_it_alone(
    model: Nano, maker: BatchMaker, tower: VisionTower, served: LoadedModel
) -> None:
    for found in (situation(17, index) for index in range(4)):
        batch = maker.with_rows_of(4096).batch_of([found])
        assert batch.branches.max() == len(found.dialogues)
        with torch.inference_mode():
            logits = model.logits(hidden_states(model, tensors_of(batch, torch.device("cpu")))[0])
        for branch, dialogue in enumerate(found.dialogues, start=1):
            alone = replace(found, dialogues=(dialogue,))
            expected = served_logits(served, request_of(maker, tower, alone, frozenset()))
            own = torch.from_numpy((batch.branches[0] == TRUNK) | (batch.branches[0] == branch))
            assert torch.allclose(logits[own][: len(expected)], expected, atol=TOLERANCE)


async def test_greedy_answers_are_the_engine_s(
    model: Nano, maker: BatchMaker, tower: VisionTower, served: LoadedModel
) -> None:
    stop_ids = served.facts().stop_token_ids
    requests = [request_of(maker, tower, found, stop_ids) for found in SITUATIONS]
    engine = served.engine()
    engine.start()

    async def generate(request: EngineRequest) -> list[int]:
        async with aclosing(each(engine.generate(request))) as outputs:
            return [output.token_id async for output in outputs]

    try:
        generated = await asyncio.gather(*map(generate, requests))
    finally:
        engine.stop()
    assert generated == [answer_ids(model, maker, found) for found in SITUATIONS]


def test_a_token_sees_the_trunk_and_its_own_branch_only() -> None:
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0] == 0
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_targets_are_the_answers_and_nothing_else(maker: BatchMaker) -> None:
    batch = maker.batch(1)
    for row in range(len(batch.ids)):
        for answer in set(batch.answers[row].tolist()) - {-1}:
            own = batch.answers[row] == answer
            ids = batch.targets[row][own].tolist()
            assert ids[-1] == maker.writer.stop_id
            assert batch.weights[row][own].sum() == pytest.approx(len(ids) ** 0.5)
    assert ((batch.targets == NO_TARGET) == (batch.answers == -1)).all()
    assert batch.answers.max() + 1 == len(batch.kinds)


def test_rows_are_filled_but_not_over(maker: BatchMaker) -> None:
    for step in range(3):
        batch = maker.batch(step)
        assert batch.ids.shape[1] <= maker.recipe.max_tokens
        assert (batch.branches >= 0).mean() > 0.7


def test_what_is_measured_is_what_greedy_decoding_says(model: Nano, maker: BatchMaker) -> None:
    # An untrained model seldom ends; its answer is cut, taken as the right one, and the stop token as never generated.
    found = next(one for one in SITUATIONS if one.dialogues[0][-1].kind is not Kind.GROUNDING)
    generated = answer_ids(model, maker, found)
    batch = maker.with_rows_of(4096).batch_of([found])
    for targets, right in ((generated[:3], True), ([*generated[:2], generated[2] + 1], False)):
        again = with_targets(batch, [*targets])
        assert right_answers(model, again)[1][-1] is right


def with_targets(batch: Batch, targets: list[int]) -> Batch:
    """The batch with another answer to its last question, of which only these tokens count."""
    first = int(np.flatnonzero(batch.answers[0] == batch.answers.max())[0])
    ids, wanted = batch.ids.copy(), np.full_like(batch.targets, NO_TARGET)
    wanted[0, first : first + len(targets)] = targets
    ids[0, first + 1 : first + len(targets)] = targets[:-1]
    answers = np.where(wanted == NO_TARGET, -1, batch.answers.max())
    return replace(batch, ids=ids, targets=wanted, answers=answers)


def test_a_text_without_pictures_is_a_batch_too(model: Nano, maker: BatchMaker) -> None:
    found = next(one for one in (situation(3, index) for index in range(500)) if not one.media)
    batch = maker.batch_of([found])
    with torch.inference_mode():
        hidden = hidden_states(model, tensors_of(batch, torch.device("cpu")))
    assert torch.isfinite(hidden).all()
    assert {KINDS[kind] for kind in batch.kinds} <= {Kind.TALK, Kind.REFUSAL}
