"""Tools: written into prompts as Qwen2.5's chat template does, read out of answers while they stream."""

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_service.prompt import json_text
from llm_service.prompt.dialogue import MAX_TOOLS, Dialogue, Role, TextSegment, Tool, ToolCallSegment, Turn
from llm_service.prompt.template import TEMPLATES
from llm_service.prompt.tokenizer import load_tokenizer
from llm_service.prompt.tool_calls import ToolCallReader
from llm_service.prompt.writer import PromptWriter
from shared.errors import InvalidRequest, NotSupportedByModel
from tests.golden_cases import GOLDEN, header
from tests.prompt_text import prompt_text, streamed_text

WEATHER = Tool(
    "get_weather",
    "Says what the weather is, 天气.",
    '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}',
)
CLOCK = Tool("clock")
CALL = ToolCallSegment("get_weather", '{"city":"Paris"}')

# As the chat template of Qwen2.5-7B-Instruct renders system message, tools, a call with text, two results.
RENDERED = """<|im_start|>system
Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "get_weather", "description": "Says what the weather is, 天气.", \
"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
{"type": "function", "function": {"name": "clock", \
"parameters": {"type": "object", "properties": {}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Weather and time?<|im_end|>
<|im_start|>assistant
I will look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "clock", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
sunny
</tool_response>
<tool_response>
12:00
</tool_response><|im_end|>
<|im_start|>assistant
"""


@cache
def writer(checkpoint: str = "internvl3-8b-tiny") -> PromptWriter:
    return PromptWriter(TEMPLATES[header(checkpoint)["template"]], load_tokenizer(GOLDEN / "checkpoints" / checkpoint))


def said(role: Role, *parts: str | ToolCallSegment) -> Turn:
    return Turn(role, tuple(TextSegment(part) if isinstance(part, str) else part for part in parts))


USER = said(Role.USER, "Weather and time?")
RESULTS = (said(Role.TOOL, "sunny"), said(Role.TOOL, "12:00"))


def test_tools_calls_and_results_are_written_as_qwens_template_writes_them() -> None:
    asked = said(Role.ASSISTANT, "I will look.", CALL, ToolCallSegment("clock", "{}"))
    dialogue = Dialogue((USER, asked, *RESULTS), "Be brief.", (WEATHER, CLOCK))
    assert prompt_text(writer().template.render(dialogue)) == RENDERED


def test_a_call_without_text_follows_the_prefix() -> None:
    text = prompt_text(writer().template.render(Dialogue((USER, said(Role.ASSISTANT, CALL), RESULTS[0]))))
    assert "<|im_start|>assistant\n<tool_call>\n" in text
    assert "# Tools" not in text


def test_the_marks_of_a_call_are_the_models_own_tokens_in_system_message_and_history() -> None:
    dialogue = Dialogue((USER, said(Role.ASSISTANT, CALL), *RESULTS), None, (WEATHER,))
    ids = writer().write(dialogue).ids
    start, end = (writer().tokenizer.token_id(token) for token in ("<tool_call>", "</tool_call>"))
    assert (ids.count(start), ids.count(end)) == (3, 3)


@pytest.mark.parametrize("checkpoint", ["internvl2-1b-tiny", "internvl2-8b-tiny", "internlm3-tiny"])
@pytest.mark.parametrize(
    "dialogue",
    [Dialogue((USER,), None, (CLOCK,)), Dialogue((USER, said(Role.ASSISTANT, CALL), *RESULTS))],
    ids=["tools", "call and results"],
)
def test_a_model_without_a_form_for_tools_refuses_them(checkpoint: str, dialogue: Dialogue) -> None:
    with pytest.raises(NotSupportedByModel) as caught:
        writer(checkpoint).write(dialogue)
    assert caught.value.field == "prompt.tools"


