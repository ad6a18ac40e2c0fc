"""How a critic is asked about an answer: the answer's steps, and the dialogue in which each step is judged.

The critic is a model trained as VisualPRM is. It reads the question and the first step, then step after step, and says
`+` or `-` to each; how likely `+` is, among the two, is the step's score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

CHOICES: Final = ("+", "-")
MAX_STEPS: Final = 12
SYSTEM_MESSAGE: Final = (
    "You are an advanced AI assistant, designed to serve as a process supervision model. In this task, I will provide "
    "a problem statement followed by the first step of the solution process. For each subsequent turn, I will give you "
    "a new step in the solution. Your role is to assess whether the solution process is correct up to the current "
    "step.\n\n"
    "- In the **first round**, I will input the problem and the first step of the solution process.\n"
    "- In **each subsequent round**, I will provide the next step in the solution.\n\n"
    "For each step, you should:\n\n"
    '- Respond with **"+"** if you believe the solution process is correct up to this step.\n'
    '- Respond with **"-"** if you detect any issues or errors in the process up to this step.\n\n'
    "Please note:\n"
    '- Only respond with **"+"** or **"-"**. Do not provide any additional explanations, comments, or justifications.'
    "\n\nYour task is to verify the accuracy and correctness of each step in the given solution process."
)

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class CriticTurn(Generic[Part]):
    """One turn of the dialogue: text and whatever stands for media, in reading order; or one sign of the critic's."""

    is_critic: bool
    parts: tuple[str | Part, ...]


def solution_steps(answer: str) -> tuple[str, ...]:
    """Return an answer's steps, at least one and at most `MAX_STEPS`: its parts between blank lines.

    Where there are more, each step is several neighbouring parts, equally many but for the last step.
    """
    parts = [part.strip() for part in answer.split("\n\n") if part.strip()] or [answer]
    size = -(-len(parts) // MAX_STEPS)
    return tuple("\n\n".join(parts[start : start + size]) for start in range(0, len(parts), size))


def critic_turns(question: Sequence[str | Part], steps: Sequence[str]) -> tuple[CriticTurn[Part], ...]:
    """Return the dialogue that ends where the critic judges the last step; `question` is what the user asked.

    The judgement of every earlier step is taken to be `+`, so that one reading of the dialogue judges all of them.
    """
    assert steps
    first = ("### Question:\n", *question, f"\n\n### Solution Process:\n{steps[0]}")
    turns: list[CriticTurn[Part]] = [CriticTurn(is_critic=False, parts=first)]
    for step in steps[1:]:
        turns += [CriticTurn(is_critic=True, parts=(CHOICES[0],)), CriticTurn(is_critic=False, parts=(step,))]
    return tuple(turns)


def answer_score(step_scores: Sequence[float]) -> float:
    """Return the score of an answer, 0 to 1: the mean of its steps'."""
    return sum(step_scores) / len(step_scores)
