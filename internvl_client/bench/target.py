"""Whom questions are put to: what every server looks like to a measurement."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from internvl_client.bench.exchange import Exchange
from internvl_client.bench.questions import Question


class TargetError(Exception):
    """A question got no answer; the message says why, in one line."""


OnText = Callable[[], object]


class AskedDialogue(Protocol):
    """A dialogue in progress. One question at a time."""

    async def ask(self, question: Question, num_output_tokens: int, on_text: OnText = lambda: None) -> Exchange:
        """Return how one more question was answered, in exactly so many tokens; raise `TargetError`.

        `on_text` is called for every piece of text as it comes.
        """


class Target(Protocol):
    """A server that answers dialogues, any number at a time. For the tasks of one event loop."""

    @property
    def name(self) -> str:
        """What the figures are headed with."""

    def dialogue(self, num_turns: int) -> AbstractAsyncContextManager[AskedDialogue]:
        """Begin a dialogue of so many questions."""