@pytest.mark.parametrize(
    "tools",
    [
        (Tool(""),),
        (Tool("two words"),),
        (Tool("x" * 65),),
        (Tool("x", "", "[]"),),
        (Tool("x", "", '{"a": NaN}'),),
        (Tool("x", "", '{"a": 1e999}'),),
        (Tool("x", "", '{"a": "\\ud800"}'),),
        (Tool("x", "", '{"a":' * 100_000),),
        (CLOCK, CLOCK),
        tuple(Tool(f"x{index}") for index in range(MAX_TOOLS + 1)),
    ],
    ids=["no name", "space", "long", "list", "nan", "infinity", "half pair", "deep", "twice", "many"],
)
def test_a_tool_that_cannot_be_written_is_refused(tools: tuple[Tool, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Dialogue((USER,), None, tools)
    assert caught.value.field is not None
    assert caught.value.field.startswith("prompt.tools")


def read(pieces: list[str]) -> tuple[str, list[ToolCallSegment]]:
    reader = ToolCallReader()
    text, calls = "", []
    for piece in pieces:
        shown, ended = reader.push(piece)
        text += shown
        calls += ended
    return text + reader.finish(), calls


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    ("answer", "text", "names"),
    [
        ("No call.", "No call.", []),
        (call("a"), "", ["a"]),
        (f"I look.\n{call('a')}\n{call('b')}", "I look.", ["a", "b"]),
        (f"I look.\n{call('a')}\nMore.", "I look.\nMore.", ["a"]),
        ("a < b and <tool", "a < b and <tool", []),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ("x <tool_call>\nno json</tool_call> y", "x <tool_call>\nno json</tool_call> y", []),
        ('<tool_call>{"name": "a", "arguments": "{}"}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": "a b", "arguments": {}}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": "a", "arguments": {}}',) * 2 + ([],),
        (f"<tool_call>{{</tool_call>{call('b')}", "<tool_call>{</tool_call>", ["b"]),
        ("a </tool_call> b", "a </tool_call> b", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_become_structure_and_all_else_stays_text(answer: str, text: str, names: list[str], size: int) -> None:
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    found, calls = read(pieces)
    assert found == text
    assert [each.name for each in calls] == names


def test_arguments_are_a_json_object() -> None:
    _, (found,) = read([call("a", city="Zürich", days=[1, 2.5, None])])
    assert found == ToolCallSegment("a", '{"city": "Zürich", "days": [1, 2.5, null]}')


def test_text_before_a_call_streams_at_once_and_a_call_is_told_when_it_ends() -> None:
    reader = ToolCallReader()
    assert reader.push("I look.\n<tool") == ("I look.", ())
    assert reader.push('_call>{"name": "a", "arg') == ("", ())
    assert reader.push('uments": {}}') == ("", ())
    assert reader.push("</tool_call>") == ("", (ToolCallSegment("a", "{}"),))
    assert reader.finish() == ""


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "a", "arguments": {}}', " ", "\n", "x", "<"])),
    st.integers(1, 9),
)
def test_how_an_answer_is_cut_into_pieces_changes_nothing(parts: list[str], size: int) -> None:
    answer = "".join(parts).strip()
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    assert read(pieces) == read([answer])
    text, calls = read([answer])
    assert calls or text == answer


def test_a_call_that_the_model_writes_can_be_read_and_written_again() -> None:
    dialogue = Dialogue((USER, said(Role.ASSISTANT, CALL), RESULTS[0]))
    ids = writer().tokenizer.encode(call("get_weather", city="Paris"), markup=True)
    _, (found,) = read([streamed_text(writer().tokenizer, ids)])
    again = Dialogue((USER, said(Role.ASSISTANT, found), RESULTS[0]))
    assert writer().write(again) == writer().write(dialogue)


@pytest.mark.parametrize(
    "text", ["", "1", "[]", "nul", '{"a": Infinity}', '{"a": -1e999}', '{"\\udfff": 1}', "[" * 100_000]
)
def test_what_is_no_object_that_can_be_written_again_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        json_text.read_object(text)
