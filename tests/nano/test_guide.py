"""What a patch shows is what is drawn there, in the order in which visual tokens merge patches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.nano.batches import BatchMaker, Recipe
from examples.nano.guide import CLASSES, UNKNOWN, Guide, what_a_collage_shows, what_is_seen
from examples.nano.model import Nano
from examples.nano.training import Plan, Trainer
from examples.nano.world import FULL, Bar, Collage, Medium, Scene, Thing, Writing, collage
from examples.nano.world.fonts import ink_box
from examples.nano.world.scene import Background
from examples.nano.world.vocabulary import COLOURS, SHAPES
from shared.checkpoint import read_config
from vision_service.model.projector import pixel_shuffle
from vision_service.preprocess.tiling import Grid, TilingSpec

PLAIN = Background("plain", (250, 250, 250), (250, 250, 250))
SPEC = TilingSpec(tile_size=112, min_tiles=1, max_tiles=4, thumbnail=True)
SHAPE, COLOUR, LETTER, PLACE, MIDDLE = range(len(CLASSES))


def thing(shape: str, colour: str, x: float, y: float, radius: float) -> Thing:
    return Thing(shape, colour, COLOURS[colour], x, y, radius)


def number_of(names: tuple[str, ...], name: str) -> int:
    return 1 + names.index(name)


def test_a_patch_shows_what_covers_it() -> None:
    scene = Scene(112, 112, PLAIN, (thing("square", "red", 28, 28, 20), thing("circle", "blue", 84, 84, 20)))
    labels, boxes = what_is_seen(scene, Grid(1, 1), SPEC, 8)
    grid, ends = labels.reshape(8, 8, -1), boxes.reshape(8, 8, 4)
    assert grid[1, 1, SHAPE] == number_of(SHAPES, "square")
    assert grid[1, 1, COLOUR] == number_of(tuple(COLOURS), "red")
    assert grid[5, 6, SHAPE] == number_of(SHAPES, "circle")
    assert grid[0, 7].tolist() == [0] * len(CLASSES)
    assert ends[1, 1] == pytest.approx([(28 + side * 0.72 * 20) / 112 for side in (-1, -1, 1, 1)], abs=1e-6)
    assert np.argwhere(grid[..., MIDDLE]).tolist() == [[2, 2], [6, 6]]


def test_each_tile_shows_its_own_part_and_the_thumbnail_all() -> None:
    scene = Scene(224, 112, PLAIN, (thing("star", "green", 60, 56, 30), thing("ring", "pink", 170, 56, 30)))
    labels, boxes = what_is_seen(scene, Grid(2, 1), SPEC, 8)
    shapes = [set(tile[:, SHAPE].tolist()) - {0} for tile in labels]
    star, ring = number_of(SHAPES, "star"), number_of(SHAPES, "ring")
    assert shapes == [{star}, {ring}, {star, ring}]
    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_letters_stand_in_order_but_a_tile_of_several_cannot_know_which_they_are() -> None:
    left, top, right, bottom = ink_box("48", "lato-bold", 60)
    writing = Writing(
        "48", "blue", COLOURS["blue"], "lato-bold", 60, 60, 20, (left + 60, top + 20, right + 60, bottom + 20)
    )
    labels, _ = what_is_seen(Scene(224, 112, PLAIN, (), writing), Grid(2, 1), SPEC, 8)
    whole = labels[-1].reshape(8, 8, -1)
    row = whole[(whole[..., LETTER] > 0).any(axis=1)][0]
    assert [int(label) - 1 for label in dict.fromkeys(row[:, LETTER].tolist()) if label] == [4, 8]
    assert [label for label in dict.fromkeys(row[:, PLACE].tolist()) if label] == [1, 2]
    assert set(labels[:-1, :, PLACE].ravel().tolist()) == {0, UNKNOWN}


def test_bars_are_seen() -> None:
    bars = (Bar("red", COLOURS["red"], (10, 30, 40, 100)), Bar("green", COLOURS["green"], (60, 60, 90, 100)))
    labels, _ = what_is_seen(Scene(112, 112, PLAIN, (), None, bars), Grid(1, 1), SPEC, 8)
    assert len(np.unique(labels[0, :, COLOUR])) == 3


def test_patches_are_read_in_the_order_that_pixel_shuffle_merges_them() -> None:
    patches = torch.arange(2 * 64 * 3).view(2, 64, 3)
    merged = pixel_shuffle(patches.float(), 2, "v2").view(-1, 3)
    assert torch.equal(Guide(16, 2)._by_token(patches).float(), merged)


def test_a_guide_learns_to_read_tokens_that_tell_everything(maker: BatchMaker) -> None:
    scene = Scene(112, 112, PLAIN, (thing("heart", "purple", 50, 60, 30),))
    view = maker.view(Medium(scene, 1))
    labels, boxes = torch.from_numpy(view.seen), torch.from_numpy(view.boxes)
    torch.manual_seed(0)
    guide, tokens = Guide(32, 2), torch.randn(16, 32)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = guide(tokens, labels, boxes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_a_collage_shows_what_its_scenes_show_each_in_its_place() -> None:
    one = Scene(56, 112, PLAIN, (thing("square", "red", 28, 28, 20),))
    other = Scene(56, 112, PLAIN, (thing("square", "blue", 28, 84, 20),))
    labels, boxes = what_a_collage_shows(Collage(112, 112, ((one, 0, 0), (other, 56, 0))), 8)
    whole = Scene(112, 112, PLAIN, (thing("square", "red", 28, 28, 20), thing("square", "blue", 84, 84, 20)))
    expected_labels, expected_boxes = what_is_seen(whole, Grid(1, 1), SPEC, 8)
    assert np.array_equal(labels, expected_labels)
    assert boxes == pytest.approx(expected_boxes)


def test_collages_are_always_the_same_and_hold_all_that_there_is() -> None:
    first, again = (np.asarray(collage(3, 7, FULL).draw()) for _ in range(2))
    assert np.array_equal(first, again)
    found = [what_a_collage_shows(collage(3, index, FULL), 8)[0] for index in range(300)]
    for field, size in enumerate(CLASSES):
        present = set(np.unique(np.stack(found)[..., field]).tolist())
        assert present >= set(range(size)) - ({5, 6, 7, 8} if field == PLACE else set())


def test_at_the_end_there_are_no_more_collages_and_no_situation_is_left_out_or_comes_twice(directory: Path) -> None:
    maker = BatchMaker(Recipe(directory, seed=1, situations_per_batch=2, seeing_steps=2, answering_from=7))
    batches = [maker.batch(step) for step in range(2, 13)]
    assert [batch.situations for batch in batches] == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2, 2]
    unseeing = BatchMaker(replace(maker.recipe, seeing_steps=0))
    with_words = [batch.ids for batch in batches if batch.situations]
    assert all(np.array_equal(ids, unseeing.batch(step).ids) for step, ids in enumerate(with_words))


def test_training_begins_with_pictures_that_nothing_is_said_about(directory: Path) -> None:
    maker = BatchMaker(Recipe(directory, seed=1, situations_per_batch=2, seeing_steps=2, collages_per_batch=4))
    batches = [maker.batch(step) for step in range(7)]
    assert [batch.situations for batch in batches] == [0, 0, 2, 2, 2, 0, 2]
    assert batches[0].tiles.shape == (4, 112, 112, 3)
    assert not np.array_equal(batches[0].tiles, batches[1].tiles)
    unseeing = BatchMaker(replace(maker.recipe, seeing_steps=0))
    with_words = [batch.ids for batch in batches if batch.situations]
    assert all(np.array_equal(ids, unseeing.batch(step).ids) for step, ids in enumerate(with_words))
    assert not np.array_equal(batches[5].tiles, batches[1].tiles)
    plan = Plan(steps=10, seconds=None, warm_up_steps=1)
    model = Nano.of(read_config(directory), seed=5)
    trainer = Trainer(model, plan, torch.device("cpu"), torch.float32, "a training")
    before = [parameter.detach().clone() for parameter in model.decoder.parameters()]
    tower = model.tower.mlp1[3].weight.detach().clone()
    assert trainer.step(batches[0]) == 0
    assert all(torch.equal(old, new) for old, new in zip(before, model.decoder.parameters(), strict=True))
    assert not torch.equal(tower, model.tower.mlp1[3].weight)
    assert trainer.step(batches[2]) > 0
