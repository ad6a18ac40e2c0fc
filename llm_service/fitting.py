"""Leaves a dialogue's oldest turns out where the context does not hold them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from llm_service.prompt.dialogue import Dialogue, Role
from llm_service.prompt.splice import PromptTokens
from shared.errors import PromptTooLong


@dataclass(frozen=True, slots=True)
class Fitted:
    """What is left of a dialogue, its prompt, and how many of its oldest turns were left out."""

    dialogue: Dialogue
    prompt: PromptTokens
    num_dropped: int = 0


async def fitted(
    dialogue: Dialogue, tokenize: Callable[[Dialogue], Awaitable[PromptTokens]], most_tokens: int
) -> Fitted:
    """Return the dialogue without its oldest turns, as few as must go for its prompt to have at most `most_tokens`.

    A turn is a user's and all that follows it until the user's next one. The last one stays, even where it alone has
    more tokens. Raises what `tokenize` raises; `PromptTooLong` only of the last turn alone.
    """
    starts = [index for index, turn in enumerate(dialogue.turns) if turn.role is Role.USER]

    async def without(count: int) -> Fitted:
        left = replace(dialogue, turns=dialogue.turns[starts[count] :])
        return Fitted(left, await tokenize(left), count)

    async def within(count: int) -> Fitted | None:
        try:
            made = await without(count)
        except PromptTooLong:
            return None
        return made if len(made.prompt.ids) <= most_tokens else None

    if whole := await within(0):
        return whole
    # The more is left out the shorter the prompt, so the least that has to go is found by halving.
    too_few, best = 0, await without(len(starts) - 1)
    while best.num_dropped - too_few > 1:
        middle = (too_few + best.num_dropped) // 2
        if shorter := await within(middle):
            best = shorter
        else:
            too_few = middle
    return best
