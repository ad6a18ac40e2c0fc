"""Reads the calls of tools out of an answer's text, in Qwen2.5's form."""

from llm_service.prompt import json_text
from llm_service.prompt.dialogue import TOOL_NAME, ToolCallSegment
from llm_service.prompt.text_stream import overlap
from llm_service.prompt.tools import CALL_END, CALL_START


class ToolCallReader:
    """Takes the calls out of an answer's text while it streams. What is no well-formed call stays text.

    White space around a call belongs to it; where text goes on behind one, the white space before the call stays.
    """

    def __init__(self) -> None:
        self._held = ""
        self._space = ""
        self._in_call = self._after_call = False

    def push(self, text: str) -> tuple[str, tuple[ToolCallSegment, ...]]:
        """Take more text; return what of it is certain to be no call, and the calls that have ended."""
        self._held += text
        shown = ""
        calls: list[ToolCallSegment] = []
        while self._in_call or CALL_START in self._held:
            if not self._in_call:
                before, _, self._held = self._held.partition(CALL_START)
                shown += self._text(before)
                self._in_call = True
            if CALL_END not in self._held:
                return shown, tuple(calls)
            body, _, self._held = self._held.partition(CALL_END)
            self._in_call = False
            call = _call_in(body)
            if call is None:
                shown += self._text(f"{CALL_START}{body}{CALL_END}")
            else:
                calls.append(call)
                self._after_call = True
        certain = len(self._held) - overlap(self._held, CALL_START)
        shown += self._text(self._held[:certain])
        self._held = self._held[certain:]
        return shown, tuple(calls)

    def finish(self) -> str:
        """Return what was held back until the end was known: a call that was never closed is text."""
        rest = (CALL_START if self._in_call else "") + self._held
        return self._text(rest) + ("" if self._after_call else self._space)

    def _text(self, text: str) -> str:
        """Return text up to its trailing white space, which waits for what follows."""
        if self._after_call:
            text = text.lstrip()
            if not text:
                return ""
            self._after_call = False
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return kept


def _call_in(body: str) -> ToolCallSegment | None:
    try:
        call = json_text.read_object(body)
    except ValueError:
        return None
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict) or not TOOL_NAME.fullmatch(name):
        return None
    return ToolCallSegment(name, json_text.write(arguments))
