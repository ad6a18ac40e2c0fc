"""Measures a model in this process: right answers by kind, and how well boxes fit."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

import torch

from examples.nano.batches import NO_TARGET, Batch, BatchMaker
from examples.nano.model import Nano, tensors_of
from examples.nano.world import Kind, Situation

_BOX = re.compile(r"\[\[(\d+), (\d+), (\d+), (\d+)\]\]")
_BATCH = 32
_LONGEST_ANSWER = 48
_LONGEST_ROW = 4096
# What the model has to reach at least, by kind.
REQUIRED = {
    **dict.fromkeys(
        (Kind.COLOUR, Kind.SHAPE, Kind.COUNT, Kind.POSITION, Kind.PRESENCE, Kind.NUMBER),
        0.95,
    ),
    **dict.fromkeys((Kind.FOLLOW_UP, Kind.COMPARE, Kind.DIRECTION), 0.90),
}
REQUIRED_IOU = 0.7


@dataclass(slots=True)
class Tally:
    """Answers asked for and right, by kind, and the overlap of boxes."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    overlaps: list[float] = field(default_factory=list)

    def add(self, kind: str, right: bool) -> None:
        """Count one answer."""
        self.asked[kind] += 1
        self.right[kind] += right

    @property
    def overall(self) -> float:
        """Share of right answers, boxes not counted: those are measured by their overlap."""
        boxes = str(Kind.GROUNDING)
        asked = self.asked.total() - self.asked[boxes]
        return (self.right.total() - self.right[boxes]) / max(1, asked)

    @property
    def mean_overlap(self) -> float:
        """Mean intersection over union of all boxes asked for."""
        return sum(self.overlaps) / max(1, len(self.overlaps))

    def by_kind(self) -> dict[str, float]:
        """Return the share of right answers of each kind that was asked for."""
        return {kind: self.right[kind] / self.asked[kind] for kind in map(str, Kind) if self.asked[kind]}

    def as_json(self) -> dict[str, Any]:
        """Return everything for a file."""
        return {
            "asked": self.asked.total(),
            "overall": round(self.overall, 4),
            "grounding_mean_iou": round(self.mean_overlap, 4),
            "kinds": {
                kind: {"asked": self.asked[kind], "accuracy": round(share, 4)} for kind, share in self.by_kind().items()
            },
        }


def overlap(answer: str, expected: str) -> float:
    """Return the intersection over union of the first boxes in two answers; 0 where one has none."""
    found, wanted = _BOX.search(answer), _BOX.search(expected)
    if not found or not wanted:
        return 0.0
    one, other = (tuple(map(int, box.groups())) for box in (found, wanted))
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    areas = [max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared) if shared else 0.0


@torch.inference_mode()
def measure(model: Nano, maker: BatchMaker, situations: Iterable[Situation], max_boxes: int = 64) -> Tally:
    """Return how often the model answers the last question of the first dialogue exactly, decoding greedily.

    An answer is what greedy decoding gives if and only if each of its tokens is the likeliest after the ones before
    it, so one pass tells. Boxes, which may be nearly right, are decoded, `max_boxes` of them.
    """
    tally, remaining = Tally(), iter(situations)
    whole = maker.with_rows_of(_LONGEST_ROW)
    boxes: list[Situation] = []
    while chunk := list(islice(remaining, _BATCH)):
        boxes += [found for found in chunk if found.dialogues[0][-1].kind is Kind.GROUNDING]
        _, right = right_answers(model, whole.batch_of(chunk))
        ends = accumulate(len(found.dialogues[0]) for found in chunk)
        for found, end in zip(chunk, ends, strict=True):
            tally.add(str(found.dialogues[0][-1].kind), right[end - 1])
    for found in boxes[:max_boxes]:
        tally.overlaps.append(overlap(answer(model, maker, found), found.dialogues[0][-1].answer))
    return tally


@torch.inference_mode()
def answer(model: Nano, maker: BatchMaker, situation: Situation) -> str:
    """Return the model's own answer to the last question of the first dialogue."""
    return maker.writer.text_of(answer_ids(model, maker, situation))


@torch.inference_mode()
def answer_ids(model: Nano, maker: BatchMaker, situation: Situation) -> list[int]:
    """Return the ids that the model generates greedily, the stop token included."""
    tiles = [maker.view(medium).tiles for medium in situation.media]
    writer = maker.writer
    prompt = writer.prompt(situation.dialogues[0], [len(of_one) for of_one in tiles], situation.system_message)
    of_media = [model.visual_tokens(torch.from_numpy(of_one.copy())) for of_one in tiles]
    places = [torch.arange(place.start, place.start + place.length) for place in prompt.placeholders]
    visual = [of_media[int(place.ref.digest)] for place in prompt.placeholders]
    generated: list[int] = []
    while len(generated) < _LONGEST_ANSWER and writer.stop_id not in generated[-1:]:
        logits = _logits(model, [*prompt.ids, *generated], visual, places)
        generated.append(int(logits.argmax()))
    return generated


def _logits(
    model: Nano, ids: Sequence[int], visual: Sequence[torch.Tensor], places: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the logits after the last of `ids`."""
    empty = torch.zeros((0, model.decoder.config.hidden_size))
    hidden = model(
        torch.tensor([ids]),
        torch.arange(len(ids))[None],
        torch.zeros((1, len(ids)), dtype=torch.int64),
        torch.cat([empty, *visual]),
        torch.cat([torch.zeros(0, dtype=torch.int64), *places]),
    )
    return model.logits(hidden[0, -1])


def right_answers(model: Nano, batch: Batch) -> tuple[list[int], list[bool]]:
    """Return the kind of every answer of a batch, and whether greedy decoding gives it."""
    tensors = tensors_of(batch, next(model.parameters()).device)
    hidden = hidden_states(model, tensors)
    asked = tensors["targets"] != NO_TARGET
    wrong = model.logits(hidden[asked]).argmax(-1) != tensors["targets"][asked]
    mistakes = torch.zeros(len(batch.kinds), dtype=torch.int64, device=hidden.device)
    mistakes.index_add_(0, tensors["answers"][asked], wrong.long())
    return batch.kinds.tolist(), (mistakes == 0).tolist()


def hidden_states(model: Nano, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the final hidden states [rows, tokens, hidden] of a batch's tensors."""
    return hidden_states_over(model, tensors, model.visual_tokens(tensors["tiles"]))


def hidden_states_over(model: Nano, tensors: dict[str, torch.Tensor], visual_tokens: torch.Tensor) -> torch.Tensor:
    """Return the final hidden states of a batch's tensors over the visual tokens of its tiles."""
    spliced = visual_tokens[tensors["sources"]]
    hidden: torch.Tensor = model(tensors["ids"], tensors["positions"], tensors["branches"], spliced, tensors["places"])
    return hidden
