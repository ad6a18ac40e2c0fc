"""Where and for what a dialogue is probed, so that a critic's words can be read off one pass over it."""

from llm_service.engine.sequence import Probe
from llm_service.prompt.dialogue import Dialogue, Role, TextSegment, Turn
from llm_service.prompt.splice import PromptTokens, splice
from llm_service.prompt.template import AnswerStart, Control, Text
from llm_service.prompt.writer import PromptWriter
from shared.errors import InvalidRequest


def probe_of(writer: PromptWriter, dialogue: Dialogue, prompt: PromptTokens, choices: tuple[str, ...]) -> Probe:
    """Return the probe of each of the model's turns, or raise `InvalidRequest` naming the turn or choice at fault."""
    words = _Words(writer)
    token_ids = tuple(words.token_id(choice, "choices") for choice in choices)
    if len(set(token_ids)) != len(token_ids):
        raise InvalidRequest("The choices are different words.", field="choices")
    starts = iter(prompt.answer_starts)
    for index, turn in enumerate(dialogue.turns):
        if turn.role is Role.ASSISTANT:
            field = f"prompt.turns[{index}].segments"
            if prompt.ids[next(starts)] != words.token_id(_text_of(turn, field), field):
                raise InvalidRequest("The word runs into what stands before it.", field=field)
    return Probe(tuple(start - 1 for start in prompt.answer_starts), token_ids)


class _Words:
    """The tokens of single words, as they stand at the beginning of an answer."""

    def __init__(self, writer: PromptWriter) -> None:
        self._tokenizer = writer.tokenizer
        opening = writer.template.render(Dialogue((Turn(Role.USER, (TextSegment("?"),)),)))
        last_control = max(index for index, piece in enumerate(opening) if isinstance(piece, Control))
        self._opening = opening[last_control:]
        assert isinstance(self._opening[-1], AnswerStart)
        self._before = splice(self._opening, self._tokenizer).ids
        self._known: dict[str, int] = {}

    def token_id(self, word: str, field: str) -> int:
        """Return the word's one token, or raise `InvalidRequest` if it has more or runs into the answer's prefix."""
        if word not in self._known:
            ids = splice([*self._opening, Text(word, markup=True)], self._tokenizer).ids
            if ids[:-1] != self._before:
                raise InvalidRequest("A word to be scored is a single token of the model.", field=field)
            self._known[word] = ids[-1]
        return self._known[word]


def _text_of(turn: Turn, field: str) -> str:
    texts = [segment.text for segment in turn.segments if isinstance(segment, TextSegment)]
    if len(texts) != len(turn.segments):
        raise InvalidRequest("A turn to be scored is one word.", field=field)
    return "".join(texts)
