"""Measures a served InternVL-nano through the gateway: `python -m examples.nano.evaluate --address HOST:PORT`."""

import argparse
import asyncio
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.nano.accuracy import REQUIRED, REQUIRED_IOU, Tally, overlap
from examples.nano.world import Kind, Medium, Part, Situation, Turn, draw, held_out
from internvl_client import AsyncClient, Image, ImageGroup, Message
from internvl_client import Part as ClientPart

FINAL_SEED = 424_242
_MAX_OUTPUT_TOKENS = 64
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Result:
    """A question, the right answer and the one that came."""

    kind: Kind
    question: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one, letter by letter."""
        return self.answer == self.expected


def messages_of(situation: Situation) -> list[Message]:
    """Return the first dialogue as the client says it, with the right answers to all but the last question."""
    images = [image_of(medium) for medium in situation.media]
    *earlier, last = situation.dialogues[0]
    messages: list[Message] = []
    for turn in earlier:
        messages += [_user(turn, images), Message.assistant(turn.answer)]
    return [*messages, _user(last, images)]


def image_of(medium: Medium) -> Image:
    """Return a picture as a PNG file, which loses nothing."""
    stream = io.BytesIO()
    draw(medium.scene).save(stream, "PNG", compress_level=1)
    return Image.from_bytes(stream.getvalue(), max_tiles=medium.max_tiles)


async def ask_all(address: str, situations: Iterable[Situation], concurrency: int) -> list[Result]:
    """Return the results of all situations' questions, `concurrency` asked at a time, in order."""
    remaining: Iterator[tuple[int, Situation]] = iter(enumerate(situations))
    results: dict[int, Result] = {}

    async def ask_some(client: AsyncClient) -> None:
        for index, situation in remaining:
            results[index] = await ask(client, situation)

    async with AsyncClient(address, timeout_s=_TIMEOUT_S) as client, asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(ask_some(client))
    return [results[index] for index in sorted(results)]


async def ask(client: AsyncClient, situation: Situation) -> Result:
    """Ask the last question of the situation's first dialogue."""
    last = situation.dialogues[0][-1]
    answer = await client.ask(
        *messages_of(situation), system_message=situation.system_message, max_output_tokens=_MAX_OUTPUT_TOKENS
    )
    return Result(last.kind, last.question, last.answer, answer.text)


def tally_of(results: Iterable[Result]) -> Tally:
    """Return the results by kind."""
    tally = Tally()
    for result in results:
        tally.add(str(result.kind), result.right)
        if result.kind is Kind.GROUNDING:
            tally.overlaps.append(overlap(result.answer, result.expected))
    return tally


def table(tally: Tally) -> str:
    """Return accuracy by kind as text, with a mark where less is reached than is wanted."""
    lines = [f"{'kind':<12} {'asked':>6} {'right':>7}  wanted"]
    for kind, share in tally.by_kind().items():
        wanted = REQUIRED.get(Kind(kind))
        note = "" if wanted is None else f"{wanted:.0%}{'' if share >= wanted else '  MISSED'}"
        lines.append(f"{kind:<12} {tally.asked[kind]:>6} {share:>7.1%}  {note}")
    missed = "" if tally.mean_overlap >= REQUIRED_IOU else "  MISSED"
    lines.append(f"{'mean IoU':<12} {len(tally.overlaps):>6} {tally.mean_overlap:>7.2f}  {REQUIRED_IOU}{missed}")
    return "\n".join([*lines, f"{'all':<12} {tally.asked.total():>6} {tally.overall:>7.1%}  (without boxes)"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 where a wanted accuracy is missed."""
    chosen = _parser().parse_args(arguments)
    began = time.monotonic()
    situations = held_out(chosen.seed, chosen.questions)
    results = asyncio.run(ask_all(chosen.address, situations, chosen.concurrency))
    tally = tally_of(results)
    seconds = time.monotonic() - began
    print(table(tally))
    print(f"{len(results)} questions in {seconds:.0f} s")
    if chosen.wrong:
        for result in [result for result in results if not result.right][: chosen.wrong]:
            print(f"{result.kind}: {result.question!r}: {result.answer!r}, not {result.expected!r}")
    if chosen.json:
        content = tally.as_json() | {"seed": chosen.seed, "seconds": round(seconds, 1)}
        chosen.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(not _passes(tally))


def _passes(tally: Tally) -> bool:
    reached = tally.by_kind()
    return tally.mean_overlap >= REQUIRED_IOU and all(
        reached.get(str(kind), 1.0) >= wanted for kind, wanted in REQUIRED.items()
    )


def _user(turn: Turn, images: Sequence[Image]) -> Message:
    return Message.user(*(_part(part, images) for part in turn.parts))


def _part(part: Part, images: Sequence[Image]) -> ClientPart:
    if isinstance(part, str):
        return part
    shown = [images[medium] for medium in part.media]
    return shown[0] if len(shown) == 1 else ImageGroup.of(*shown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add: Any = parser.add_argument
    add("--address", required=True, metavar="HOST:PORT", help="the gateway")
    add("--questions", type=int, default=2000)
    add("--seed", type=int, default=FINAL_SEED, help="of the questions; not one of training")
    add("--concurrency", type=int, default=16, help="questions asked at a time")
    add("--json", type=Path, help="write the figures here; evaluation.json in the checkpoint is read by its card")
    add("--wrong", type=int, default=0, metavar="N", help="show N wrong answers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
