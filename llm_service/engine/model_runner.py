"""Runs the model on a scheduled batch: builds the flat tensors, splices embeddings in, samples."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from llm_service.engine.sampler import Logprobs, logprobs_of, probe, sample
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import Sequence
from llm_service.model.attention import BatchLayout, KVCache, Span
from llm_service.model.decoder import Decoder
from llm_service.model.rope import Rope


class SampledToken(NamedTuple):
    """A sequence's token, None where the logits were not numbers, and its log-probabilities where asked for."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class ModelRunner:
    """Owns model and KV cache. Model thread only."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._rope = Rope(decoder.config.rope, decoder.config.head_dim, decoder.device)

    @torch.inference_mode()
    def step(self, batch: Rows[ScheduledTokens]) -> list[SampledToken]:
        """Compute the batch; return a token per sequence in the entries' `sampled`, in order. Fills in `probed`."""
        hidden = self._forward(batch)
        self._probe(batch, hidden)
        ends = accumulate(tokens.count for tokens in batch)
        # A row per sequence, even where several read the same prompt: sampling writes into them.
        sampled = [(end - 1, seq) for end, tokens in zip(ends, batch, strict=True) for seq in tokens.sampled]
        if not sampled:
            return []
        rows, seqs = zip(*sampled, strict=True)
        if rows != tuple(range(len(hidden))):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        return _sampled(self._decoder.logits(hidden), seqs)

    @torch.inference_mode()
    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in every layer."""
        self._cache.copy_block(source, target)

    @torch.inference_mode()
    def prompt_logits(self, batch: Rows[ScheduledTokens]) -> torch.Tensor:
        """Compute the batch; return float32 logits [tokens, vocab] of every position. For tests."""
        return self._decoder.logits(self._forward(batch)).float()

    def _probe(self, batch: Rows[ScheduledTokens], hidden: torch.Tensor) -> None:
        """Note what probes find in the tokens of this batch."""
        row = 0
        for tokens in batch:
            if asked := tokens.seq.request.probe:
                first = tokens.seq.num_computed
                here = [position for position in asked.positions if first <= position < first + tokens.count]
                if here:
                    logits = self._decoder.logits(hidden[[row + position - first for position in here]])
                    tokens.seq.probed |= zip(here, probe(logits.float(), asked), strict=True)
            row += tokens.count

    def _forward(self, batch: Rows[ScheduledTokens]) -> torch.Tensor:
        device = self._decoder.device
        torch.get_num_threads()  # tells OpenMP in this thread, too, how many there may be: native kernels do not ask
        flat = _FlatBatch.of(batch, self._cache.block_size)
        rotary, lengths = flat.positions, flat.lengths
        if any(t.seq.request.positions is not None for t in batch):
            rotary, lengths = _variable_positions(batch, rotary, lengths)
        hidden: torch.Tensor = self._decoder(
            self._input_embeddings(batch, flat.ids),
            rotary.to(device),
            lengths.to(device),
            flat.layout.to(device),
            self._cache,
            self._rope,
        )
        return hidden

    def _input_embeddings(self, batch: Rows[ScheduledTokens], ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._decoder.embed(ids.to(self._decoder.device))
        row = 0
        for tokens in batch:
            if not tokens.seq.is_answering:  # what was generated holds no picture
                splice_embeddings(hidden[row : row + tokens.count], tokens.seq, tokens.seq.num_computed)
            row += tokens.count
        return hidden


@dataclass(frozen=True, slots=True)
class _FlatBatch:
    """A batch's tokens one after the other: what they are, where they stand, and what length they are rotated for.

    All three are int64 [tokens]. As in the reference, that length is the whole prompt's for a prompt's tokens, and what
    there was when it came for a later one; so neither chunks nor a recomputation change anything.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    layout: BatchLayout

    @classmethod
    def of(cls, batch: Rows[ScheduledTokens], block_size: int) -> "_FlatBatch":
        # Lists: for the few tokens of a step that decodes, each operation on arrays would take longer than all of this.
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        slots: list[int] = []
        blocks: list[int] = []
        sizes: list[int] = []
        for tokens in batch:
            seq, first = tokens.seq, tokens.seq.num_computed
            end, num_prompt = first + tokens.count, seq.num_prompt
            ids += seq.token_ids[first:end]
            positions += range(first, end)
            lengths += [num_prompt] * (min(end, num_prompt) - first)
            lengths += range(max(first, num_prompt) + 1, end + 1)
            own = seq.block_table[: -(-end // block_size)]
            for index in range(first // block_size, len(own)):
                start = index * block_size
                slot = (own[index] - index) * block_size
                slots += range(slot + max(first, start), slot + min(end, start + block_size))
            blocks += own
            sizes.append(len(own))
        flat = torch.from_numpy(np.array((ids, positions, lengths, slots), np.int64))
        tables = torch.split(torch.from_numpy(np.array(blocks, np.int64)), sizes)
        return cls(flat[0], flat[1], flat[2], BatchLayout(_spans(batch, tables), flat[3]))


def _spans(batch: Rows[ScheduledTokens], tables: Rows[torch.Tensor]) -> tuple[Span, ...]:
    ends = accumulate(tokens.count for tokens in batch)
    return tuple(
        Span(end - tokens.count, end, tokens.seq.num_computed + tokens.count, own)
        for tokens, end, own in zip(batch, ends, tables, strict=True)
    )


def splice_embeddings(hidden: torch.Tensor, seq: Sequence, start: int) -> None:
    """Overwrite rows of `hidden` [tokens, hidden], which begin at position `start`, with the visual tokens there."""
    end = start + hidden.shape[0]
    for placeholder, embedding in zip(seq.request.prompt.placeholders, seq.embeddings, strict=True):
        first = max(start, placeholder.start)
        last = min(end, placeholder.start + placeholder.length)
        if first < last:
            assert embedding is not None  # the scheduler has seen to it
            rows = embedding[first - placeholder.start : last - placeholder.start]
            hidden[first - start : last - start] = rows.to(hidden.device, hidden.dtype)


def _sampled(logits: torch.Tensor, seqs: Rows[Sequence]) -> list[SampledToken]:
    """Return a token per row of `logits` [rows, vocab]. Log-probabilities are of the logits before sampling."""
    asking = [row for row, seq in enumerate(seqs) if seq.request.params.top_logprobs is not None]
    scores = logits[asking].float().log_softmax(dim=-1) if asking else None
    tokens = sample(logits, seqs)
    if scores is None:
        return list(map(SampledToken, tokens))
    counts = [seqs[row].request.params.top_logprobs or 0 for row in asking]
    found: dict[int, Logprobs] = dict(
        zip(asking, logprobs_of(scores, [tokens[row] or 0 for row in asking], counts), strict=True)
    )
    return [
        SampledToken(token, found[row].chosen, found[row].top) if row in found else SampledToken(token)
        for row, token in enumerate(tokens)
    ]


def _variable_positions(
    batch: Rows[ScheduledTokens], indices: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 positions [tokens] and lengths [tokens] where sequences bring positions of their own.

    Behind its prompt such a sequence goes on by one a token, and its rope is never stretched: its length counts as 1.
    """
    positions, lengths = indices.to(torch.float32), lengths.clone()
    row = 0
    for tokens in batch:
        end = row + tokens.count
        if (own := tokens.seq.request.positions) is not None:
            behind = (indices[row:end] - (len(own) - 1)).clamp(min=0)
            positions[row:end] = own[indices[row:end].clamp(max=len(own) - 1)] + behind
            lengths[row:end] = 1
        row = end
    return positions, lengths
