"""From a chat completion's body to the turn that is asked, and back: which field of the body an error means."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.content import MediaPart, Medium, Message, Part, PreprocessOptions, Role, TextPart, ToolCall, VideoOptions
from gateway.events import ChatRequest, GenerationConfig
from gateway.http import requests
from gateway.http.media_urls import content_in, digest_in, is_remote
from gateway.prompt import Tool
from shared.errors import InvalidJsonSchema, InvalidRequest, ServiceError

_TILES: Final = {"low": 1, "high": 24}  # auto, and none: the checkpoint's own number
_DEFAULT_TEMPERATURE: Final = 1.0
_ANY_OBJECT: Final = '{"type":"object"}'
_MESSAGE: Final = re.compile(r"messages\[(\d+)\](?:\.parts\[(\d+)\])?")
_TOOL: Final = re.compile(r"tools\[(\d+)\]\.(name|parameters_json_schema)")
_CONFIG_NAMES: Final = {
    "max_output_tokens": "max_tokens",
    "stop_sequences": "stop",
    "candidate_count": "n",
    "json_schema": "response_format",
    "ignore_end": "ignore_eos",
    "include_special_tokens": "skip_special_tokens",
}
_TOOL_NAMES: Final = {"name": "name", "parameters_json_schema": "parameters"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the body a message came from: its index, and that of each of its parts; none where it is plain text."""

    message: int
    parts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """What is asked, and where in the body each of its messages came from."""

    request: ChatRequest
    places: tuple[Place, ...]

    @contextmanager
    def naming_fields(self) -> Iterator[None]:
        """Make the errors that are raised inside name fields of the body."""
        try:
            yield
        except ServiceError as error:
            error.field = param_of(error.field, self.places)
            raise


@dataclass(frozen=True, slots=True)
class Reading:
    """How media are read that do not say so themselves, and what was fetched, by URL."""

    max_tiles: int | None = None
    num_frames: int | None = None
    fetched: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(
        cls, body: "requests.ChatCompletionRequest | requests.TokenizeChatRequest", fetched: Mapping[str, bytes]
    ) -> "Reading":
        """Return what a body says of all its media."""
        pictures, media = body.mm_processor_kwargs, body.media_io_kwargs
        videos = media.video if media else None
        return cls(pictures.max_dynamic_patch if pictures else None, videos.num_frames if videos else None, fetched)


def remote_places(messages: Sequence[requests.ChatMessage]) -> dict[str, str]:
    """Return the URLs that have to be fetched, and where each came in first."""
    places: dict[str, str] = {}
    for index, message in enumerate(messages):
        for number, content in enumerate(message.content) if isinstance(message, requests.UserMessage) else ():
            if isinstance(content, requests.ImageContent | requests.VideoContent):
                url, place = _url_of(content), f"messages[{index}].content[{number}]"
                if is_remote(url):
                    places.setdefault(url, f"{place}.{content.type}.url")
    return places


def carried_chars(messages: Sequence[requests.ChatMessage]) -> int:
    """Return about how much there is to read: the characters of all URLs."""
    return sum(
        len(_url_of(content))
        for message in messages
        if isinstance(message, requests.UserMessage) and not isinstance(message.content, str)
        for content in message.content
        if not isinstance(content, requests.TextContent)
    )


def turn_of(body: requests.ChatCompletionRequest, fetched: Mapping[str, bytes]) -> Turn:
    """Return the turn that a body asks for; raise `InvalidRequest`, or one of its kinds, with the body's field.

    Takes a while where media come along: then it is for a thread.
    """
    reading = Reading.of(body, fetched)
    system, messages, places = _dialogue(body.messages, reading)
    request = ChatRequest(
        messages,
        system_message=system,
        config=_config(body),
        tools=() if body.tool_choice == "none" else _tools(body.tools),
        max_total_tiles=body.max_total_tiles,
    )
    return Turn(request, places)


def measured_turn_of(body: requests.TokenizeChatRequest, fetched: Mapping[str, bytes]) -> Turn:
    """Return the turn whose prompt is to be measured; as `turn_of`."""
    system, messages, places = _dialogue(body.messages, Reading.of(body, fetched))
    return Turn(ChatRequest(messages, system_message=system, tools=_tools(body.tools)), places)


def param_of(field: str | None, places: Sequence[Place]) -> str | None:
    """Return what a field of the gateway's own request is called in the body."""
    if field is None:
        return None
    if (match := _MESSAGE.match(field)) and int(match[1]) < len(places):
        place = places[int(match[1])]
        has_part = match[2] is not None and int(match[2]) < len(place.parts)
        return f"messages[{place.message}].content" + (f"[{place.parts[int(match[2])]}]" if has_part else "")
    if match := _TOOL.match(field):
        return f"tools[{match[1]}].function.{_TOOL_NAMES[match[2]]}"
    name = field.removeprefix("generation_config.")
    return {"system_message": "messages[0]", "text": "prompt"}.get(name) or _CONFIG_NAMES.get(name, name)


def _dialogue(
    said: Sequence[requests.ChatMessage], reading: Reading
) -> tuple[str | None, tuple[Message, ...], tuple[Place, ...]]:
    numbered = list(enumerate(said))
    system: str | None = None
    if isinstance(first := said[0], requests.SystemMessage):
        system = _text(first.content)
        numbered = numbered[1:]
    ordered = list(_in_order_of_calls(numbered))
    found = [_message(index, message, reading) for index, message in ordered]
    return system, tuple(message for message, _ in found), tuple(place for _, place in found)


