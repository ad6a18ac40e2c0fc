"""Works out answers from scenes alone, by the words of the question: it shares nothing with the makers of questions."""

import re
from collections.abc import Sequence

from examples.nano.world import Dialogue, Kind, Scene, Situation, Thing
from examples.nano.world.vocabulary import COLOURS, PLURALS, SHAPES

PLACE = re.compile(r"(top|middle|bottom) (left|middle|right)|in the middle")
NUMBERED = re.compile(r"(?:Image-|Frame)(\d)")


def expected(situation: Situation, dialogue: Dialogue) -> str | None:
    """Return the right answer to the last question, or None where this checker does not know the kind."""
    kind, questions = dialogue[-1].kind, [turn.question.splitlines()[-1] for turn in dialogue]
    scenes = [medium.scene for medium in situation.media]
    if kind in (Kind.COMPARE, Kind.COMPARE_THREE):
        return compared(scenes, questions[-1])
    if kind is Kind.FOLLOW_UP:
        return followed_up(scenes, dialogue)
    if kind in (Kind.DIRECTION, Kind.CHANGE, Kind.FRAME):
        return happened(scenes, kind, questions[-1])
    return about(scenes[0], kind, questions[-1]) if scenes else None


def about(scene: Scene, kind: Kind, question: str) -> str | None:
    if scene.writing and kind in (Kind.COLOUR, Kind.POSITION):
        return scene.writing.colour if kind is Kind.COLOUR else place(scene, scene.writing.box)
    if kind in ONE_THING:
        return ONE_THING[kind](scene, only(named(scene, question)))
    if kind is Kind.ABSENT:
        assert not named(scene, question)
    return OF_ALL[kind](scene, question) if kind in OF_ALL else None


def named(scene: Scene, question: str) -> list[Thing]:
    """Return the things that fit every colour, shape and place said in a question."""
    words = re.findall(r"[a-z]+", question.lower())
    colours = [word for word in words if word in COLOURS]
    shapes = [shape for shape in SHAPES if {shape, f"{shape}s", PLURALS.get(shape, shape)} & set(words)]
    said = PLACE.search(question.lower())
    return [
        thing
        for thing in scene.things
        if (not colours or thing.colour in colours)
        and (not shapes or thing.shape in shapes)
        and (not said or place(scene, thing.box) == said.group().removeprefix("in the "))
    ]


def only(things: Sequence[Thing]) -> Thing:
    assert len({(thing.x, thing.y) for thing in things}) == 1, "the question is ambiguous"
    return things[0]


def place(scene: Scene, box: tuple[float, float, float, float]) -> str:
    x, y = (box[0] + box[2]) / 2 * 3 / scene.width, (box[1] + box[3]) / 2 * 3 / scene.height
    for value in (x, y):
        assert min(abs(value - 1), abs(value - 2)) > 0.1, "the place is open to doubt"
    row, column = ("top", "middle", "bottom")[int(y)], ("left", "middle", "right")[int(x)]
    return "middle" if row == column == "middle" else f"{row} {column}"


def with_article(thing: Thing) -> str:
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"


def presence(scene: Scene, question: str) -> str:
    text = question.lower()
    if "number" in text or "word" in text or "bar chart" in text:
        sort = None if scene.writing is None else "number" if scene.writing.text.isdigit() else "word"
        return "yes" if sort and sort in text else "no"
    if any(outside in text for outside in ("dog", "cat", "person", "car", "tree", "house")):
        return "no"
    return "yes" if named(scene, question) else "no"


def digit(scene: Scene, question: str) -> str:
    assert scene.writing
    text = scene.writing.text
    if "how many" in question.lower():
        return str(len(text))
    return next(
        text[index] for index, name in ((0, "first"), (1, "second"), (2, "third"), (-1, "last")) if name in question
    )


def chart(scene: Scene, question: str) -> str:
    bars = sorted(scene.bars, key=lambda bar: bar.box[1])
    text = question.lower()
    if "how many" in text or "count" in text:
        return str(len(bars))
    if "tallest" in text or "highest" in text:
        return bars[0].colour
    if "shortest" in text or "lowest" in text:
        return bars[-1].colour
    first, second = (word for word in re.findall(r"[a-z]+", text) if word in COLOURS)
    tops = {bar.colour: bar.box[1] for bar in bars}
    return "yes" if tops[first] < tops[second] else "no"


