"""The client's types stay in step with the protos and with the services' own settings of gRPC."""

import dataclasses
import json

from internvl_client import GenerationConfig, Image, ImageGroup, Message
from internvl_client.channel import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES, SERVICE_CONFIG
from internvl_client.convert import dialogue_of, message_of
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
