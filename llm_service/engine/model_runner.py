"""Runs the model on a scheduled batch: builds the flat tensors, splices embeddings in, samples."""

from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch

from llm_service.engine.sampler import sample, top_logprobs
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import Sequence
from llm_service.model.attention import BatchLayout, KVCache, Span
from llm_service.model.decoder import Decoder
from llm_service.model.rope import Rope


class SampledToken(NamedTuple):
    """A row's token, None where the logits were not numbers, and the row's best log-probabilities if asked for."""

    token_id: int | None
    top_logprobs: tuple[tuple[int, float], ...]


class ModelRunner:
    """Owns model and KV cache. Model thread only."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._rope = Rope(decoder.config.rope, decoder.config.head_dim, decoder.device)

    @torch.inference_mode()
    def step(self, batch: Rows[ScheduledTokens]) -> list[SampledToken]:
        """Compute the batch; return one sampled token per entry that `completes`, in order."""
        hidden = self._forward(batch)
        ends = torch.tensor([tokens.count for tokens in batch]).cumsum(0) - 1
        rows = [index for index, tokens in enumerate(batch) if tokens.completes]
        if not rows:
            return []
        logits = self._decoder.logits(hidden[ends[rows].to(hidden.device)])
        seqs = [batch[row].seq for row in rows]
        logprobs = [top_logprobs(logits[row], seq.request.params.top_logprobs) for row, seq in enumerate(seqs)]
        return [SampledToken(*pair) for pair in zip(sample(logits, seqs), logprobs, strict=True)]

    @torch.inference_mode()
    def prompt_logits(self, batch: Rows[ScheduledTokens]) -> torch.Tensor:
        """Compute the batch; return float32 logits [tokens, vocab] of every position. For scoring and tests."""
        return self._decoder.logits(self._forward(batch))

    def _forward(self, batch: Rows[ScheduledTokens]) -> torch.Tensor:
        device = self._decoder.device
        positions = _concatenated([range(t.seq.num_computed, t.seq.num_computed + t.count) for t in batch])
        # As the reference rotates: a prompt with its whole length, a later token with the length when it came. So
        # neither chunks nor a recomputation change anything.
        prompts = _concatenated([[len(t.seq.request.prompt.ids)] * t.count for t in batch])
        lengths = torch.maximum(prompts, positions + 1)
        hidden: torch.Tensor = self._decoder(
            self._input_embeddings(batch),
            positions.to(device),
            lengths.to(device),
            self._layout(batch, positions),
            self._cache,
            self._rope,
        )
        return hidden

    def _input_embeddings(self, batch: Rows[ScheduledTokens]) -> torch.Tensor:
        ids = _concatenated([t.seq.token_ids[t.seq.num_computed : t.seq.num_computed + t.count] for t in batch])
        hidden: torch.Tensor = self._decoder.embed(ids.to(self._decoder.device))
        row = 0
        for tokens in batch:
            splice_embeddings(hidden[row : row + tokens.count], tokens.seq, tokens.seq.num_computed)
            row += tokens.count
        return hidden

    def _layout(self, batch: Rows[ScheduledTokens], positions: torch.Tensor) -> BatchLayout:
        size, device = self._cache.block_size, self._decoder.device
        spans, slots, row = [], [], 0
        for tokens in batch:
            length = tokens.seq.num_computed + tokens.count
            blocks = torch.tensor(tokens.seq.block_table[: -(-length // size)])
            own = positions[row : row + tokens.count]
            slots.append(blocks[own // size] * size + own % size)
            spans.append(Span(row, row + tokens.count, length, blocks.to(device)))
            row += tokens.count
        return BatchLayout(tuple(spans), torch.cat(slots).to(device))


def splice_embeddings(hidden: torch.Tensor, seq: Sequence, start: int) -> None:
    """Overwrite rows of `hidden` [tokens, hidden], which begin at position `start`, with the visual tokens there."""
    end = start + hidden.shape[0]
    for placeholder, embedding in zip(seq.request.prompt.placeholders, seq.request.embeddings, strict=True):
        first = max(start, placeholder.start)
        last = min(end, placeholder.start + placeholder.length)
        if first < last:
            rows = embedding[first - placeholder.start : last - placeholder.start]
            hidden[first - start : last - start] = rows.to(hidden.device, hidden.dtype)


def _concatenated(parts: Rows[Rows[int]]) -> torch.Tensor:
    return torch.tensor([value for part in parts for value in part], dtype=torch.int64)
