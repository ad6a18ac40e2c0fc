"""Batches for training: many dialogues about the same pictures share one row, and none of them sees another.

A row is a tree. Its trunk is what all its dialogues begin with (system message and pictures); each branch is the rest
of one dialogue. A token attends to the trunk and to its own branch, at the positions it would have if it were alone, so
what is learned is what is served, while pictures are encoded and read once.
"""

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from queue import Empty, Full
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from examples.nano.guide import CLASSES, Boxes, Labels, what_a_collage_shows, what_is_seen
from examples.nano.prompts import PromptWriter, TokenSequence
from examples.nano.world import EASY, FULL, Dialogue, Kind, Medium, Situation, WorldConfig, collage, draw, situation
from examples.nano.world.chance import generator
from vision_service.preprocess.image import Tiles, cut_tiles
from vision_service.preprocess.tiling import Grid, TilingSpec, choose_grid

KINDS: Final = tuple(Kind)
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
NO_TARGET: Final = -100
PADDING: Final = -1
TRUNK: Final = 0
_COLLAGE_INTERVAL: Final = 4
_SHORTEST_BRANCH: Final = 12  # tokens; nothing shorter is asked and answered


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of tokens, [rows, tokens] where not said otherwise.

    `positions` count within each dialogue; `branches` is 0 in the trunk, then 1, 2, ..., and -1 where a row is padded;
    `targets` is the token that must follow, where it belongs to an answer; `answers` numbers the answers of the batch.
    Visual token `sources[i]`, counted over all tiles, stands at flat position `places[i]`. `kinds` [answers] indexes
    `KINDS`. `seen` and `boxes` say what each patch of the tiles shows (`guide.what_is_seen`). `situations` counts what
    the batch was made of.
    """

    tiles: Tiles
    seen: Labels
    boxes: Boxes
    ids: Ints
    positions: Ints
    branches: Ints
    targets: Ints
    weights: Floats
    answers: Ints
    places: Ints
    sources: Ints
    kinds: Ints
    situations: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """What batches are made of.

    The first `seeing_steps` are collages without any words, and later every `_COLLAGE_INTERVAL`th is, up to step
    `answering_from`. Of the situations the first `easy_situations` are drawn less and less often from the easy world.
    """

    directory: Path
    seed: int
    situations_per_batch: int = 16
    max_tokens: int = 224
    easy_situations: int = 0
    seeing_steps: int = 0
    collages_per_batch: int = 48
    answering_from: int = sys.maxsize

    def config_of(self, index: int) -> WorldConfig:
        """Return the world that situation `index` is drawn from."""
        if index >= self.easy_situations:
            return FULL
        return EASY if generator(self.seed, index, 1).random() > index / self.easy_situations else FULL


class BatchMaker:
    """Makes any batch of a recipe, by its number. One per process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.writer = PromptWriter(recipe.directory)
        self.spec = TilingSpec.of(self.writer.config)

    def with_rows_of(self, max_tokens: int) -> "BatchMaker":
        """Return a maker of longer or shorter rows that shares everything else."""
        other = copy(self)
        other.recipe = replace(self.recipe, max_tokens=max_tokens)
        return other

    def batch(self, step: int) -> Batch:
        """Return batch `step`; the same number always gives the same batch."""
        seeing, later = self.recipe.seeing_steps, step - self.recipe.seeing_steps
        if later < 0:
            return self._collages(step)
        mixed = min(later, self.recipe.answering_from - seeing) if seeing else 0  # steps of which some are collages
        if seeing and step < self.recipe.answering_from and later % _COLLAGE_INTERVAL == _COLLAGE_INTERVAL - 1:
            return self._collages(seeing + later // _COLLAGE_INTERVAL)
        count, first = self.recipe.situations_per_batch, later - mixed // _COLLAGE_INTERVAL
        indices = range(first * count, (first + 1) * count)
        found = [situation(self.recipe.seed, index, self.recipe.config_of(index)) for index in indices]
        # All of one shape, so that what is compiled for it serves every step.
        return self.batch_of(found, self.recipe.max_tokens)

    def batch_of(self, situations: Sequence[Situation], width: int = 0) -> Batch:
        """Return the batch of these situations, its rows at least `width` tokens long."""
        return _collate([self._row(found) for found in situations], self.writer.config.tokens_per_tile, width)

    def view(self, medium: Medium) -> "View":
        """Return a picture's tiles, drawn and cut by the product's own preprocessing, and what they show."""
        picture = draw(medium.scene)
        spec = self.spec.adjusted(medium.max_tiles, None)
        grid = choose_grid(picture.width, picture.height, spec)
        seen, boxes = what_is_seen(medium.scene, grid, spec, spec.tile_size // self.writer.config.patch_size)
        return View(cut_tiles(picture, grid, spec), seen, boxes)

    def _collages(self, step: int) -> Batch:
        """Return a batch of pictures that nothing is said about."""
        count, config = self.recipe.collages_per_batch, self.writer.config
        spec = self.spec.adjusted(1, None)
        views = []
        for index in range(step * count, (step + 1) * count):
            found = collage(self.recipe.seed, index, FULL)
            seen, boxes = what_a_collage_shows(found, spec.tile_size // config.patch_size)
            views.append(View(cut_tiles(found.draw(), Grid(1, 1), spec), seen, boxes))
        return _collate([_Row(views, (), 0, 0)], config.tokens_per_tile)

    def _row(self, found: Situation) -> "_Row":
        views = [self.view(medium) for medium in found.media]
        counts = [len(view.tiles) for view in views]
        fitting: list[TokenSequence] = []
        length = 0
        for dialogue in found.dialogues:
            if fitting and length + _SHORTEST_BRANCH > self.recipe.max_tokens:
                break
            wider = [*fitting, self._sequence(dialogue, counts, found.system_message)]
            trunk = _trunk_length(wider)
            needed = trunk + sum(len(sequence.ids) - trunk for sequence in wider)
            if fitting and needed > self.recipe.max_tokens:
                continue
            fitting, length, row = wider, needed, _Row(views, tuple(wider), trunk, needed)
        return row

    def _sequence(self, dialogue: Dialogue, tile_counts: list[int], system_message: str | None) -> TokenSequence:
        """Return the dialogue, without its last turns where it is too long for a row."""
        sequence = self.writer.sequence(dialogue, tile_counts, system_message)
        while len(sequence.ids) > self.recipe.max_tokens and len(dialogue) > 2:
            dialogue = dialogue[:-1]
            sequence = self.writer.sequence(dialogue, tile_counts, system_message)
        return sequence


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The tiles of a picture and what each patch of them shows."""

    tiles: Tiles
    seen: Labels
    boxes: Boxes


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    views: list[View]
    sequences: tuple[TokenSequence, ...]
    trunk: int
    length: int


class WorkerLost(Exception):
    """A worker process ended by itself."""


class BatchSource:
    """The batches of a recipe from `first_step` on, in order, made ahead by worker processes. A context manager.

    Iterating raises `WorkerLost`. Without workers the batches are made between the steps.
    """

    _AHEAD = 4

    def __init__(self, recipe: Recipe, first_step: int, num_workers: int) -> None:
        self._recipe = recipe
        self._first_step = first_step
        context = multiprocessing.get_context("spawn")
        self._queues: list[Any] = [context.Queue(self._AHEAD) for _ in range(num_workers)]
        self._processes = [
            context.Process(target=_work, args=(recipe, first_step + index, num_workers, queue), daemon=True)
            for index, queue in enumerate(self._queues)
        ]

    def __enter__(self) -> "BatchSource":
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def __iter__(self) -> Iterator[Batch]:
        if not self._processes:
            maker = BatchMaker(self._recipe)
            step = self._first_step
            while True:
                yield maker.batch(step)
                step += 1
        while True:
            for index in range(len(self._queues)):
                yield self._next_from(index)

    def _next_from(self, worker: int) -> Batch:
        while True:
            try:
                batch: Batch = self._queues[worker].get(timeout=2)
                return batch
            except Empty:
                if not self._processes[worker].is_alive():
                    raise WorkerLost("A process that draws pictures has stopped; its own words are above.") from None


def _work(recipe: Recipe, step: int, stride: int, queue: Any) -> None:
    parent = multiprocessing.parent_process()
    maker = BatchMaker(recipe)
    while True:
        batch = maker.batch(step)
        while True:
            try:
                queue.put(batch, timeout=5)
                break
            except Full:
                if parent is not None and not parent.is_alive():
                    return
        step += stride


def _trunk_length(sequences: Sequence[TokenSequence]) -> int:
    """Return how many tokens all sequences begin with; at least one token before every answer is left to a branch."""
    longest = min(sequence.answers[0].start for sequence in sequences) - 1
    first = sequences[0].ids[:longest]
    for sequence in sequences[1:]:
        pairs = zip(first, sequence.ids, strict=False)
        first = first[: next((index for index, (one, other) in enumerate(pairs) if one != other), len(first))]
    return len(first)


def _collate(rows: Sequence[_Row], tokens_per_tile: int, width: int = 0) -> Batch:
    shape = (len(rows), max([width, *(row.length for row in rows)]))
    arrays = _Arrays(shape, tokens_per_tile)
    for index, row in enumerate(rows):
        arrays.add(index, row)
    views = list(chain.from_iterable(row.views for row in rows)) or [_NO_VIEW]
    return Batch(
        tiles=np.concatenate([view.tiles for view in views]),
        seen=np.concatenate([view.seen for view in views]),
        boxes=np.concatenate([view.boxes for view in views]),
        ids=arrays.ids,
        positions=arrays.positions,
        branches=arrays.branches,
        targets=arrays.targets,
        weights=arrays.weights,
        answers=arrays.answers,
        places=_joined(arrays.places),
        sources=_joined(arrays.sources),
        kinds=np.array(arrays.kinds, np.int64),
        situations=sum(bool(row.sequences) for row in rows),
    )


_NO_VIEW = View(
    np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0, 1, len(CLASSES)), np.int64), np.zeros((0, 1, 4), np.float32)
)


class _Arrays:
    """A batch that is being filled."""

    def __init__(self, shape: tuple[int, int], tokens_per_tile: int) -> None:
        self.ids = np.zeros(shape, np.int64)
        self.positions = np.zeros(shape, np.int64)
        self.branches = np.full(shape, PADDING, np.int64)
        self.targets = np.full(shape, NO_TARGET, np.int64)
        self.weights = np.zeros(shape, np.float32)
        self.answers = np.full(shape, -1, np.int64)
        self.places: list[Ints] = []
        self.sources: list[Ints] = []
        self.kinds: list[int] = []
        self._per_tile = tokens_per_tile
        self._num_visual = 0

    def add(self, row: int, content: _Row) -> None:
        lengths = [len(view.tiles) * self._per_tile for view in content.views]
        starts = [self._num_visual + sum(lengths[:medium]) for medium in range(len(lengths))]
        end = content.trunk
        for branch, sequence in enumerate(content.sequences, start=1):
            # The trunk is written once, with the first branch.
            begin = 0 if branch == 1 else content.trunk
            shift = end - content.trunk
            self._add_tokens(row, sequence, begin, shift)
            self.branches[row, end : end + len(sequence.ids) - content.trunk] = branch
            for picture in sequence.pictures:
                if picture.start >= begin:
                    self._add_picture(row, picture.start + shift, starts[picture.medium], lengths[picture.medium])
            end += len(sequence.ids) - content.trunk
        self.branches[row, : content.trunk] = TRUNK
        self._num_visual += sum(lengths)

    def _add_tokens(self, row: int, sequence: TokenSequence, begin: int, shift: int) -> None:
        target = slice(begin + shift, len(sequence.ids) + shift)
        self.ids[row, target] = sequence.ids[begin:]
        self.positions[row, target] = np.arange(begin, len(sequence.ids))
        for span in sequence.answers:
            before = slice(span.start - 1 + shift, span.end - 1 + shift)
            self.targets[row, before] = sequence.ids[span.start : span.end]
            # A long answer counts more than a short one, but not in proportion.
            self.weights[row, before] = (span.end - span.start) ** -0.5
            self.answers[row, before] = len(self.kinds)
            self.kinds.append(KINDS.index(span.kind))

    def _add_picture(self, row: int, start: int, source: int, length: int) -> None:
        first = row * self.ids.shape[1] + start
        self.places.append(np.arange(first, first + length))
        self.sources.append(np.arange(source, source + length))


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
