"""Has a critic score answers step by step: another model behind a vision and an LLM service of its own."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import structlog

from gateway.content import Medium, Role, ToolCall
from gateway.dialogue import Dialogue
from gateway.encoder import MediaEncoder, all_or_first_error
from gateway.events import Encoded
from gateway.prompt import (
    EmbeddingHandle,
    Prompt,
    Segment,
    TextSegment,
    Turn,
    VisualSegment,
    joined_text,
    segments_of,
)
from shared.critic import CHOICES, SYSTEM_MESSAGE, critic_turns, solution_steps
from shared.errors import (
    CriticUnavailable,
    DeadlineExceeded,
    EmbeddingIncompatible,
    EmbeddingNotFound,
    InvalidRequest,
    ServiceError,
)

log = structlog.get_logger()
Scores: TypeAlias = list[tuple[float, ...]]


class Scorer(Protocol):
    """The LLM service of the critic."""

    async def score_turns(self, prompt: Prompt, choices: Sequence[str]) -> Scores:
        """Return the probability of each choice at each turn of the model's, the one to come included.

        Raises what the service answers, `LlmUnavailable` when it cannot be reached.
        """


class StepCritic:
    """A critic that reads the same media as the model, through a vision service of its own. Safe to share."""

    def __init__(self, scorer: Scorer, encoder: MediaEncoder) -> None:
        self._scorer = scorer
        self._encoder = encoder

    async def score(self, dialogue: Dialogue, answers: Sequence[str]) -> Scores:
        """Return the scores, 0 to 1, of each answer's steps; every answer has at least one.

        Raises `CriticUnavailable`, `InvalidRequest` where the critic cannot read the dialogue, `DeadlineExceeded`.
        """
        try:
            return await self._scores(dialogue, answers)
        except DeadlineExceeded:
            raise
        except InvalidRequest as error:
            raise type(error)(f"The critic cannot read this: {error.message}", field="messages") from error
        except ServiceError as error:
            log.warning("critic_failed", reason=error.reason)
            raise CriticUnavailable(
                "The critic that ranks candidates cannot be reached; try again.", retry_after_s=1.0
            ) from error

    async def _scores(self, dialogue: Dialogue, answers: Sequence[str]) -> Scores:
        encoded = await self._encoder.encode(dialogue.placed_media)
        try:
            return await self._scored(dialogue, answers, encoded)
        except (EmbeddingNotFound, EmbeddingIncompatible):
            encoded = await self._encoder.encode_again(dialogue.placed_media)
            return await self._scored(dialogue, answers, encoded)

    async def _scored(self, dialogue: Dialogue, answers: Sequence[str], encoded: Mapping[Medium, Encoded]) -> Scores:
        question = question_of(dialogue, {medium: each.handle for medium, each in encoded.items()})
        return await all_or_first_error([self._score_steps(question, solution_steps(answer)) for answer in answers])

    async def _score_steps(self, question: Sequence[str | VisualSegment], steps: Sequence[str]) -> tuple[float, ...]:
        probabilities = await self._scorer.score_turns(critic_prompt(question, steps), CHOICES)
        if len(probabilities) != len(steps):
            raise CriticUnavailable("The critic did not judge every step.")
        return tuple(turn[0] for turn in probabilities)


def question_of(dialogue: Dialogue, handles: Mapping[Medium, EmbeddingHandle]) -> tuple[str | VisualSegment, ...]:
    """Return what the critic reads as the question: all that was said, oldest first, blank lines between.

    A critic is trained on single questions. In a longer dialogue the last message alone would be half of one, and the
    media of earlier messages would not be seen.
    """
    segments: list[Segment] = []
    for message in dialogue.messages:
        between = (TextSegment("\n\n"),) if segments else ()
        segments += (*between, *segments_of(message.parts, handles))
    return tuple(_plain(segments))


def critic_prompt(question: Sequence[str | VisualSegment], steps: Sequence[str]) -> Prompt:
    """Return the dialogue in which a critic judges each of `steps`."""
    turns = (
        Turn(Role.ASSISTANT if turn.is_critic else Role.USER, tuple(joined_text(map(_segment, turn.parts))))
        for turn in critic_turns(question, steps)
    )
    return Prompt(SYSTEM_MESSAGE, tuple(turns))


def _plain(segments: Sequence[Segment]) -> Iterator[str | VisualSegment]:
    for segment in segments:
        match segment:
            case TextSegment():
                yield segment.text
            case ToolCall():
                yield f"{segment.name}({segment.arguments_json})"
            case VisualSegment():
                yield segment


def _segment(part: str | VisualSegment) -> Segment:
    return TextSegment(part) if isinstance(part, str) else part
