"""Everything that the world has names for."""

from collections.abc import Mapping
from typing import Final

Rgb = tuple[int, int, int]

COLOURS: Final[Mapping[str, Rgb]] = {
    "red": (214, 38, 38),
    "orange": (247, 138, 24),
    "yellow": (246, 218, 44),
    "green": (44, 150, 60),
    "blue": (40, 84, 208),
    "purple": (132, 52, 172),
    "pink": (246, 142, 188),
    "brown": (122, 74, 38),
    "black": (22, 22, 22),
    "white": (246, 246, 246),
}
SHAPES: Final = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
PLURALS: Final[Mapping[str, str]] = {"cross": "crosses"}
# Rows, then columns: the nine places of a picture.
PLACES: Final = (
    ("top left", "top middle", "top right"),
    ("middle left", "middle", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)
DIRECTIONS: Final[Mapping[str, tuple[int, int]]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# No word names a colour, a shape or a number.
WORDS: Final = (
    *("air", "ant", "apple", "arm", "bag", "ball", "bank", "bath", "bed", "bee", "bell", "bird", "boat", "book"),
    *("boy", "bread", "bus", "cake", "cap", "car", "cat", "chair", "city", "coat", "cow", "cup", "day", "dog"),
    *("door", "duck", "ear", "egg", "eye", "farm", "fire", "fish", "flag", "food", "fox", "game", "gate", "girl"),
    *("gold", "hand", "hat", "hill", "home", "horse", "ice", "jam", "key", "king", "lake", "lamp", "leaf", "lion"),
    *("map", "milk", "moon", "mouse", "nest", "nose", "park", "pen", "pig", "rain", "road", "room", "salt", "sea"),
    *("ship", "shoe", "sky", "snow", "soup", "sun", "tea", "town", "train", "tree", "wind", "wolf", "zoo"),
)


def plural(noun: str) -> str:
    """Return the plural of a shape's name."""
    return PLURALS.get(noun, f"{noun}s")


def all_places() -> tuple[str, ...]:
    """Return the nine places, row by row."""
    return tuple(place for row in PLACES for place in row)
