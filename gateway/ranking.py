"""Which of several candidates is the best: by a critic that scores their steps, else by log-probability."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import structlog

from gateway.dialogue import Dialogue
from gateway.events import Candidate, RankingMethod
from shared.critic import answer_score
from shared.errors import CriticUnavailable, InvalidRequest, NoCritic

log = structlog.get_logger()


class Critic(Protocol):
    """Scores answers step by step."""

    async def score(self, dialogue: Dialogue, answers: Sequence[str]) -> list[tuple[float, ...]]:
        """Return the scores, 0 to 1, of each answer's steps; every answer has at least one.

        Raises `CriticUnavailable`, `InvalidRequest` where the critic cannot read the dialogue, `DeadlineExceeded`.
        """


class Ranking:
    """Ranks candidates. Safe to share between calls."""

    def __init__(self, critic: Critic | None = None) -> None:
        self._critic = critic

    def check(self, method: RankingMethod) -> None:
        """Raise `NoCritic` where a critic is asked for and there is none."""
        if method is RankingMethod.CRITIC and self._critic is None:
            raise NoCritic("This server has no critic; rank by log-probability.")

    async def rank(
        self, method: RankingMethod, dialogue: Dialogue, candidates: Sequence[Candidate]
    ) -> tuple[Candidate, ...]:
        """Return the candidates with what they are ranked by; a single one is scored only where that is asked for.

        Raises what the critic raises where it was asked for by name; otherwise log-probability takes its place.
        """
        is_wanted = method is RankingMethod.CRITIC or (method is RankingMethod.UNSPECIFIED and len(candidates) > 1)
        if self._critic is not None and is_wanted:
            try:
                return await self._scored(self._critic, dialogue, candidates)
            except (CriticUnavailable, InvalidRequest) as error:
                if method is RankingMethod.CRITIC:
                    raise
                log.warning("ranked_without_critic", reason=error.reason, candidates=len(candidates))
        return tuple(replace(candidate, score=candidate.result.mean_logprob) for candidate in candidates)

    async def _scored(
        self, critic: Critic, dialogue: Dialogue, candidates: Sequence[Candidate]
    ) -> tuple[Candidate, ...]:
        scores = await critic.score(dialogue, [candidate.text for candidate in candidates])
        return tuple(
            replace(candidate, step_scores=steps, score=answer_score(steps))
            for candidate, steps in zip(candidates, scores, strict=True)
        )


def best_of(candidates: Sequence[Candidate]) -> int:
    """Return the index of the candidate with the highest score, the first of equals."""
    return max(range(len(candidates)), key=lambda index: candidates[index].score)
