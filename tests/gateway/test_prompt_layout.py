"""How messages become segments: newlines after pictures, and nothing else."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.content import MediaPart, Medium, Part, TextPart
from gateway.dialogue import Dialogue
from gateway.prompt import EmbeddingHandle, TextSegment, VisualSegment, prompt_of, with_newlines
from tests.gateway.fakes_gateway import assistant, user

CAT, DOG = MediaPart((Medium("a" * 64),)), MediaPart((Medium("b" * 64),))


def laid_out(*parts: Part | str) -> list[str | MediaPart]:
    pieces = with_newlines([TextPart(part) if isinstance(part, str) else part for part in parts])
    return [piece.text if isinstance(piece, TextPart) else piece for piece in pieces]


def test_text_after_a_picture_begins_on_a_new_line() -> None:
    assert laid_out(CAT, "What is it?") == [CAT, "\nWhat is it?"]


def test_text_that_begins_with_white_space_gets_no_newline() -> None:
    assert laid_out(CAT, " and ", DOG, "\tso") == [CAT, " and ", DOG, "\tso"]


def test_two_pictures_stand_on_two_lines() -> None:
    assert laid_out(CAT, DOG) == [CAT, "\n", DOG]


def test_the_card_s_separate_pictures_come_out_as_the_card_writes_them() -> None:
    assert laid_out("Image-1: ", CAT, "\nImage-2: ", DOG, "\nDescribe both.") == [
        "Image-1: ",
        CAT,
        "\nImage-2: ",
        DOG,
        "\nDescribe both.",
    ]
    assert laid_out("Image-1: ", CAT, "Image-2: ", DOG, "Go.") == ["Image-1: ", CAT, "\nImage-2: ", DOG, "\nGo."]


def test_nothing_follows_a_picture_at_the_end() -> None:
    assert laid_out("Look at this: ", CAT) == ["Look at this: ", CAT]


def test_an_empty_text_is_as_if_it_were_not_there() -> None:
    assert laid_out("", CAT, "", DOG, "") == [CAT, "\n", DOG]


def test_neighbouring_texts_are_one_and_get_nothing_between() -> None:
    assert laid_out("a", "b", CAT, "", "c", " d") == ["ab", CAT, "\nc d"]


def test_a_group_is_one_visual_segment_with_several_handles() -> None:
    cat, dog = CAT.media[0], DOG.media[0]
    handles = {cat: EmbeddingHandle("1", 1, 256, b""), dog: EmbeddingHandle("2", 3, 768, b"")}
    group = MediaPart((cat, dog), grouped=True)
    prompt = prompt_of(Dialogue("Be brief.", (), (user(group, "Both?"),)), handles)
    assert prompt.turns[0].segments == (VisualSegment((handles[cat], handles[dog])), TextSegment("\nBoth?"))
    assert prompt.system_message == "Be brief."


def test_an_empty_answer_is_a_turn_without_segments() -> None:
    prompt = prompt_of(Dialogue(None, (user("Hi"), assistant("")), (user("Again?"),)), {})
    assert [len(turn.segments) for turn in prompt.turns] == [1, 0, 1]


parts_strategy = st.lists(st.sampled_from([CAT, DOG]) | st.builds(TextPart, st.text(" \n\tab<é", max_size=3)))


@given(parts_strategy)
def test_only_newlines_after_pictures_are_ever_added(parts: list[Part]) -> None:
    given_parts = [part for part in parts if not isinstance(part, TextPart) or part.text]
    flat: list[str | MediaPart] = []
    for index, part in enumerate(given_parts):
        previous = given_parts[index - 1] if index else None
        if isinstance(previous, MediaPart) and (isinstance(part, MediaPart) or not part.text[0].isspace()):
            flat.append("\n")
        flat += list(part.text) if isinstance(part, TextPart) else [part]
    result: list[str | MediaPart] = []
    for piece in with_newlines(parts):
        result += list(piece.text) if isinstance(piece, TextPart) else [piece]
    assert result == flat


@given(parts_strategy)
def test_laying_out_twice_changes_nothing(parts: list[Part]) -> None:
    once = with_newlines(parts)
    assert with_newlines(once) == once
    texts = [isinstance(piece, TextPart) for piece in once]
    assert not any(first and second for first, second in pairwise(texts))
