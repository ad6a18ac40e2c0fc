"""What the command line shows of an answer: its text as it comes, then what it cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from io import TextIOWrapper

from rich.console import Console

from internvl_client.client import AnswerStream
from internvl_client.types import Answer, CacheTier, Receipt

# What a model writes may hold escape sequences; a terminal must not obey them.
_CONTROL_CHARACTERS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
_TIER_NAMES = {
    CacheTier.STORE: "the embedding store",
    CacheTier.VISION: "a vision replica's memory",
    CacheTier.PREFIX: "the prefix cache",
}


def open_console() -> Console:
    """Return the terminal, or plain text without colours and wrapping where there is none."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models write what not every terminal can show
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)


def show_answer(
    console: Console, stream: AnswerStream, names: Mapping[str, str], *, streams: bool = True, brief: bool = False
) -> Answer:
    """Print the answer as it comes, then tokens, times and a receipt per medium; `names` are by digest.

    `streams` False waits for the end: candidates that come side by side cannot be read as they come. `brief` says what
    it cost on one line.
    """
    with stream:
        for delta in stream:
            if streams:
                _write(console, delta.text)
        answer = stream.answer()
    if streams:
        console.print()
    else:
        _show_candidates(console, answer)
    if brief:
        console.print(f"  {brief_summary(answer, names)}", style="dim")
        return answer
    for label, text in summary(answer, names):
        console.print(f"  {label:<8} {text}", style="dim")
    return answer


def _write(console: Console, text: str) -> None:
    # Past rich, which would expand tabs as if each piece began a line.
    console.file.write(text.translate(_CONTROL_CHARACTERS))
    console.file.flush()


def _show_candidates(console: Console, answer: Answer) -> None:
    """Print the candidates, the best first."""
    ranked = sorted(answer.candidates, key=lambda candidate: -candidate.score)
    best = answer.candidates[answer.best_index]
    for candidate in (best, *(other for other in ranked if other is not best)):
        steps = " ".join(f"{score:.2f}" for score in candidate.step_scores)
        rank = f"{'best, ' if candidate is best else ''}score {candidate.score:.3f}"
        console.print(f"[{rank}{f', steps {steps}' if steps else ''}]", style="bold")
        _write(console, f"{candidate.text}\n")


def summary(answer: Answer, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return what an answer cost, as labels and texts."""
    usage, timings = answer.usage, answer.timings
    tokens = (
        f"{usage.num_prompt_tokens} read ({usage.num_visual_tokens} visual, {usage.num_cached_tokens} cached), "
        f"{usage.num_output_tokens} written, ended by {answer.finish_reason}"
    )
    time = f"first token {timings.time_to_first_token_s:.2f} s, {answer.tokens_per_second:.1f} tokens/s, "
    time += f"total {timings.total_s:.2f} s"
    receipts = [("video" if receipt.frames else "picture", _receipt(receipt, names)) for receipt in answer.receipts]
    return [("tokens", tokens), ("time", time), *receipts]


def brief_summary(answer: Answer, names: Mapping[str, str]) -> str:
    """Return on one line what an answer cost: time, speed, tokens, and where its media came from."""
    usage = answer.usage
    facts = [
        f"first token {answer.timings.time_to_first_token_s:.2f} s, {answer.tokens_per_second:.1f} tokens/s",
        f"{usage.num_prompt_tokens} read, {usage.num_cached_tokens} cached, {usage.num_output_tokens} written",
    ]
    facts += [f"{_name(receipt, names)}: {_cost(receipt)}" for receipt in answer.receipts]
    return " | ".join(facts)


def _receipt(receipt: Receipt, names: Mapping[str, str]) -> str:
    thumbnail = " and thumbnail" if receipt.num_tiles > receipt.columns * receipt.rows else ""
    grid = f"{receipt.columns}x{receipt.rows}{thumbnail}"
    if receipt.frames:
        first, last = receipt.frames[0].time_s, receipt.frames[-1].time_s
        grid = f"{len(receipt.frames)} frames, {first:.2f} to {last:.2f} s"
    return (
        f"{_name(receipt, names)}: {receipt.num_tiles} tiles ({grid}), {receipt.num_tokens} visual tokens, "
        f"{_cost(receipt)}, read from {_place(receipt.transfer_tier, 'the LLM service')}"
    )


def _name(receipt: Receipt, names: Mapping[str, str]) -> str:
    return names.get(receipt.media_digest, receipt.media_digest[:12])


def _cost(receipt: Receipt) -> str:
    if receipt.cache_hit:
        return f"hit in {_place(receipt.cache_tier, 'the vision service')}, no encode"
    return f"encode {receipt.encode_s * 1000:.0f} ms{' (shared)' if receipt.coalesced else ''}, cached from now on"


def _place(tier: CacheTier, service: str) -> str:
    return f"{service}'s memory" if tier is CacheTier.LOCAL else _TIER_NAMES.get(tier, tier.lower())
