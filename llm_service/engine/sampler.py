"""Chooses tokens from logits.

Order of the steps: constraint, repetition penalty, temperature, top-k, top-p, min-p.
"""

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from llm_service.engine.sequence import Probe, SamplingParams, Sequence, mixed
from shared.native.library import kernels

_NATIVE: Final = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """A row's chosen token's log-probability and the likeliest tokens with theirs, likeliest first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


def sample(logits: torch.Tensor, seqs: Rows[Sequence]) -> list[int | None]:
    """Return a token per row of `logits` [rows, vocab]; None where the row holds NaN. May change `logits`.

    Whatever their type, they are computed with in float32. What is drawn depends on the sequence's seed and on how much
    it has said: neither neighbours nor a repeated step change it. Raises what a constraint raises.
    """
    if any(seq.constraint is not None or not seq.request.params.takes_likeliest for seq in seqs):
        logits = logits.float()
    for row, seq in enumerate(seqs):
        if seq.constraint is not None:
            logits[row].masked_fill_(~seq.constraint.allowed().to(logits.device), -torch.inf)
        if seq.request.params.repetition_penalty != 1.0:
            penalise(logits[row], seq.output_ids, seq.request.params.repetition_penalty)
    values, tokens = largest(logits)
    return [
        None if math.isnan(value) else token if seq.request.params.is_greedy else _draw(logits[row], seq)
        for row, (value, token, seq) in enumerate(zip(values, tokens, seqs, strict=True))
    ]


def largest(logits: torch.Tensor) -> tuple[list[float], list[int]]:
    """Return each row's largest number, NaN where it holds one, and where that is first, for [rows, vocab]."""
    native = kernels()
    if native is None or logits.device.type != "cpu" or logits.dtype not in _NATIVE or logits.stride(1) != 1:
        best = logits.max(dim=-1)
        return best.values.tolist(), best.indices.tolist()
    rows, size = logits.shape
    values, places = np.empty(rows, np.float32), np.empty(rows, np.int64)
    is_wide = logits.dtype == torch.float32
    native.largest(logits.data_ptr(), is_wide, logits.stride(0), rows, size, values.ctypes.data, places.ctypes.data)
    return values.tolist(), places.tolist()


def penalise(logits: torch.Tensor, generated: list[int], penalty: float) -> None:
    """Divide positive and multiply negative logits [vocab] of generated tokens by `penalty`, in place."""
    if penalty == 1.0 or not generated:
        return
    ids = torch.tensor(sorted(set(generated)), device=logits.device)
    scores = logits[ids]
    logits[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return the distribution [vocab] that a sampled token is drawn from; `logits` are penalised already."""
    scores = logits / params.temperature
    if params.top_k:
        threshold = scores.topk(min(params.top_k, scores.shape[-1])).values[-1]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if params.top_p < 1.0:
        scores = _keep_top_p(scores, params.top_p)
    if params.min_p > 0.0:
        chances = scores.softmax(dim=-1)
        scores = scores.masked_fill(chances < params.min_p * chances.max(), -torch.inf)
    return scores.softmax(dim=-1)


def logprobs_of(scores: torch.Tensor, tokens: Rows[int], counts: Rows[int]) -> list[Logprobs]:
    """Return, per row of log-probabilities [rows, vocab], its token's and those of its `count` likeliest tokens."""
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(min(max(counts), scores.shape[-1]))
    return [
        Logprobs(own, tuple(zip(ids[:count], values[:count], strict=True)))
        for own, ids, values, count in zip(chosen, best.indices.tolist(), best.values.tolist(), counts, strict=True)
    ]


def probe(logits: torch.Tensor, asked: Probe) -> list[tuple[float, ...]]:
    """Return, per row of logits [rows, vocab], the probabilities of the probe's tokens among themselves."""
    return [tuple(row) for row in logits[:, list(asked.token_ids)].softmax(dim=-1).tolist()]


def _keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask all but the fewest tokens whose probabilities reach `top_p`; the best one always stays."""
    ascending, order = scores.sort()
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[-1] = False
    return scores.masked_fill(torch.empty_like(drop).scatter_(0, order, drop), -torch.inf)


def _draw(logits: torch.Tensor, seq: Sequence) -> int:
    if seq.generator is None:
        seq.generator = torch.Generator(logits.device)
    seq.generator.manual_seed(mixed(seq.seed, seq.num_output))
    return int(torch.multinomial(probabilities(logits, seq.request.params), 1, generator=seq.generator))
