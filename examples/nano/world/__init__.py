"""The synthetic world: scenes with exact knowledge of what is in them, their pictures, and questions with answers."""

from examples.nano.world.collage import Collage, collage
from examples.nano.world.config import EASY, FULL, WorldConfig
from examples.nano.world.dialogue import Dialogue, Kind, Medium, Part, Shown, Situation, Turn
from examples.nano.world.drawing import draw
from examples.nano.world.scene import Bar, Scene, Thing, Writing
from examples.nano.world.world import held_out, situation, texts

__all__ = [
    "EASY",
    "FULL",
    "Bar",
    "Collage",
    "Dialogue",
    "Kind",
    "Medium",
    "Part",
    "Scene",
    "Shown",
    "Situation",
    "Thing",
    "Turn",
    "WorldConfig",
    "Writing",
    "collage",
    "draw",
    "held_out",
    "situation",
    "texts",
]
