"""Chooses tokens from logits. Order of the steps: repetition penalty, temperature, top-k, top-p, min-p."""

import math
from collections.abc import Sequence as Rows

import torch

from llm_service.engine.sequence import SamplingParams, Sequence

_MASK = (1 << 64) - 1


def sample(logits: torch.Tensor, seqs: Rows[Sequence]) -> list[int | None]:
    """Return a token per row of `logits`, float32 [rows, vocab]; None where the row holds NaN. Changes `logits`.

    What is drawn depends on the sequence's seed and on how much it has said: neither neighbours nor a repeated step
    change it.
    """
    for row, seq in enumerate(seqs):
        penalise(logits[row], seq.output_ids, seq.request.params.repetition_penalty)
    best = logits.max(dim=-1)
    values, tokens = best.values.tolist(), best.indices.tolist()
    return [
        None if math.isnan(value) else token if seq.request.params.is_greedy else _draw(logits[row], seq)
        for row, (value, token, seq) in enumerate(zip(values, tokens, seqs, strict=True))
    ]


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


def top_logprobs(logits: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return the `count` most likely tokens of a row [vocab] with their log-probabilities, best first."""
    if not count:
        return ()
    best = logits.log_softmax(dim=-1).topk(min(count, logits.shape[-1]))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask all but the fewest tokens whose probabilities reach `top_p`; the best one always stays."""
    ascending, order = scores.sort()
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop[-1] = False
    return scores.masked_fill(torch.empty_like(drop).scatter_(0, order, drop), -torch.inf)


def _draw(logits: torch.Tensor, seq: Sequence) -> int:
    if seq.generator is None:
        seq.generator = torch.Generator(logits.device)
    seq.generator.manual_seed(_mixed(seq.seed, len(seq.output_ids)))
    return int(torch.multinomial(probabilities(logits, seq.request.params), 1, generator=seq.generator))


def _mixed(seed: int, index: int) -> int:
    """Return 64 well-mixed bits for the `index`-th draw of a seed (the finaliser of SplitMix64)."""
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
