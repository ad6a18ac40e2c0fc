"""What `internvl demo` asks: about the pictures drawn for it, or about one of the user's."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from internvl_client.cli_session import ChatSession
from internvl_client.client import Client
from internvl_client.content import Image, Part

_REPOSITORY: Final = Path(__file__).parents[2]
NANO: Final = _REPOSITORY / "examples/nano/internvl-nano"
# Random weights: what is said is nonsense, the way it takes is the real one.
_UNTRAINED: Final = _REPOSITORY / "tests/golden/checkpoints/internvl3-8b-tiny"
DEFAULT_MODEL: Final = NANO if (NANO / "model.safetensors").is_file() else _UNTRAINED
_PICTURES: Final = _REPOSITORY / "examples/nano/pictures"
_QUESTIONS: Final = ("What is in the picture?", "Which colours do you see?")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Pictures, each after its label, and questions about them; the answers that are right, where they are known."""

    pictures: tuple[Path, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...] = ()
    label: str = ""
    max_tiles: int | None = None

    def lead(self, session: ChatSession) -> Iterator[Part]:
        """Yield what goes before the first question."""
        for number, picture in enumerate(self.pictures, start=1):
            if self.label:
                yield self.label.format(number)
            yield session.open(picture, self.max_tiles)


def of_picture(picture: Path) -> list[Dialogue]:
    """Return what is asked about a picture that nobody knows."""
    return [Dialogue((picture,), _QUESTIONS)]


def of_drawn_pictures(*, answered: bool) -> list[Dialogue]:
    """Return the dialogues about the pictures that were drawn for the demo.

    The right answers are worded as InternVL-nano words them; another model cannot be held to that, so `answered` is for
    InternVL-nano only.
    """
    return [
        Dialogue(
            pictures=tuple(_PICTURES / name for name in entry["pictures"]),
            questions=tuple(turn["question"] for turn in entry["dialogue"]),
            answers=tuple(turn["answer"] for turn in entry["dialogue"]) if answered else (),
            label=entry["label"],
            max_tiles=entry["max_tiles"],
        )
        for entry in json.loads((_PICTURES / "questions.json").read_text(encoding="utf-8"))
    ]


def show(console: Console, client: Client, session: ChatSession, dialogues: list[Dialogue]) -> None:
    """Ask everything, each dialogue as a conversation of its own, and say how many answers were right."""
    right = asked = 0
    for dialogue in dialogues:
        console.print(f"\n[{', '.join(picture.name for picture in dialogue.pictures)}]", style="bold")
        conversation = client.create_conversation()
        lead = list(dialogue.lead(session))
        if console.is_terminal:
            for picture in lead:
                if isinstance(picture, Image):
                    session.show_medium(picture)
        for number, question in enumerate(dialogue.questions):
            console.print(f"> {question}", style="bold")
            answer = session.ask(conversation, *(lead if number == 0 else ()), question)
            if dialogue.answers:
                asked += 1
                right += answer.text == dialogue.answers[number]
        conversation.delete()
    if asked:
        console.print(f"\n{right} of {asked} answers are what the pictures show.")
