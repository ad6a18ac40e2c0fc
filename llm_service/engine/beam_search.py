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
    stop_ids = request.params.stop_token_ids
    beams, finished = [Beam((), 0.0)], list[Hypothesis]()
    for length in range(1, _max_length(engine, request) + 1):
        candidates = await _extended(engine, request, beams, _num_candidates(num_beams, stop_ids))
        beams = []
        for rank, beam in enumerate(candidates):
            if beam.token_ids[-1] not in stop_ids:
                beams.append(beam)
            elif rank < num_beams:
                finished = _ranked([*finished, Hypothesis(beam.token_ids, beam.score / length)])[:num_beams]
            if len(beams) == num_beams:
                break
        if len(finished) == num_beams and finished[-1].score >= candidates[0].score / length:
            return finished[0].token_ids
    left_over = [Hypothesis(beam.token_ids, beam.score / len(beam.token_ids)) for beam in beams]
    return _ranked([*finished, *left_over])[0].token_ids


def _max_length(engine: Engine, request: EngineRequest) -> int:
    """Return how long an answer may become; at least 1, so that a prompt without room is refused by the engine."""
    return max(1, min(request.params.max_output_tokens, engine.max_tokens - len(request.prompt.ids)))


def _num_candidates(num_beams: int, stop_ids: frozenset[int]) -> int:
    """Return how many continuations count: so many that all beams go on even if every stop token is among them."""
    return max(2, 1 + len(stop_ids)) * num_beams


async def _extended(engine: Engine, request: EngineRequest, beams: list[Beam], count: int) -> list[Beam]:
    """Return the `count` likeliest continuations of all beams, best first."""
    tasks = [asyncio.create_task(_continuations(engine, request, beam, count)) for beam in beams]
    try:
        extended = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return sorted((beam for group in extended for beam in group), key=lambda beam: beam.score, reverse=True)[:count]


async def _continuations(engine: Engine, request: EngineRequest, beam: Beam, count: int) -> list[Beam]:
    params = replace(request.params, max_output_tokens=1, top_logprobs=count, stop_token_ids=frozenset())
    async with aclosing(engine.generate(replace(request, params=params, generated=beam.token_ids))) as outputs:
        (output,) = await anext(outputs)
    return [Beam((*beam.token_ids, token), beam.score + logprob) for token, logprob in output.top_logprobs]


def _ranked(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda hypothesis: hypothesis.score, reverse=True)
