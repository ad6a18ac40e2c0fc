"""The world: always the same for a seed, and its answers follow from what is in its pictures."""

import math
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import ImageChops

from examples.nano.draw import demos
from examples.nano.world import EASY, FULL, Dialogue, Kind, Scene, Situation, Thing, draw, held_out, situation
from examples.nano.world.vocabulary import COLOURS, WORDS
from tests.nano.checker import expected

SEED = 77
SITUATIONS = [situation(SEED, index) for index in range(400)]
SCENES = [medium.scene for found in SITUATIONS for medium in found.media]


def whole_dialogues() -> list[tuple[Situation, Dialogue]]:
    """Every beginning of every dialogue: each of its questions comes last once."""
    return [
        (found, dialogue[:length])
        for found in SITUATIONS
        for dialogue in found.dialogues
        for length in range(1, len(dialogue) + 1)
    ]


def test_a_seed_and_a_number_always_give_the_same_situation_and_pixels() -> None:
    for index in range(30):
        again = situation(SEED, index)
        assert again == SITUATIONS[index]
        for one, other in zip(again.media, SITUATIONS[index].media, strict=True):
            assert draw(one.scene).tobytes() == draw(other.scene).tobytes()


def test_other_seeds_and_numbers_give_other_situations() -> None:
    assert len({repr(situation(seed, index)) for seed in (1, 2, 3) for index in range(20)}) == 60


def test_the_colour_of_a_thing_is_at_its_centre() -> None:
    seen = Counter[str]()
    for scene in SCENES:
        picture = draw(scene)
        for thing in scene.things:
            x = thing.x + (0.68 * thing.radius if thing.shape == "ring" else 0)
            if not covered(scene, thing, x, thing.y):
                assert picture.getpixel((int(x), int(thing.y))) == thing.rgb
                seen[thing.shape] += 1
    assert len(seen) == len(FULL.shapes)


def covered(scene: Scene, thing: Thing, x: float, y: float) -> bool:
    later = scene.things[scene.things.index(thing) + 1 :]
    return any((x - other.x) ** 2 + (y - other.y) ** 2 < (other.radius + 2) ** 2 for other in later)


def test_a_shade_is_nearest_to_the_colour_that_it_is_called() -> None:
    for scene in SCENES:
        for part in (*scene.things, *scene.bars, *((scene.writing,) if scene.writing else ())):
            distances = {name: math.dist(rgb, part.rgb) for name, rgb in COLOURS.items()}
            assert min(distances, key=distances.__getitem__) == part.colour


def test_a_box_is_exactly_what_drawing_a_thing_changes() -> None:
    for scene in SCENES[:300]:
        for thing in scene.things:
            alone = Scene(scene.width, scene.height, scene.background, (thing,))
            empty = Scene(scene.width, scene.height, scene.background)
            changed = ImageChops.difference(draw(alone), draw(empty)).getbbox()
            assert changed is not None
            assert np.abs(np.subtract(changed, thing.box)).max() <= 2


def test_the_box_of_writing_is_where_its_ink_is() -> None:
    written = [scene for scene in SCENES if scene.writing]
    assert len(written) > 50
    for scene in written:
        empty = Scene(scene.width, scene.height, scene.background)
        changed = ImageChops.difference(draw(scene), draw(empty)).getbbox()
        assert changed is not None
        assert scene.writing is not None
        assert np.abs(np.subtract(changed, scene.writing.box)).max() <= 2


def test_everything_lies_within_its_picture() -> None:
    for scene in SCENES:
        boxes = [part.box for part in (*scene.things, *scene.bars, *((scene.writing,) if scene.writing else ()))]
        for left, top, right, bottom in boxes:
            assert left >= 0
            assert top >= 0
            assert right <= scene.width
            assert bottom <= scene.height


def test_bars_have_their_colour_and_stand_on_one_line() -> None:
    charts = [scene for scene in SCENES if scene.bars]
    assert charts
    for scene in charts:
        picture = draw(scene)
        assert len({bar.box[3] for bar in scene.bars}) == 1
        assert len({bar.colour for bar in scene.bars}) == len(scene.bars)
        for bar in scene.bars:
            middle = int((bar.box[0] + bar.box[2]) / 2), int((bar.box[1] + bar.box[3]) / 2)
            assert picture.getpixel(middle) == bar.rgb


