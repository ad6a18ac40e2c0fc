"""What a request asks for beside its dialogue: tools, candidates, a schema, a tile budget; checked before any work."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace

from gateway.content import MediaPart, Medium, Message, Part
from gateway.dialogue import Limits, is_json_object
from gateway.events import ChatRequest, GenerationConfig
from gateway.prompt import Tool
from shared.errors import InvalidGenerationConfig, InvalidJsonSchema, InvalidRequest

MAX_CANDIDATES = 16
_MOST_TILES_OF_A_PICTURE = 12  # what every released checkpoint cuts a picture into at most, the thumbnail not counted
_DEFAULT_SEGMENTS = 8
_TURN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_options(request: ChatRequest, limits: Limits) -> None:
    """Raise `InvalidRequest`, or one of its kinds, for what no service behind the gateway could do.

    What depends on the model is left to the LLM service.
    """
    _check_tools(request.tools, limits)
    _check_config(request.config, limits)
    if request.max_total_tiles is not None and request.max_total_tiles < 1:
        raise InvalidRequest("A tile budget is at least 1.", field="max_total_tiles")
    if request.turn_id and not _TURN_ID.fullmatch(request.turn_id):
        raise InvalidRequest("A turn's id is 1 to 128 letters, digits or the characters ._:-", field="turn_id")


def share_tiles(messages: tuple[Message, ...], max_total_tiles: int | None) -> tuple[Message, ...]:
    """Return the messages with no more tiles than `max_total_tiles` in all their media together; None: as they are.

    Each medium gets an equal share, rounded down, and a video divides its own equally among its frames. A thumbnail is
    a tile. A share goes to the vision service as `max_tiles`, in the place of a larger wish, or of none where it is too
    small for what released checkpoints do by themselves; so with these a budget never raises the number of tiles. A
    checkpoint with a lower limit of its own is not known here: there a share may allow more. Raises `InvalidRequest`
    where a picture or a frame would get none.
    """
    media = [medium for message in messages for medium in message.media]
    if max_total_tiles is None or not media:
        return messages
    share = max_total_tiles // len(media)
    needed = max(_picture_count(medium) for medium in media)
    if share < needed:
        raise InvalidRequest(
            f"{len(media)} media with at most {needed} pictures or frames each need {len(media) * needed} tiles.",
            field="max_total_tiles",
        )
    return tuple(replace(message, parts=tuple(_limited_parts(message, share))) for message in messages)


def _limited_parts(message: Message, share: int) -> Iterator[Part]:
    for part in message.parts:
        if isinstance(part, MediaPart):
            yield replace(part, media=tuple(_limited(medium, share) for medium in part.media))
        else:
            yield part


def _limited(medium: Medium, share: int) -> Medium:
    options = medium.options
    if options.video is not None and options.max_tiles is None:
        return medium  # one tile a frame, which the share allows
    allowed = share // _picture_count(medium)
    if options.thumbnail is not False:
        # A thumbnail comes with two tiles or more.
        allowed = max(1, allowed - 1)
    if options.max_tiles is None:
        return medium if allowed >= _MOST_TILES_OF_A_PICTURE else _with_max_tiles(medium, allowed)
    return _with_max_tiles(medium, min(allowed, options.max_tiles))


def _with_max_tiles(medium: Medium, max_tiles: int) -> Medium:
    return replace(medium, options=replace(medium.options, max_tiles=max_tiles))


def _picture_count(medium: Medium) -> int:
    video = medium.options.video
    if video is None:
        return 1
    return _DEFAULT_SEGMENTS if video.segment_count is None else video.segment_count


def _check_tools(tools: tuple[Tool, ...], limits: Limits) -> None:
    if len(tools) > limits.tools:
        raise InvalidRequest(f"A request offers at most {limits.tools} tools.", field="tools")
    names: set[str] = set()
    chars = 0
    for index, tool in enumerate(tools):
        if not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequest("A tool's name is 1 to 64 letters, digits, _, - or .", field=f"tools[{index}].name")
        if tool.name in names:
            raise InvalidRequest("Two tools have this name.", field=f"tools[{index}].name")
        if tool.parameters_json_schema and not is_json_object(tool.parameters_json_schema):
            raise InvalidJsonSchema(
                "The parameters of a tool are a JSON schema, which is an object.",
                field=f"tools[{index}].parameters_json_schema",
            )
        names.add(tool.name)
        chars += len(tool.name) + len(tool.description) + len(tool.parameters_json_schema)
    if chars > limits.text_chars:
        raise InvalidRequest(f"Tools have at most {limits.text_chars} characters.", field="tools")


def _check_config(config: GenerationConfig, limits: Limits) -> None:
    count = config.candidate_count
    if count is not None and not 1 <= count <= MAX_CANDIDATES:
        raise InvalidGenerationConfig(
            f"candidate_count has to be from 1 to {MAX_CANDIDATES}.", field="generation_config.candidate_count"
        )
    if config.json_schema and not (len(config.json_schema) <= limits.text_chars and _is_schema(config.json_schema)):
        raise InvalidJsonSchema("The JSON schema is too long or no JSON.", field="generation_config.json_schema")


def _is_schema(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | bool)
    except (ValueError, RecursionError):
        return False
