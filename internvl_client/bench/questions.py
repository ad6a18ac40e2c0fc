"""What a round asks: questions of known length about pictures that are new, drawn from a seed."""

import random
from dataclasses import dataclass
from typing import Final

from internvl_client.bench.pictures import draw_picture
from internvl_client.bench.workload import Workload

_TEXT: Final = (
    "please describe what you can see in this picture and list every object with colour size position and a short "
    "reason for your answer then say which of them is the first the last the left and the right one"
)
_WORDS: Final = tuple(_TEXT.split())
_WORDS_PER_TOKEN: Final = 0.75  # of ordinary English; `calibrate` measures it for a model


@dataclass(frozen=True, slots=True)
class Question:
    """What a turn says: pictures (encoded files), then text."""

    text: str
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class TextLength:
    """How long a text has to be for a number of tokens."""

    words_per_token: float = _WORDS_PER_TOKEN

    def num_words(self, num_tokens: int) -> int:
        """Return how many words have about `num_tokens` tokens."""
        return max(1, round(num_tokens * self.words_per_token))


ORDINARY: Final = TextLength()


def text_of(num_words: int, seed: str) -> str:
    """Return a text of so many words; what it says differs from its first words on, so that no cache knows it."""
    return " ".join(random.Random(seed).choices(_WORDS, k=num_words))  # noqa: S311  nothing is secret here


def questions_of(
    workload: Workload, seed: int, round_index: int, length: TextLength = ORDINARY
) -> tuple[tuple[Question, ...], ...]:
    """Return a round's dialogues, each the questions of its turns. No two rounds share a picture or a text."""
    base = f"{workload.name}:{seed}:{round_index}"
    return tuple(_dialogue(workload, base, index, length) for index in range(workload.dialogues))


def questions_before(
    workload: Workload, seed: int, round_index: int, length: TextLength = ORDINARY
) -> tuple[tuple[Question, ...], ...]:
    """Return the dialogues to ask before a round: each of its pictures once, where the workload wants that."""
    if not workload.asked_before:
        return ()
    asked = questions_of(workload, seed, round_index, length)
    seen = dict.fromkeys(dialogue[0].pictures for dialogue in asked)
    return tuple((Question(f"{text_of(4, f'before:{seed}')} {index}", each),) for index, each in enumerate(seen))


def _dialogue(workload: Workload, base: str, index: int, length: TextLength) -> tuple[Question, ...]:
    owner = "all" if workload.same_pictures else str(index)
    pictures = tuple(
        draw_picture(*workload.picture_size, f"{base}:{owner}:{number}") for number in range(workload.pictures)
    )
    num_words = length.num_words(workload.prompt_tokens)
    return tuple(
        Question(text_of(num_words, f"{base}:{index}:{turn}"), pictures if turn == 0 else ())
        for turn in range(workload.turns)
    )