@pytest.mark.parametrize("kind", Kind)
def test_answers_follow_from_the_scene(kind: Kind) -> None:
    checked = 0
    for found, dialogue in whole_dialogues():
        if dialogue[-1].kind is kind:
            right = expected(found, dialogue)
            assert right in (None, dialogue[-1].answer), f"{dialogue} in {found.media}"
            checked += 1
    assert checked >= 30


def test_the_checker_knows_most_kinds() -> None:
    known = {dialogue[-1].kind for found, dialogue in whole_dialogues() if expected(found, dialogue) is not None}
    assert known == set(Kind) - {Kind.GROUNDING, Kind.ABSENT, Kind.REFUSAL, Kind.TALK}


def test_boxes_in_answers_are_thousandths_of_the_whole_picture() -> None:
    checked = 0
    for found, dialogue in whole_dialogues():
        answer = re.fullmatch(r"<ref>(.+)</ref><box>\[\[(\d+), (\d+), (\d+), (\d+)\]\]</box>", dialogue[-1].answer)
        if dialogue[-1].kind is not Kind.GROUNDING or answer is None or answer.group(1) == "it":
            continue
        scene = found.media[0].scene
        box = [int(value) / 1000 for value in answer.groups()[1:]]
        sides = np.array([scene.width, scene.height] * 2)
        boxes = [part.box for part in (*scene.things, *((scene.writing,) if scene.writing else ()))]
        assert min(np.abs(np.array(known) / sides - box).max() for known in boxes) <= 0.0101
        checked += 1
    assert checked > 100


def test_things_that_are_not_there_are_said_not_to_be() -> None:
    for found, dialogue in whole_dialogues():
        if dialogue[-1].kind is Kind.ABSENT:
            name = dialogue[-1].answer.removeprefix("there is no ")
            words = name.split()
            assert not any(set(words) <= {thing.colour, thing.shape} for thing in found.media[0].scene.things)


def test_no_situation_asks_the_same_twice_with_two_answers() -> None:
    for found in SITUATIONS:
        answers = {}
        for dialogue in found.dialogues:
            if len(dialogue) == 1:
                question = re.sub(r"[?.]", "", dialogue[0].question.lower())
                assert answers.setdefault(question, dialogue[0].answer) == dialogue[0].answer


def test_held_out_questions_cover_every_kind() -> None:
    asked = Counter(found.dialogues[0][-1].kind for found in held_out(5, 400))
    assert set(asked) == set(Kind)
    assert min(asked.values()) >= 5


def test_pictures_come_in_many_shapes_and_some_get_several_tiles() -> None:
    ratios = [scene.width / scene.height for scene in SCENES]
    assert min(ratios) < 0.6
    assert max(ratios) > 1.6
    assert sum(scene.width * scene.height > 159**2 for scene in SCENES) > 30


def test_the_easy_world_is_easier() -> None:
    scenes = [medium.scene for index in range(100) for medium in situation(1, index, EASY).media]
    assert max(len(scene.things) for scene in scenes) <= 2
    assert all(len(scene.writing.text) <= 2 for scene in scenes if scene.writing and scene.writing.is_number)


def test_words_are_not_names_of_anything_else() -> None:
    assert not set(WORDS) & {*COLOURS, *FULL.shapes}


def test_the_demo_draws_the_same_pictures_every_time() -> None:
    for one, other in zip(demos(), demos(), strict=True):
        for name, scene in one.pictures.items():
            assert draw(scene).tobytes() == draw(other.pictures[name]).tobytes()
    assert [answer for _, answer in next(iter(islice(demos(), 1))).dialogue][1:] == ["top right", "blue"]


def test_a_picture_that_allows_no_question_is_drawn_again() -> None:
    undoubted = situation(1, 141_116)
    assert undoubted.dialogues
    assert undoubted == situation(1, 141_116)
