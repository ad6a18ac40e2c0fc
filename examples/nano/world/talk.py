"""Small talk, and questions that the model has to decline."""

from examples.nano.world import wording
from examples.nano.world.chance import Rng, chance, pick
from examples.nano.world.dialogue import Kind, Turn
from examples.nano.world.wording import Wordings, ask


def small_talk(rng: Rng) -> Turn:
    """Say something that needs no picture."""
    wordings, answer = pick(rng, wording.SMALL_TALK)
    return _turn(rng, wordings, answer, Kind.TALK)


def refusal(rng: Rng) -> Turn:
    """Ask something about a picture that is outside the world."""
    return _turn(rng, wording.REFUSALS, wording.CANNOT_SEE, Kind.REFUSAL)


def without_picture(rng: Rng) -> Turn:
    """Ask something of general knowledge, or about a picture that is not there."""
    if chance(rng, 0.5):
        return _turn(rng, wording.UNKNOWN, wording.DO_NOT_KNOW, Kind.REFUSAL)
    wordings = pick(rng, (wording.DESCRIBE, wording.NUMBER, wording.SHAPE_ALONE))
    return _turn(rng, wordings, wording.NO_PICTURE, Kind.REFUSAL)


def _turn(rng: Rng, wordings: Wordings, answer: str, kind: Kind) -> Turn:
    return Turn((ask(rng, wordings),), answer, kind)
