"""A workload: how many questions of which size are asked, and how many at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Self

_LEAST: Final[Mapping[str, int]] = {
    "prompt_tokens": 1,
    "output_tokens": 1,
    "pictures": 0,
    "dialogues": 1,
    "concurrency": 0,
    "turns": 1,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What one round asks. Raises `ValueError` for what cannot be asked.

    A round has `dialogues`, each of `turns` questions of about `prompt_tokens` tokens of text; the first question of a
    dialogue carries `pictures` of `picture_size` (width, height). Every answer has `output_tokens`. The pictures of a
    round are new ones and differ, unless they are the `same_pictures` in all its dialogues; `asked_before` has them
    asked about once before anything is measured. `concurrency` dialogues run at a time, 0 is all of them; or they begin
    at random moments, `rate_per_s` of them in a second.
    """

    name: str = "custom"
    prompt_tokens: int = 32
    output_tokens: int = 64
    pictures: int = 0
    picture_size: tuple[int, int] = (448, 448)
    same_pictures: bool = False
    asked_before: bool = False
    dialogues: int = 1
    concurrency: int = 0
    rate_per_s: float = 0.0
    turns: int = 1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} has to be a whole number of at least {least}, not {value!r}.")
        if len(self.picture_size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.picture_size):
            raise ValueError(f"picture_size has to be a width and a height in pixels, not {self.picture_size!r}.")
        if not self.rate_per_s >= 0:
            raise ValueError(f"rate_per_s has to be 0 or more, not {self.rate_per_s!r}.")
        if self.rate_per_s and self.concurrency:
            raise ValueError("Give concurrency or rate_per_s, not both.")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the workload that a JSON object describes by this class's names; raise `ValueError`."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(content) - names):
            raise ValueError(f"Unknown: {', '.join(unknown)}. A workload has {', '.join(sorted(names))}.")
        given = dict(content)
        if isinstance(given.get("picture_size"), list):
            given["picture_size"] = tuple(given["picture_size"])
        try:
            return cls(**given)
        except TypeError:
            raise ValueError("A value has the wrong type.") from None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self) | {"picture_size": list(self.picture_size)}

    def with_output_tokens(self, count: int) -> Self:
        """Return the same with answers of another length."""
        return replace(self, output_tokens=count)
