"""The client's types stay in step with the protos and with the services' own settings of gRPC."""

import dataclasses
import json

import pytest

from internvl_client import GenerationConfig, Image, ImageGroup, Message, Role, Tool, ToolCall, Video
from internvl_client.channel import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES, SERVICE_CONFIG
from internvl_client.convert import chat_request, dialogue_of, message_of
from internvl_client.types import GenerationOptions
from internvl_serving.common.v1 import generation_pb2
from internvl_serving.gateway.v1 import content_pb2
from shared.rpc import channel

CAT, DOG = Image.from_bytes(b"cat"), Image.from_bytes(b"dog", max_tiles=3, thumbnail=True)


def test_every_generation_setting_of_the_proto_can_be_given() -> None:
    of_the_proto = {field.name for field in generation_pb2.GenerationConfig.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(GenerationConfig)} == of_the_proto
    assert set(GenerationOptions.__annotations__) == of_the_proto


def test_the_client_reaches_out_as_the_services_do() -> None:
    ours, theirs = dict(CHANNEL_OPTIONS), dict(channel.channel_options(MAX_MESSAGE_BYTES))
    assert json.loads(SERVICE_CONFIG)["methodConfig"] == json.loads(channel.SERVICE_CONFIG)["methodConfig"]
    assert ours | {"grpc.service_config": ""} == theirs | {"grpc.service_config": ""}


def test_bare_parts_between_messages_are_user_messages() -> None:
    answer = Message.assistant("Yes.")
    assert dialogue_of([CAT, "A cat?", answer, "Sure?"]) == [
        Message.user(CAT, "A cat?"),
        answer,
        Message.user("Sure?"),
    ]
    assert dialogue_of([]) == [Message.user()]


def test_a_stored_group_comes_back_as_digests() -> None:
    stored = content_pb2.Message(role=generation_pb2.ROLE_ASSISTANT, parts=[content_pb2.Part()])
    group = stored.parts[0].group
    for image in (CAT, DOG):
        media = group.media.add(digest=image.digest)
        if image.max_tiles is not None:
            media.options.max_tiles, media.options.thumbnail = image.max_tiles, True
    message = message_of(stored)
    assert message.parts == (ImageGroup.of(CAT, DOG),)
    assert [image.content for image in message.images] == [None, None]


CLIP = Video.from_bytes(b"clip", num_segments=16, start_s=0.0, max_tiles=2)


def test_a_video_says_which_frames_are_seen() -> None:
    request = chat_request([Message.user(CLIP, Video.from_bytes(b"x"))], frozenset({CLIP.digest}), {}, None, "")
    first, second = (part.media for part in request.messages[0].parts)
    video = first.options.video
    assert (first.inline, video.segment_count, first.options.max_tiles) == (b"clip", 16, 2)
    assert (video.HasField("start_seconds"), video.HasField("end_seconds")) == (True, False)
    assert (second.digest, second.options.HasField("video")) == (Video.from_bytes(b"x").digest, True)
    assert message_of(request.messages[0]).parts[0] == CLIP


@pytest.mark.parametrize("num_segments", [None, 0, 3])
def test_the_number_of_segments_is_sent_as_it_is_given(num_segments: int | None) -> None:
    clip = Video.from_bytes(b"clip", num_segments=num_segments)
    request = chat_request([Message.user(clip)], frozenset(), {}, None, "")
    sent = request.messages[0].parts[0].media.options.video
    assert (sent.segment_count if sent.HasField("segment_count") else None) == num_segments
    (read,) = message_of(request.messages[0]).media
    assert isinstance(read, Video)
    assert read.num_segments == num_segments


def test_a_stored_call_of_a_tool_comes_back() -> None:
    call = ToolCall("add", '{"a": 1}', "call_1")
    request = chat_request([Message.assistant("So: ", call), Message.tool("2")], frozenset(), {}, None, "")
    answer, result = map(message_of, request.messages)
    assert (answer.parts, answer.tool_calls, call.arguments) == (("So: ", call), (call,), {"a": 1})
    assert (result.role, result.text) == (Role.TOOL, "2")


@pytest.mark.parametrize("schema", ['{"type": "object"}', {"type": "object"}])
def test_schemas_are_text_or_what_json_makes_of_it(schema: str | dict[str, str]) -> None:
    options = {"json_schema": schema, "tools": [Tool("add", "Adds.", schema), Tool("now")]}
    request = chat_request([Message.user("Hi")], frozenset(), options, None, "")  # type: ignore[arg-type]
    assert json.loads(request.generation_config.json_schema) == {"type": "object"}
    assert [json.loads(tool.parameters_json_schema or "null") for tool in request.tools] == [{"type": "object"}, None]


@pytest.mark.parametrize(("detail", "max_tiles"), [("low", 6), ("medium", 12), ("high", 12), ("auto", 12)])
def test_detail_is_a_word_for_tiles(detail: str, max_tiles: int) -> None:
    assert Image.from_bytes(b"cat", detail=detail).max_tiles == max_tiles  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        Image.from_bytes(b"cat", detail=detail, max_tiles=3)  # type: ignore[arg-type]


def test_a_detail_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="low, medium, high, auto"):
        Image.from_digest("a" * 64, detail="ultra")  # type: ignore[arg-type]
