"""Dialogues that are longer than their context."""

from dataclasses import replace

import pytest

from llm_service.fitting import fitted
from llm_service.prompt.dialogue import Dialogue, Role, TextSegment, Tool, ToolCallSegment, Turn
from llm_service.prompt.splice import PromptTokens
from shared.errors import PromptTooLong


def user(text: str) -> Turn:
    return Turn(Role.USER, (TextSegment(text),))


def model(text: str) -> Turn:
    return Turn(Role.ASSISTANT, (TextSegment(text),))


def dialogue_of(num_turns: int, length: int = 10) -> Dialogue:
    """Turns of `length` characters each side; the last is a question only."""
    turns = [side(str(number % 10) * length) for number in range(num_turns) for side in (user, model)]
    return Dialogue(tuple(turns[:-1]), "S" * length)


class CharacterWriter:
    """A token per character. What has more than `refused_above` is refused as a whole."""

    def __init__(self, refused_above: int = 10**9) -> None:
        self.refused_above = refused_above
        self.calls = 0

    async def tokenize(self, dialogue: Dialogue) -> PromptTokens:
        self.calls += 1
        if dialogue.num_characters > self.refused_above:
            raise PromptTooLong("Too long.", field="prompt")
        return PromptTokens(tuple(range(dialogue.num_characters)))


async def test_what_fits_is_left_whole_and_written_once() -> None:
    writer, dialogue = CharacterWriter(), dialogue_of(3)
    left = await fitted(dialogue, writer.tokenize, dialogue.num_characters)
    assert (left.dialogue, left.num_dropped, writer.calls) == (dialogue, 0, 1)


@pytest.mark.parametrize("refused_above", [10**9, 400])
@pytest.mark.parametrize("most", [*range(20, 245, 7), 239, 240, 241])
async def test_as_few_turns_go_as_must(most: int, refused_above: int) -> None:
    dialogue = dialogue_of(60)
    left = await fitted(dialogue, CharacterWriter(refused_above).tokenize, most)
    assert left.dialogue.num_characters <= most
    one_more = replace(dialogue, turns=dialogue.turns[2 * (left.num_dropped - 1) :])
    assert one_more.num_characters > most
    assert (left.dialogue.turns[0].role, left.dialogue.turns[-1]) == (Role.USER, dialogue.turns[-1])
    assert left.dialogue.system_message == dialogue.system_message


async def test_a_long_dialogue_is_written_a_few_times_only() -> None:
    writer = CharacterWriter()
    await fitted(dialogue_of(1000), writer.tokenize, 5000)
    assert writer.calls <= 12


async def test_the_last_turn_stays_even_where_it_leaves_less_room_than_wished() -> None:
    left = await fitted(dialogue_of(4), CharacterWriter().tokenize, 5)
    assert (left.num_dropped, len(left.dialogue.turns)) == (3, 1)


async def test_what_a_last_turn_alone_is_too_long_for_is_said() -> None:
    with pytest.raises(PromptTooLong):
        await fitted(dialogue_of(4), CharacterWriter(refused_above=15).tokenize, 5)


async def test_results_of_tools_go_and_stay_with_the_question_that_they_answer() -> None:
    call = Turn(Role.ASSISTANT, (ToolCallSegment("f", "{}"),))
    result = Turn(Role.TOOL, (TextSegment("r" * 10),))
    dialogue = Dialogue((user("a" * 10), call, result, model("b"), user("c"), call, result), None, (Tool("f"),))
    left = await fitted(dialogue, CharacterWriter().tokenize, 15)
    assert (left.num_dropped, left.dialogue.turns) == (1, dialogue.turns[4:])
