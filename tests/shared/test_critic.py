"""How an answer is laid out for a critic: its steps, and the turns in which they are judged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.critic import MAX_STEPS, CriticTurn, answer_score, critic_turns, solution_steps


def test_an_answer_falls_into_steps_at_blank_lines() -> None:
    assert solution_steps("Two and two.\nThat is\n\nfour.") == ("Two and two.\nThat is", "four.")


def test_an_answer_without_blank_lines_is_one_step() -> None:
    assert solution_steps("4") == ("4",)


@pytest.mark.parametrize("answer", ["", "\n\n", " \n\n "])
def test_even_an_empty_answer_has_one_step(answer: str) -> None:
    assert solution_steps(answer) == (answer,)


@pytest.mark.parametrize(("parts", "sizes"), [(12, [1] * 12), (13, [2] * 6 + [1]), (24, [2] * 12), (25, [3] * 8 + [1])])
def test_more_than_twelve_parts_are_joined_in_equal_groups(parts: int, sizes: list[int]) -> None:
    answer = "\n\n".join(f"part {index}" for index in range(parts))
    assert [step.count("part") for step in solution_steps(answer)] == sizes


@given(st.lists(st.text(alphabet="ab. ", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=60))
def test_no_word_of_an_answer_is_lost_between_its_steps(parts: list[str]) -> None:
    steps = solution_steps("\n\n".join(parts))
    assert len(steps) <= MAX_STEPS
    assert "\n\n".join(steps).split("\n\n") == [part.strip() for part in parts]


def test_the_first_turn_holds_question_and_first_step_and_each_later_turn_one_step() -> None:
    picture = 7
    assert critic_turns([picture, "\nHow many?"], ["one", "two", "three"]) == (
        CriticTurn(False, ("### Question:\n", picture, "\nHow many?", "\n\n### Solution Process:\none")),
        CriticTurn(True, ("+",)),
        CriticTurn(False, ("two",)),
        CriticTurn(True, ("+",)),
        CriticTurn(False, ("three",)),
    )


def test_an_answers_score_is_the_mean_of_its_steps() -> None:
    assert answer_score([0.5, 1.0, 0.0]) == 0.5
