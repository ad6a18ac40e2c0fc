"""Qwen2.5's form of tools: what a prompt says of them, of calls and of their results."""

from collections.abc import Sequence

from llm_service.prompt import json_text
from llm_service.prompt.dialogue import Tool, ToolCallSegment

CALL_START, CALL_END = "<tool_call>", "</tool_call>"

_INTRODUCTION = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_INSTRUCTION = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    f'{CALL_START}{CALL_END} XML tags:\n{CALL_START}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n'
    f"{CALL_END}"
)


def introduction(tools: Sequence[Tool]) -> str:
    """Return what follows the system message; nothing where there are no tools."""
    if not tools:
        return ""
    return _INTRODUCTION + "".join(f"\n{_signature(tool)}" for tool in tools) + _INSTRUCTION


def written_call(call: ToolCallSegment) -> str:
    """Return a call as the model writes it."""
    arguments = json_text.write(json_text.read_object(call.arguments_json))
    return f'{CALL_START}\n{{"name": "{call.name}", "arguments": {arguments}}}\n{CALL_END}'


def written_result(text: str) -> str:
    """Return a tool's answer as the model reads it, within a user turn."""
    return f"<tool_response>\n{text}\n</tool_response>"


def _signature(tool: Tool) -> str:
    schema = tool.parameters_json_schema or '{"type": "object", "properties": {}}'
    described = {"description": tool.description} if tool.description else {}
    function = {"name": tool.name, **described, "parameters": json_text.read_object(schema)}
    return json_text.write({"type": "function", "function": function})
