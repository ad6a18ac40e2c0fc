"""Situation `index` of seed `seed`: pictures and dialogues about them, always the same."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TypeVar

from examples.nano.world import clips, comparing, compose, followups, questions, reading, talk, wording
from examples.nano.world.chance import Rng, chance, generator, pick, shuffled, weighted
from examples.nano.world.config import FULL, SituationWeights, WorldConfig
from examples.nano.world.dialogue import Dialogue, Kind, Medium, Part, Shown, Situation
from examples.nano.world.scene import Scene

MAX_DIALOGUES = 10
_MAX_CHAIN = 8
_FOLLOW_UP_SHARE, _TALK_SHARE = 0.2, 0.05
_SORTS = tuple(field.name for field in fields(SituationWeights))
_LEADS = ("", "", "", "", "Look at this picture: ", "Here is a picture. ")
MadeT = TypeVar("MadeT")


def situation(seed: int, index: int, config: WorldConfig = FULL) -> Situation:
    """Return the situation with this number, up to `MAX_DIALOGUES` dialogues."""
    rng = generator(seed, index)
    sort = _SORTS[weighted(rng, [getattr(config.weights, name) for name in _SORTS])]
    while not (found := _BUILDERS[sort](rng, config)).dialogues:
        pass  # nothing can be asked about these pictures without doubt: draw others
    system_message = pick(rng, wording.SYSTEM_MESSAGES) if chance(rng, 0.1) else None
    return replace(found, system_message=system_message)


def held_out(seed: int, count: int, config: WorldConfig = FULL) -> Iterator[Situation]:
    """Yield `count` situations of one dialogue each, such that no kind of last question starves."""
    seen: Counter[Kind] = Counter()
    for index in range(count):
        whole = situation(seed, index, config)
        rarest = min(whole.dialogues, key=lambda dialogue: seen[dialogue[-1].kind])
        seen[rarest[-1].kind] += 1
        yield replace(whole, dialogues=(rarest,))


def texts(seed: int, count: int, config: WorldConfig = FULL) -> Iterator[str]:
    """Yield every text of `count` situations: questions, answers, system messages."""
    yield wording.SYSTEM_MESSAGE
    yield from wording.SYSTEM_MESSAGES
    for index in range(count):
        for dialogue in situation(seed, index, config).dialogues:
            for turn in dialogue:
                yield from (part for part in turn.parts if isinstance(part, str))
                yield turn.answer


def _shapes(rng: Rng, config: WorldConfig) -> Situation:
    scene = compose.shapes_scene(rng, config, compose.canvas(rng, config))
    return _of_one_picture(rng, config, scene, questions.MAKERS, followups.SHAPE_MAKERS)


def _number(rng: Rng, config: WorldConfig) -> Situation:
    scene = compose.number_scene(rng, config, compose.canvas(rng, config))
    return _of_one_picture(rng, config, scene, reading.WRITING_MAKERS, followups.WRITING_MAKERS)


def _word(rng: Rng, config: WorldConfig) -> Situation:
    scene = compose.word_scene(rng, config, compose.canvas(rng, config))
    return _of_one_picture(rng, config, scene, reading.WRITING_MAKERS, followups.WRITING_MAKERS)


def _chart(rng: Rng, config: WorldConfig) -> Situation:
    scene = compose.chart_scene(rng, config, compose.canvas(rng, config))
    return _of_one_picture(rng, config, scene, reading.CHART_MAKERS, followups.CHART_MAKERS)


def _nothing(rng: Rng, config: WorldConfig) -> Situation:
    if chance(rng, 0.5):
        turns = [pick(rng, (talk.small_talk, talk.without_picture))(rng) for _ in range(MAX_DIALOGUES)]
        return Situation((), _distinct([(turn,) for turn in turns]))
    scene = compose.nothing_scene(rng, compose.canvas(rng, config))
    return _of_one_picture(rng, config, scene, reading.NOTHING_MAKERS, ())


def _compare(rng: Rng, config: WorldConfig) -> Situation:
    number = 2 if chance(rng, 0.8) else 3
    combined = chance(rng, 0.25)
    scenes = _compared_scenes(rng, config, number, large_share=0.0 if number == 3 or combined else 0.25)
    media = tuple(Medium(scene, 1 if combined or chance(rng, 0.3) else None) for scene in scenes)
    shown = range(len(scenes))
    if combined:
        lead: tuple[Part, ...] = (Shown(tuple(shown)),)
    elif chance(rng, 0.75):
        lead = tuple(part for index in shown for part in (f"{_break(index)}Image-{index + 1}: ", Shown((index,))))
    else:
        lead = tuple(part for index in shown for part in (_break(index), Shown((index,))) if part)
    found = [_made(rng, comparing.MAKERS, scenes, config) for _ in range(3 * MAX_DIALOGUES)]
    dialogues = [(turn,) for turn in found if turn is not None]
    return Situation(media, _begun_with(lead, dialogues, rng, config))


def _clip(rng: Rng, config: WorldConfig) -> Situation:
    clip = compose.clip(rng, config, compose.canvas(rng, config, large_share=0.15))
    media = tuple(Medium(frame, 1) for frame in clip.frames)
    lead = tuple(
        part for index in range(len(media)) for part in (f"{_break(index)}{clips.frame(index)}: ", Shown((index,)))
    )
    found = [_made(rng, clips.MAKERS, clip) for _ in range(2 * MAX_DIALOGUES)]
    return Situation(media, _begun_with(lead, [dialogue for dialogue in found if dialogue is not None], rng, config))


def _other_picture(rng: Rng, config: WorldConfig) -> Situation:
    scenes = _compared_scenes(rng, replace(config, max_digits=0), 2, large_share=0.2)
    found = [followups.of_another_picture(rng, scenes[0], scenes[1], Shown((1,))) for _ in range(MAX_DIALOGUES)]
    distinct = _distinct([dialogue for dialogue in found if dialogue is not None])
    dialogues = tuple(_led(dialogue, (Shown((0,)),)) for dialogue in distinct)
    return Situation((Medium(scenes[0]), Medium(scenes[1])), dialogues)


_BUILDERS: dict[str, Callable[[Rng, WorldConfig], Situation]] = {
    "shapes": _shapes,
    "number": _number,
    "word": _word,
    "chart": _chart,
    "nothing": _nothing,
    "compare": _compare,
    "clip": _clip,
    "other_picture": _other_picture,
}


def _of_one_picture(
    rng: Rng,
    config: WorldConfig,
    scene: Scene,
    makers: Sequence[tuple[questions.Maker, float]],
    dialogue_makers: Sequence[tuple[followups.DialogueMaker, float]],
) -> Situation:
    dialogues: list[Dialogue] = []
    for _ in range(2 * MAX_DIALOGUES):
        if chance(rng, _TALK_SHARE):
            dialogues.append((talk.refusal(rng) if chance(rng, 0.7) else talk.small_talk(rng),))
        elif dialogue_makers and chance(rng, _FOLLOW_UP_SHARE):
            found = _made(rng, dialogue_makers, scene, config)
            dialogues += [found] if found else []
        else:
            turn = _made(rng, makers, scene, config)
            dialogues += [(turn,)] if turn else []
    lead = (pick(rng, _LEADS), Shown((0,)))
    max_tiles = 1 if chance(rng, 0.06) else None
    return Situation((Medium(scene, max_tiles),), _begun_with(lead, dialogues, rng, config))


def _compared_scenes(rng: Rng, config: WorldConfig, number: int, *, large_share: float) -> list[Scene]:
    """Return scenes worth comparing: all numbers, or all things, often alike in part."""
    canvases = [compose.canvas(rng, config, large_share=large_share) for _ in range(number)]
    if config.max_digits and chance(rng, 0.3):
        return [compose.number_scene(rng, config, canvas) for canvas in canvases]
    most = 1 if chance(rng, 0.5) else 3
    few = replace(config, shapes=tuple(shuffled(rng, config.shapes)[:3]), max_things=min(most, config.max_things))
    return [compose.shapes_scene(rng, few, canvas) for canvas in canvases]


def _made(rng: Rng, makers: Sequence[tuple[Callable[..., MadeT | None], float]], *about: object) -> MadeT | None:
    index = weighted(rng, [weight for _, weight in makers])
    return makers[index][0](rng, *about)


def _begun_with(
    lead: Sequence[Part], dialogues: Sequence[Dialogue], rng: Rng, config: WorldConfig
) -> tuple[Dialogue, ...]:
    """Return the dialogues, each with the pictures first; sometimes all of them as one long dialogue."""
    distinct = _distinct(dialogues)
    if chance(rng, config.chain_share):
        distinct = (tuple(turn for dialogue in distinct for turn in dialogue)[:_MAX_CHAIN],)
    return tuple(_led(dialogue, lead) for dialogue in distinct)


def _led(dialogue: Dialogue, lead: Sequence[Part]) -> Dialogue:
    return (dialogue[0].after(*(part for part in lead if part)), *dialogue[1:])


def _distinct(dialogues: Sequence[Dialogue]) -> tuple[Dialogue, ...]:
    """Return the dialogues without those that ask the same twice, `MAX_DIALOGUES` at most."""
    by_questions = {tuple(turn.question for turn in dialogue): dialogue for dialogue in dialogues}
    return tuple(by_questions.values())[:MAX_DIALOGUES]


def _break(index: int) -> str:
    return "\n" if index else ""