def description(scene: Scene, question: str) -> str:
    if scene.writing:
        sort = "number" if scene.writing.text.isdigit() else "word"
        return f"the {sort} {scene.writing.text.lower()}"
    if scene.bars:
        return f"a bar chart with {len(scene.bars)} bars"
    if not scene.things:
        return "nothing that I know"
    ordered = sorted(scene.things, key=lambda thing: thing.x)
    text = question.lower()
    if "colours" in text or "colors" in text:
        phrases = list(dict.fromkeys(thing.colour for thing in ordered))
    elif "shapes" in text:
        phrases = list(dict.fromkeys(thing.shape for thing in ordered))
    else:
        phrases = [with_article(thing) for thing in ordered]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def compared(scenes: Sequence[Scene], question: str) -> str:
    text = question.lower()
    if said := NUMBERED.search(question):
        scene = scenes[int(said.group(1)) - 1]
        if scene.writing:
            return scene.writing.text
        if "how many" in text:
            return str(len(scene.things))
        if "colo" in text:
            return only(named(scene, question)).colour
        return with_article(only(scene.things))
    if "same" in text:
        facts = [only(scene.things).shape if "shape" in text else only(scene.things).colour for scene in scenes]
        return "yes" if len(set(facts)) == 1 else "no"
    if re.search(r"more|fewer|most|fewest", text):
        counts = [len(scene.things) for scene in scenes]
        wanted = max(counts) if re.search(r"more|most", text) else min(counts)
        return f"Image-{only_index([count == wanted for count in counts])}"
    if number := re.search(r"number (\d+)", text):
        return (
            f"Image-{only_index([bool(scene.writing and scene.writing.text == number.group(1)) for scene in scenes])}"
        )
    return f"Image-{only_index([bool(named(scene, question)) for scene in scenes])}"


def only_index(hits: Sequence[bool]) -> int:
    assert sum(hits) == 1, "the question is ambiguous"
    return list(hits).index(True) + 1


def happened(frames: Sequence[Scene], kind: Kind, question: str) -> str:
    if kind is Kind.FRAME:
        return in_frame(frames, question)
    first, last = frames[0], frames[-1]
    if len(first.things) != len(last.things):
        more, fewer, verb = (
            (first, last, "disappears") if len(first.things) > len(last.things) else (last, first, "appears")
        )
        (thing,) = [thing for thing in more.things if thing not in fewer.things]
        name = f"the {thing.colour} {thing.shape}" if verb == "disappears" else with_article(thing)
        return f"{name} {verb}"
    changed = [pair for pair in zip(first.things, last.things, strict=True) if pair[0] != pair[1]]
    if not changed:
        return "nothing"
    ((before, after),) = changed
    if before.colour != after.colour:
        return f"the {before.colour} {before.shape} turns {after.colour}"
    way = heading(before, after)
    if kind is Kind.DIRECTION:
        return way
    mover = f"the {before.colour} {before.shape}"
    return mover if re.search(r"what moves|which object|what is moving", question.lower()) else f"{mover} moves {way}"


def heading(before: Thing, after: Thing) -> str:
    dx, dy = after.x - before.x, after.y - before.y
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def in_frame(frames: Sequence[Scene], question: str) -> str:
    if said := NUMBERED.search(question):
        scene = frames[int(said.group(1)) - 1]
        return str(len(scene.things)) if "how many" in question.lower() else only(named(scene, question)).colour
    changes = [index for index in range(1, len(frames)) if frames[index].things != frames[index - 1].things]
    assert len(changes) == 1
    return f"Frame{changes[0] + 1}"


def followed_up(scenes: Sequence[Scene], dialogue: Dialogue) -> str | None:
    """Return the answer to a question that leans on the one before it."""
    last, before = dialogue[-1].question.lower(), dialogue[-2]
    if len(scenes) > 1 and re.search(r"picture|image|here|this one", last):
        return about(scenes[1], before.kind, before.question)
    if len(scenes) > 1:
        return happened(scenes, Kind.DIRECTION, last)
    scene = scenes[0]
    if scene.bars:
        return chart(scene, last)
    if scene.writing:
        return about_writing(scene, last)
    if re.search(r"\bit\b|its|where exactly", last):
        return about_it(scene, dialogue, last)
    return about(scene, before.kind, last) if before.kind is not Kind.COUNT else str(len(named(scene, last)))


def about_writing(scene: Scene, last: str) -> str:
    assert scene.writing
    if "colo" in last:
        return scene.writing.colour
    return place(scene, scene.writing.box) if "where" in last else digit(scene, last)


def about_it(scene: Scene, dialogue: Dialogue, last: str) -> str | None:
    openings = [turn for turn in dialogue[:-1] if turn.kind not in (Kind.FOLLOW_UP, Kind.GROUNDING)]
    thing = only(named(scene, openings[-1].question))
    if "colo" in last:
        return thing.colour
    return thing.shape if "shape" in last else place(scene, thing.box)


def text_of(scene: Scene, question: str) -> str:
    assert scene.writing
    return scene.writing.text.lower()


ONE_THING = {
    Kind.COLOUR: lambda scene, thing: thing.colour,
    Kind.SHAPE: lambda scene, thing: thing.shape,
    Kind.OBJECT: lambda scene, thing: with_article(thing),
    Kind.POSITION: lambda scene, thing: place(scene, thing.box),
}
OF_ALL = {
    Kind.COUNT: lambda scene, question: str(len(named(scene, question))),
    Kind.PRESENCE: presence,
    Kind.NUMBER: text_of,
    Kind.WORD: text_of,
    Kind.DIGIT: digit,
    Kind.CHART: chart,
    Kind.DESCRIBE: description,
}
