"""Beam search over an engine: each beam is a request of one token, and the beams grow together.

Follows the reference library's beam search: length penalty 1 on generated tokens, no early stopping before the best
possible score of what is running falls to the worst finished one.
"""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, replace

from llm_service.engine.engine import Engine
from llm_service.engine.sequence import EngineRequest


@dataclass(frozen=True, slots=True)
class Beam:
    """Generated tokens and the sum of their log-probabilities."""

    token_ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam and its score per token."""

    token_ids: tuple[int, ...]
    score: float


async def beam_search(engine: Engine, request: EngineRequest, num_beams: int) -> tuple[int, ...]:
    """Return the best answer's tokens, its stop token included where it has one."""
    params = request.params
    beams, finished = [Beam((), 0.0)], list[Hypothesis]()
    for length in range(1, params.max_output_tokens + 1):
        candidates = await _extended(engine, request, beams, num_beams)
        beams = []
        for rank, beam in enumerate(candidates[: 2 * num_beams]):
            if beam.token_ids[-1] not in params.stop_token_ids:
                beams.append(beam)
            elif rank < num_beams:
                finished = _ranked([*finished, Hypothesis(beam.token_ids, beam.score / length)])[:num_beams]
            if len(beams) == num_beams:
                break
        if len(finished) == num_beams and finished[-1].score >= candidates[0].score / length:
            return finished[0].token_ids
    left_over = [Hypothesis(beam.token_ids, beam.score / len(beam.token_ids)) for beam in beams]
    return _ranked([*finished, *left_over])[0].token_ids


async def _extended(engine: Engine, request: EngineRequest, beams: list[Beam], num_beams: int) -> list[Beam]:
    """Return every beam's likeliest continuations, best first."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_continuations(engine, request, beam, 2 * num_beams)) for beam in beams]
    return sorted((beam for task in tasks for beam in task.result()), key=lambda beam: beam.score, reverse=True)


async def _continuations(engine: Engine, request: EngineRequest, beam: Beam, count: int) -> list[Beam]:
    params = replace(request.params, max_output_tokens=1, top_logprobs=count, stop_token_ids=frozenset())
    async with aclosing(engine.generate(replace(request, params=params, generated=beam.token_ids))) as outputs:
        output = await anext(outputs)
    return [Beam((*beam.token_ids, token), beam.score + logprob) for token, logprob in output.top_logprobs]


def _ranked(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda hypothesis: hypothesis.score, reverse=True)
