"""The model card's tagged text as parts: what the server renders from them is the card's own prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_client import (
    Image,
    ImageGroup,
    Message,
    Part,
    Video,
    batch_from_card,
    messages_from_card,
    parts_from_card,
)

TAG, VIDEO = "<image>", "<video>"
A, B, C = (Image.from_bytes(name) for name in (b"a", b"b", b"c"))
V, W = (Video.from_bytes(name, num_segments=2) for name in (b"v", b"w"))


def rendered(parts: tuple[Part, ...]) -> str:
    """What the gateway makes of parts, with a tag for each run of tiles."""
    text = ""
    for part, following in zip(parts, (*parts[1:], None), strict=False):
        text += part if isinstance(part, str) else TAG
        if not isinstance(part, str) and following is not None:
            needs_newline = not isinstance(following, str) or not following[:1].isspace()
            text += "\n" if needs_newline else ""
    return text


@pytest.mark.parametrize(
    ("question", "images", "num_patches_list", "parts"),
    [
        ("Hello", [], None, ("Hello",)),
        (f"{TAG}\nWhat?", [A], None, (A, "\nWhat?")),
        (f"{TAG}\nWhat?", [A], [5], (A, "\nWhat?")),
        ("What?", [A], None, (A, "\nWhat?")),
        ("What?", [A, B], None, (ImageGroup.of(A, B), "\nWhat?")),
        (f"Look at this: {TAG}", [A], [1], ("Look at this: ", A)),
        (f"{TAG}\nBoth?", [A, B], None, (ImageGroup.of(A, B), "\nBoth?")),
        (f"Image-1: {TAG}\nImage-2: {TAG}\nBoth?", [A, B], [1, 4], ("Image-1: ", A, "\nImage-2: ", B, "\nBoth?")),
        ("", [A], None, (A, "\n")),
        ("", [], None, ()),
    ],
)
def test_parts_are_those_of_the_card(
    question: str, images: list[Image], num_patches_list: list[int] | None, parts: tuple[Part, ...]
) -> None:
    assert parts_from_card(question, images, num_patches_list) == parts


@pytest.mark.parametrize(
    ("question", "images", "num_patches_list", "parts"),
    [
        (f"{TAG}\nThe tag {TAG} is text.", [A], [1], (A, f"\nThe tag {TAG} is text.")),
        (f"{TAG}\nNo pictures.", [], None, (f"{TAG}\nNo pictures.",)),
        (f"{VIDEO}\nNo video. {TAG} one", [A], None, (f"{VIDEO}\nNo video. ", A, " one")),
    ],
)
def test_tags_that_are_left_over_are_text_where_that_is_wished(
    question: str, images: list[Image], num_patches_list: list[int] | None, parts: tuple[Part, ...]
) -> None:
    assert parts_from_card(question, images, num_patches_list, literal_tags=True) == parts
    with pytest.raises(ValueError, match="literal_tags"):
        parts_from_card(question, images, num_patches_list)


@pytest.mark.parametrize(
    ("question", "media", "num_patches_list", "parts"),
    [
        (f"{VIDEO}\nWhat?", [V], None, (V, "\nWhat?")),
        ("What?", [V], None, (V, "\nWhat?")),
        (f"{VIDEO}\nor\n{VIDEO}", [V, W], None, (V, "\nor\n", W)),
        (f"{TAG}\n{VIDEO}\nSame?", [A, V], None, (A, "\n", V, "\nSame?")),
        (f"{VIDEO}\n{TAG} and {TAG}\nSame?", [A, V, B], [1, 1], (V, "\n", A, " and ", B, "\nSame?")),
        ("Same?", [A, V], None, (A, "\n", V, "\nSame?")),
    ],
)
def test_videos_stand_at_their_own_tags(
    question: str, media: list[Image | Video], num_patches_list: list[int] | None, parts: tuple[Part, ...]
) -> None:
    assert parts_from_card(question, media, num_patches_list) == parts


def test_videos_and_tags_are_equally_many() -> None:
    with pytest.raises(ValueError, match="2 videos to place but 1 <video>"):
        parts_from_card(f"{VIDEO}\nWhat?", [V, W])
    with pytest.raises(ValueError, match="2 <video> tags but 1 videos"):
        parts_from_card(f"{VIDEO}\n{VIDEO}\nWhat?", [V])
    with pytest.raises(ValueError, match="1 <video> tags but 0 videos"):
        parts_from_card(f"{VIDEO}\n{TAG}\nWhat?", [A])


def test_a_batch_has_a_picture_or_none_for_each_question() -> None:
    assert batch_from_card(["What?", f"Look: {TAG} so?", "Hi"], [A, B, None]) == [
        (A, "\nWhat?"),
        ("Look: ", B, " so?"),
        ("Hi",),
    ]
    with pytest.raises(ValueError, match="2 questions for 1 pictures"):
        batch_from_card(["a", "b"], [A])


@pytest.mark.parametrize(
    ("question", "images", "num_patches_list", "said"),
    [
        (f"{TAG}\nOne tag.", [A, B], [1, 1], "2 pictures to place but 1"),
        (f"{TAG}\nOne picture.", [A], [1, 1], "2 entries for 1"),
        (f"{TAG}\n{TAG}\nBoth?", [A, B], None, "entry per picture"),
        (f"{TAG}What?", [A], None, "white space"),
        (f"{TAG}{TAG}\nBoth?", [A, B], [1, 1], "white space"),
    ],
)
def test_what_does_not_match_is_refused(
    question: str, images: list[Image], num_patches_list: list[int] | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        parts_from_card(question, images, num_patches_list)


def test_pictures_take_the_tags_of_old_questions_first() -> None:
    messages = messages_from_card(f"{TAG}\nAnd this?", [A, B], [1, 1], [(f"{TAG}\nWhat?", f"A {TAG}.")])
    assert messages == [
        Message.user(A, "\nWhat?"),
        Message.assistant(f"A {TAG}."),
        Message.user(B, "\nAnd this?"),
    ]


def test_no_tag_is_added_where_there_is_a_history() -> None:
    with pytest.raises(ValueError, match="1 pictures to place but 0"):
        messages_from_card("No tag here.", [A], [1], [("Hi", "Hello")])


text = st.text(alphabet=st.sampled_from("ab \n\t\u2003<image>"), max_size=12)


@given(st.lists(text, max_size=6), st.data())
def test_rendering_the_parts_gives_back_the_tagged_text(texts: list[str], data: st.DataObject) -> None:
    tagged = TAG.join(texts)
    num_images = data.draw(st.integers(0, min(3, tagged.count(TAG))))
    images = [A, B, C][:num_images]
    try:
        parts = parts_from_card(tagged, images, [1] * num_images, literal_tags=True)
    except ValueError as error:
        assert "white space" in str(error)  # noqa: PT017  refused is right only for what the parts cannot say
        assert_a_tag_lacks_white_space(tagged, num_images)
    else:
        assert rendered(parts) == tagged
        assert [part for part in parts if not isinstance(part, str)] == images


@given(st.lists(text, min_size=1, max_size=4), st.integers(2, 3))
def test_the_combined_form_has_one_run(texts: list[str], num_images: int) -> None:
    tagged = " ".join(piece for piece in texts).replace(TAG, "")
    parts = parts_from_card(f"{tagged} {TAG} {tagged}", [A, B, C][:num_images])
    assert rendered(parts) == f"{tagged} {TAG} {tagged}"
    assert ImageGroup((A, B, C)[:num_images]) in parts


def assert_a_tag_lacks_white_space(tagged: str, num_images: int) -> None:
    pieces = tagged.split(TAG)
    following = pieces[1 : num_images + 1]
    last = len(pieces) - 1
    assert any(
        not piece[:1].isspace() and not (piece == "" and number == last)
        for number, piece in enumerate(following, start=1)
    )