def _in_order_of_calls(
    said: Sequence[tuple[int, requests.ChatMessage]],
) -> Iterator[tuple[int, requests.ChatMessage]]:
    """Yield the messages with answers of tools in the order in which the tools were called, which is what counts."""
    waiting: dict[str, int] = {}
    answers: list[tuple[int, int, requests.ToolMessage]] = []
    for index, message in said:
        if isinstance(message, requests.ToolMessage):
            if message.tool_call_id not in waiting:
                raise InvalidRequest(
                    "There is no call of this id right before, or it has its answer already.",
                    field=f"messages[{index}].tool_call_id",
                )
            answers.append((waiting.pop(message.tool_call_id), index, message))
            continue
        yield from ((place, answer) for _, place, answer in sorted(answers, key=lambda entry: entry[0]))
        answers, waiting = [], {}
        if isinstance(message, requests.AssistantMessage):
            waiting = {call.id: number for number, call in enumerate(message.tool_calls or ())}
        yield index, message
    yield from ((place, answer) for _, place, answer in sorted(answers, key=lambda entry: entry[0]))


def _message(index: int, said: requests.ChatMessage, reading: Reading) -> tuple[Message, Place]:
    match said:
        case requests.SystemMessage():
            raise InvalidRequest("The system message is the first one, and the only one.", field=f"messages[{index}]")
        case requests.UserMessage():
            return _user_message(index, said, reading)
        case requests.AssistantMessage():
            calls = tuple(
                ToolCall(call.function.name, call.function.arguments, call.id) for call in said.tool_calls or ()
            )
            text = _text(said.content or "")
            return Message(Role.ASSISTANT, (*_text_parts(text), *calls)), Place(index)
        case requests.ToolMessage():
            return Message(Role.TOOL, _text_parts(_text(said.content))), Place(index)


def _user_message(index: int, said: requests.UserMessage, reading: Reading) -> tuple[Message, Place]:
    if isinstance(said.content, str):
        return Message(Role.USER, _text_parts(said.content)), Place(index)
    order = _reading_order(said.content)
    parts = tuple(_part(said.content[number], f"messages[{index}].content[{number}]", reading) for number in order)
    return Message(Role.USER, parts), Place(index, tuple(order))


def _reading_order(contents: Sequence[requests.Content]) -> list[int]:
    """Return the order in which the parts are read: as they come, but for text that only media follow.

    Those media come first then. That is how the model cards' code asks, and where vLLM and LMDeploy put them too.
    """
    numbers = range(len(contents))
    first_medium = next(
        (number for number in numbers if not isinstance(contents[number], requests.TextContent)), len(contents)
    )
    if any(isinstance(content, requests.TextContent) for content in contents[first_medium:]):
        return list(numbers)
    return [*numbers[first_medium:], *numbers[:first_medium]]


def _part(content: requests.Content, place: str, reading: Reading) -> Part:
    match content:
        case requests.TextContent():
            return TextPart(content.text)
        case requests.ImageContent(image_url=image):
            max_tiles = image.max_dynamic_patch or _TILES.get(image.detail or "") or reading.max_tiles
            options = PreprocessOptions(max_tiles)
            return MediaPart((_medium(image.url, f"{place}.image_url.url", options, reading),))
        case requests.VideoContent(video_url=video):
            options = PreprocessOptions(video=VideoOptions(video.num_frames or reading.num_frames))
            return MediaPart((_medium(video.url, f"{place}.video_url.url", options, reading),))


def _medium(url: str, place: str, options: PreprocessOptions, reading: Reading) -> Medium:
    if is_remote(url):
        return Medium("", options, reading.fetched[url])
    digest = digest_in(url, place)
    return Medium(digest, options) if digest else Medium("", options, content_in(url, place))


def _url_of(content: requests.ImageContent | requests.VideoContent) -> str:
    return content.image_url.url if isinstance(content, requests.ImageContent) else content.video_url.url


def _text(content: requests.Text) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _text_parts(text: str) -> tuple[TextPart, ...]:
    return (TextPart(text),) if text else ()


def _tools(offered: Sequence[requests.ToolDefinition] | None) -> tuple[Tool, ...]:
    functions = [tool.function for tool in offered or ()]
    return tuple(
        Tool(
            function.name,
            function.description or "",
            "" if function.parameters is None else _schema_text(function.parameters, f"tools[{index}].function"),
        )
        for index, function in enumerate(functions)
    )


def _config(body: requests.ChatCompletionRequest) -> GenerationConfig:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs.", field="top_logprobs")
    stop = body.stop or ()
    return GenerationConfig(
        max_output_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=_DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop_sequences=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_end=bool(body.ignore_eos),
        candidate_count=body.n,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        json_schema=_schema(body.response_format),
        grounding=bool(body.grounding),
        include_special_tokens=body.skip_special_tokens is False,
    )


def _schema(wanted: requests.ResponseFormat | None) -> str:
    match wanted:
        case requests.JsonObjectFormat():
            return _ANY_OBJECT
        case requests.JsonSchemaFormat():
            return _schema_text(wanted.json_schema.json_schema, "response_format.json_schema.schema")
        case _:
            return ""


def _schema_text(schema: dict[str, Any], field: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:
        raise InvalidJsonSchema("A number of this JSON schema is too large.", field=field) from None
