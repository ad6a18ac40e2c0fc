"""Turns the world's dialogues into token ids by the serving code itself, so that training text is serving text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.nano.world import Dialogue, Kind, Part, Turn
from llm_service.prompt import dialogue as llm
from llm_service.prompt.splice import PromptTokens, splice
from llm_service.prompt.template import TEMPLATES, Template
from llm_service.prompt.tokenizer import Tokenizer, load_tokenizer
from shared.checkpoint import InternVLConfig, read_config


@dataclass(frozen=True, slots=True)
class Span:
    """An answer in a sequence of ids: its tokens, the stop token included."""

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Picture:
    """Where in a sequence a medium's visual tokens stand, and which medium of the situation it is."""

    start: int
    medium: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A whole dialogue as the model reads it: prompt, answers, and where the pictures are."""

    ids: tuple[int, ...]
    answers: tuple[Span, ...]
    pictures: tuple[Picture, ...]


class RememberingTokenizer(Tokenizer):
    """A tokenizer that encodes no text twice: the world says the same things over and over."""

    _MOST = 50_000

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.__dict__.update(tokenizer.__dict__)
        self._known: dict[tuple[str, bool], list[int]] = {}

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Return the ids as `Tokenizer` does; they are not to be changed."""
        ids = self._known.get((text, markup))
        if ids is None:
            ids = super().encode(text, markup=markup)
            if len(self._known) < self._MOST:
                self._known[text, markup] = ids
        return ids


class PromptWriter:
    """Writes prompts for one checkpoint directory; reads its config and tokenizer, not its weights."""

    def __init__(self, directory: Path) -> None:
        self.config: InternVLConfig = read_config(directory)
        self.tokenizer: Tokenizer = RememberingTokenizer(load_tokenizer(directory))
        template = TEMPLATES[self.config.template]
        self._template: Template = template.with_system_message(self.config.system_message)
        self.stop_id = self.tokenizer.token_id(template.stop_token)

    def prompt(self, dialogue: Sequence[Turn], tile_counts: Sequence[int], system_message: str | None) -> PromptTokens:
        """Return the prompt up to where the answer to the last turn begins."""
        turns = [turn for asked in dialogue for turn in self._turns(asked, tile_counts)][:-1]
        return splice(self._template.render(llm.Dialogue(tuple(turns), system_message)), self.tokenizer)

    def sequence(self, dialogue: Dialogue, tile_counts: Sequence[int], system_message: str | None) -> TokenSequence:
        """Return the dialogue with all its answers."""
        spans: list[Span] = []
        for length in range(1, len(dialogue) + 1):
            prompt = self.prompt(dialogue[:length], tile_counts, system_message)
            answer = self.answer_ids(dialogue[length - 1].answer)
            spans.append(Span(len(prompt.ids), len(prompt.ids) + len(answer), dialogue[length - 1].kind))
        pictures = tuple(Picture(place.start, int(place.ref.digest)) for place in prompt.placeholders)
        return TokenSequence((*prompt.ids, *answer), tuple(spans), pictures)

    def answer_ids(self, answer: str) -> list[int]:
        """Return what the model has to generate."""
        return [*self.tokenizer.encode(answer, markup=True), self.stop_id]

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids as the services would."""
        shown = [token for token in ids if token not in self.tokenizer.hidden_ids]
        return b"".join(map(self.tokenizer.bytes_of, shown)).decode(errors="replace").strip()

    def _turns(self, turn: Turn, tile_counts: Sequence[int]) -> tuple[llm.Turn, llm.Turn]:
        segments = tuple(self._segment(part, tile_counts) for part in turn.parts)
        return llm.Turn(llm.Role.USER, segments), llm.Turn(llm.Role.ASSISTANT, (llm.TextSegment(turn.answer),))

    def _segment(self, part: Part, tile_counts: Sequence[int]) -> llm.Segment:
        if isinstance(part, str):
            return llm.TextSegment(part)
        return llm.VisualSegment(tuple(self._ref(medium, tile_counts[medium]) for medium in part.media))

    def _ref(self, medium: int, tile_count: int) -> llm.EmbeddingRef:
        # In training the digest is only the medium's number.
        tokens = tile_count * self.config.tokens_per_tile
        return llm.EmbeddingRef(str(medium), tile_count, tokens, self.config.hidden_size, "float32", "")
