"""A target that answers as a test says, without a server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from internvl_client.bench import Exchange, Question, TargetError
from internvl_client.bench.target import OnText

Answer = Callable[[Question], Exchange]


class FakeTarget:
    """Answers each question with what `answer` returns or raises; keeps what it was asked, dialogue by dialogue.

    `most_at_once` is how many dialogues were in progress at a time.
    """

    name = "fake"

    def __init__(self, answer: Answer | None = None) -> None:
        self.dialogues: list[list[Question]] = []
        self.most_at_once = 0
        self._answer = answer or (lambda question: exchange(1.0))
        self._at_once = 0

    @asynccontextmanager
    async def dialogue(self, num_turns: int) -> AsyncIterator["FakeDialogue"]:
        asked: list[Question] = []
        self.dialogues.append(asked)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield FakeDialogue(asked, self._answer)
        finally:
            self._at_once -= 1

    @property
    def asked(self) -> list[Question]:
        return [question for dialogue in self.dialogues for question in dialogue]


class FakeDialogue:
    def __init__(self, asked: list[Question], answer: Answer) -> None:
        self._asked = asked
        self._answer = answer

    async def ask(self, question: Question, num_output_tokens: int, on_text: OnText = lambda: None) -> Exchange:
        self._asked.append(question)
        await asyncio.sleep(0)  # others come in between
        return self._answer(question)


def exchange(*piece_times_s: float, num_output_tokens: int | None = None, num_prompt_tokens: int = 9) -> Exchange:
    count = len(piece_times_s) if num_output_tokens is None else num_output_tokens
    return Exchange(piece_times_s, max(piece_times_s, default=0.0), count, num_prompt_tokens)


def refuse(question: Question) -> Exchange:
    raise TargetError("nobody is there")
