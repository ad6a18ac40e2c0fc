"""Which dialogues are answered, and which field is blamed for the others."""

import pytest

from gateway.content import MediaPart, Message, Role
from gateway.dialogue import Dialogue, Limits, check_continuation, check_dialogue
from shared.errors import EmptyMessage, InvalidRequest, MediaTooLarge, MediaUnreadable
from tests.gateway.fakes_gateway import CAT, DOG, assistant, by_digest, inline, text, user

GROUP = MediaPart(inline(CAT).media + inline(DOG).media, grouped=True)


def check(*messages: Message, kept: tuple[Message, ...] = (), limits: Limits | None = None) -> None:
    check_dialogue(Dialogue(None, kept, messages), limits or Limits())


def refused(*messages: Message, kept: tuple[Message, ...] = (), limits: Limits | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(*messages, kept=kept, limits=limits)
    return caught.value


def test_user_and_assistant_alternate() -> None:
    check(user("a"), assistant("b"), user("c"))
    assert refused(user("a"), user("b")).field == "messages[1].role"
    assert refused(assistant("a"), user("b")).field == "messages[0].role"


def test_the_user_has_the_last_word() -> None:
    assert refused(user("a"), assistant("b")).field == "messages[1].role"


def test_there_is_something_to_answer() -> None:
    assert refused().field == "messages"


@pytest.mark.parametrize("message", [user(), user(""), user("", "")])
def test_an_empty_message_is_not_answered(message: Message) -> None:
    error = refused(user("a"), assistant("b"), message)
    assert (type(error), error.field) == (EmptyMessage, "messages[2]")


def test_a_picture_alone_or_white_space_is_enough() -> None:
    check(user(by_digest(CAT)))
    check(user(" "))


def test_an_earlier_answer_may_be_empty() -> None:
    check(user("a"), assistant(), user("b"))


def test_an_assistant_shows_no_pictures() -> None:
    answer = Message(Role.ASSISTANT, (by_digest(CAT),))
    assert refused(user("a"), answer, user("b")).field == "messages[1].parts"


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(messages=2), "messages"),
        (Limits(parts_per_message=1), "messages[2].parts"),
        (Limits(text_chars=4), "messages"),
        (Limits(media=0), "messages"),
    ],
)
def test_a_limit_that_is_passed_is_an_error(limits: Limits, field: str) -> None:
    assert refused(user("ab"), assistant("c"), user("de", by_digest(CAT)), limits=limits).field == field


def test_a_limit_that_is_reached_is_none() -> None:
    limits = Limits(messages=3, parts_per_message=2, text_chars=5, media=1)
    check(user("ab"), assistant("c"), user("de", by_digest(CAT)), limits=limits)


def test_limits_count_what_was_kept_before() -> None:
    kept = (user("a", by_digest(CAT)), assistant("b"))
    assert refused(user(by_digest(DOG)), kept=kept, limits=Limits(media=1)).field == "messages"


def test_a_picture_over_the_limit_is_named_by_its_place() -> None:
    group = MediaPart(inline(b"1").media + inline(b"12345").media, grouped=True)
    error = refused(user("x", group), limits=Limits(media_bytes=4))
    assert (type(error), error.field) == (MediaTooLarge, "messages[0].parts[1].group.media[1]")
    assert refused(user(inline(b"12345")), limits=Limits(media_bytes=4)).field == "messages[0].parts[0].media"


def test_a_picture_without_bytes_is_unreadable() -> None:
    error = refused(user("x", inline(b"")))
    assert (type(error), error.field) == (MediaUnreadable, "messages[0].parts[1].media")


def test_media_are_placed_by_the_request_they_came_in() -> None:
    dialogue = Dialogue(None, (user(by_digest(CAT)), assistant("b")), (user(text("c"), GROUP),))
    assert [placed.field for placed in dialogue.placed_media] == [
        "conversation_id",
        "messages[0].parts[1].group.media[0]",
        "messages[0].parts[1].group.media[1]",
    ]


def test_a_kept_conversation_is_continued_by_one_message() -> None:
    check_continuation((user("a"),))
    for messages in [(), (user("a"), assistant("b"), user("c"))]:
        with pytest.raises(InvalidRequest):
            check_continuation(messages)
