"""Which dialogues are answered, and which field is blamed for the others."""

import pytest

from gateway.content import MediaPart, Medium, Message, PreprocessOptions, Role, ToolCall, VideoOptions
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


def calling(*names: str) -> Message:
    return Message(Role.ASSISTANT, tuple(ToolCall(name, "{}", name) for name in names))


def result(words: str) -> Message:
    return Message(Role.TOOL, (text(words),))


def test_tools_answer_the_calls_of_the_message_before() -> None:
    check(user("a"), calling("f", "g"), result("1"), result("2"))
    check(user("a"), calling("f"), result("1"), assistant("b"), user("c"))
    check(user("a"), calling("f"), user("never mind"))
    check(result(""), kept=(user("a"), calling("f")))


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ((result("1"),), "messages[0].role"),
        ((user("a"), result("1")), "messages[1].role"),
        ((user("a"), assistant("b"), result("1")), "messages[2].role"),
        ((user("a"), calling("f"), result("1"), result("2")), "messages[3].role"),
        ((user("a"), calling("f"), result("1"), user("b")), "messages[3].role"),
        ((user("a"), calling("f")), "messages[1].role"),
    ],
)
def test_a_tool_speaks_when_it_was_called(messages: tuple[Message, ...], field: str) -> None:
    assert refused(*messages).field == field


def test_only_the_assistant_calls_and_only_users_show() -> None:
    call = ToolCall("f", "{}")
    assert refused(Message(Role.USER, (call,))).field == "messages[0].parts"
    assert refused(user("a"), calling("f"), Message(Role.TOOL, (by_digest(CAT),))).field == "messages[2].parts"


@pytest.mark.parametrize("arguments", ["", "[]", "{", "3", '{"a":' * 100_000])
def test_the_arguments_of_a_call_are_an_object(arguments: str) -> None:
    answer = Message(Role.ASSISTANT, (text("x"), ToolCall("f", arguments)))
    assert refused(user("a"), answer, user("b")).field == "messages[1].parts[1].tool_call.arguments_json"


def clip(**options: float) -> MediaPart:
    return MediaPart((Medium("a" * 64, PreprocessOptions(video=VideoOptions(**options))),))  # type: ignore[arg-type]


def test_a_video_s_options_make_sense() -> None:
    check(user(clip(segment_count=4, start_s=0.5, end_s=9.0)))
    place = "messages[0].parts[0].media.options.video"
    for count in (0, -1):
        assert refused(user(clip(segment_count=count))).field == f"{place}.segment_count"
    assert refused(user(clip(start_s=float("nan")))).field == f"{place}.start_seconds"
    assert refused(user(clip(end_s=float("inf")))).field == f"{place}.end_seconds"


def test_a_group_holds_no_video() -> None:
    group = MediaPart((*by_digest(CAT).media, *clip().media), grouped=True)
    assert refused(user(group)).field == "messages[0].parts[0].group.media[1].options.video"


def test_a_kept_conversation_is_continued_by_one_message_or_results_of_tools() -> None:
    check_continuation((user("a"),))
    check_continuation((result("1"), result("2")))
    for messages in [(), (user("a"), assistant("b"), user("c")), (result("1"), user("c"))]:
        with pytest.raises(InvalidRequest):
            check_continuation(messages)
