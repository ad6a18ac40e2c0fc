"""The conversation templates of the released models, rendered to pieces instead of to one string.

Only a template writes control tokens, and only a visual segment makes a placeholder: whatever a client types is a
`Text` piece and stays text. For well-formed input the joined pieces equal the reference's prompt string.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from llm_service.prompt import tools
from llm_service.prompt.dialogue import (
    Dialogue,
    EmbeddingRef,
    EmbeddingSlice,
    Role,
    Segment,
    TextSegment,
    ToolCallSegment,
    Turn,
    VisualSegment,
)

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


@dataclass(frozen=True, slots=True)
class Control:
    """One control token, by its string."""

    token: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text. `markup` allows the grounding markers, which a model writes in its own answers."""

    text: str
    markup: bool = False


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The positions that visual tokens will take: rows `offset` to `offset + length` of an embedding."""

    ref: EmbeddingRef
    offset: int
    length: int

    @classmethod
    def of(cls, run: EmbeddingSlice) -> "Placeholder":
        """Return the place of some rows of an embedding."""
        return cls(run.ref, run.offset, run.length)


@dataclass(frozen=True, slots=True)
class AnswerStart:
    """Where a turn of the model's begins, behind its prefix. Takes no position."""


Piece = Control | Text | Placeholder | AnswerStart


@dataclass(frozen=True, slots=True)
class Template:
    """Prefixes and separator as the reference writes them; `stop_token` ends an answer.

    `has_tool_form` says that models with this template know tools in Qwen2.5's form, if their tokenizer has its tokens.
    """

    system_prefix: str
    user_prefix: str
    assistant_prefix: str
    separator: str
    stop_token: str
    system_message: str
    has_tool_form: bool = False

    def with_system_message(self, system_message: str | None) -> "Template":
        """Return the template with another default system message; None changes nothing."""
        return self if system_message is None else replace(self, system_message=system_message)

    def render(self, dialogue: Dialogue) -> list[Piece]:
        """Return the prompt up to where the answer begins."""
        system = self.system_message if dialogue.system_message is None else dialogue.system_message
        said = Text(system + tools.introduction(dialogue.tools))
        pieces = [*_trusted(self.system_prefix), said, *_trusted(self.separator)]
        for role, turns in groupby(dialogue.turns, key=lambda turn: turn.role):
            if role is Role.TOOL:
                pieces += self._render_results(turns)
            else:
                for turn in turns:
                    pieces += self._render_turn(turn, markup=role is Role.ASSISTANT or dialogue.grounding)
        return [*pieces, *_trusted(self.assistant_prefix), AnswerStart()]

    def _render_turn(self, turn: Turn, *, markup: bool) -> Iterator[Piece]:
        if turn.role is Role.USER:
            yield from _trusted(self.user_prefix)
        else:
            yield from _trusted(self.assistant_prefix)
            yield AnswerStart()
        if turn.is_empty:
            return  # as in the reference: an empty message contributes its prefix only
        for segment in turn.segments:
            yield from _render_segment(segment, markup=markup)
        calls = [tools.written_call(segment) for segment in turn.segments if isinstance(segment, ToolCallSegment)]
        if calls:
            text_before = any(isinstance(segment, TextSegment) and segment.text for segment in turn.segments)
            yield Text("\n" * text_before + "\n".join(calls), markup)
        yield from _trusted(self.separator)

    def _render_results(self, turns: Iterator[Turn]) -> Iterator[Piece]:
        """Write the results of one answer's calls as one user turn."""
        texts = (
            "".join(segment.text for segment in turn.segments if isinstance(segment, TextSegment)) for turn in turns
        )
        yield from _trusted(self.user_prefix)
        yield Text("\n".join(map(tools.written_result, texts)))
        yield from _trusted(self.separator)


def _render_segment(segment: Segment, *, markup: bool) -> Iterator[Piece]:
    match segment:
        case TextSegment(text):
            yield Text(text, markup)
        case VisualSegment():
            yield Control(IMG_START)
            yield from map(Placeholder.of, segment.slices)
            yield Control(IMG_END)
        case ToolCallSegment():
            pass  # calls end a turn, wherever in it they stand


_SYSTEM_V2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "  # noqa: RUF001  the models' own
    "是一个有用无害的人工智能助手。"
)
_SYSTEM_V2_5 = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001  the models' own
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _chatml(separator: str, system_message: str) -> Template:
    return Template(
        system_prefix="<|im_start|>system\n",
        user_prefix="<|im_start|>user\n",
        assistant_prefix="<|im_start|>assistant\n",
        separator=separator,
        stop_token="<|im_end|>",  # noqa: S106  a token of the vocabulary, no secret
        system_message=system_message,
    )


TEMPLATES: Mapping[str, Template] = {
    "Hermes-2": _chatml("<|im_end|>", _SYSTEM_V2),
    "internlm2-chat": _chatml("<|im_end|>", _SYSTEM_V2),
    "phi3-chat": Template(
        system_prefix="<|system|>\n",
        user_prefix="<|user|>\n",
        assistant_prefix="<|assistant|>\n",
        separator="<|end|>",
        stop_token="<|end|>",  # noqa: S106  a token of the vocabulary, no secret
        system_message=_SYSTEM_V2,
    ),
    "internvl2_5": replace(_chatml("<|im_end|>\n", _SYSTEM_V2_5), has_tool_form=True),
}

_CONTROL = re.compile(r"(<\|[a-z_]+\|>)")
# Every control token that a template writes; a tokenizer lets none of them come out of text, whatever its files say.
CHAT_TOKENS: Final = frozenset(
    token
    for template in TEMPLATES.values()
    for part in (template.system_prefix, template.user_prefix, template.assistant_prefix, template.separator)
    for token in _CONTROL.findall(part)
)


def _trusted(text: str) -> list[Piece]:
    """Split a template's own string into control tokens and text."""
    return [Control(part) if _CONTROL.fullmatch(part) else Text(part) for part in _CONTROL.split(text) if part]
