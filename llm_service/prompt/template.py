"""The conversation templates of the released models, rendered to pieces instead of to one string.

Only a template writes control tokens, and only a visual segment makes a placeholder: whatever a client types is a
`Text` piece and stays text. For well-formed input the joined pieces equal the reference's prompt string.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llm_service.prompt.dialogue import Dialogue, EmbeddingRef, Role, TextSegment, Turn

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
    """The positions that an embedding's visual tokens will take."""

    ref: EmbeddingRef


Piece = Control | Text | Placeholder


@dataclass(frozen=True, slots=True)
class Template:
    """Prefixes and separator as the reference writes them; `stop_token` ends an answer."""

    system_prefix: str
    user_prefix: str
    assistant_prefix: str
    separator: str
    stop_token: str
    system_message: str

    def with_system_message(self, system_message: str | None) -> "Template":
        """Return the template with another default system message; None changes nothing."""
        return self if system_message is None else replace(self, system_message=system_message)

    def render(self, dialogue: Dialogue) -> list[Piece]:
        """Return the prompt up to where the answer begins."""
        system = self.system_message if dialogue.system_message is None else dialogue.system_message
        pieces = [*_trusted(self.system_prefix), Text(system), *_trusted(self.separator)]
        for turn in dialogue.turns:
            pieces += self._render_turn(turn)
        return [*pieces, *_trusted(self.assistant_prefix)]

    def _render_turn(self, turn: Turn) -> Iterator[Piece]:
        yield from _trusted(self.user_prefix if turn.role is Role.USER else self.assistant_prefix)
        if turn.is_empty:
            return  # as in the reference: an empty message contributes its prefix only
        for segment in turn.segments:
            if isinstance(segment, TextSegment):
                yield Text(segment.text, markup=turn.role is Role.ASSISTANT)
            else:
                yield Control(IMG_START)
                yield from map(Placeholder, segment.embeddings)
                yield Control(IMG_END)
        yield from _trusted(self.separator)


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
    "internvl2_5": _chatml("<|im_end|>\n", _SYSTEM_V2_5),
}

_CONTROL = re.compile(r"(<\|[a-z_]+\|>)")


def _trusted(text: str) -> list[Piece]:
    """Split a template's own string into control tokens and text."""
    return [Control(part) if _CONTROL.fullmatch(part) else Text(part) for part in _CONTROL.split(text) if part]
