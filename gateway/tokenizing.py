"""What is served and how many tokens something takes, without answering anything."""

import time
from typing import Final, Protocol

from gateway.admission import Admission
from gateway.dialogue import Dialogue, Limits, check_dialogue
from gateway.encoder import MediaEncoder
from gateway.events import ChatRequest, ServedModel, TokenUsage
from gateway.media import MediaLibrary
from gateway.options import check_options, share_tiles
from gateway.prompt import Prompt, prompt_of
from shared.errors import InvalidRequest, ModelNotFound

_KNOWN_FOR_S: Final = 10.0  # a rolling update may well bring another model


class ModelFacts(Protocol):
    """What the LLM service says of its model. Raises what it answers, and `LlmUnavailable`."""

    async def describe_model(self) -> ServedModel:
        """Return what is served."""

    async def token_ids(self, prompt: Prompt | str) -> tuple[int, ...]:
        """Return the tokens of a prompt in the model's template, or of plain text without one."""


class ModelDirectory:
    """The model that is served, asked for now and then."""

    def __init__(self, facts: ModelFacts) -> None:
        self._facts = facts
        self._known: ServedModel | None = None
        self._known_until = 0.0

    async def served(self) -> ServedModel:
        """Return the model; raise `LlmUnavailable`."""
        if self._known is None or time.monotonic() >= self._known_until:
            self._known = await self._facts.describe_model()
            self._known_until = time.monotonic() + _KNOWN_FOR_S
        return self._known

    async def find(self, name: str) -> ServedModel:
        """Return the model of this name, which may stand behind its owner's, as in `OpenGVLab/InternVL3-8B`.

        Raises `ModelNotFound` for any other, and `LlmUnavailable`.
        """
        model = await self.served()
        if model.name not in (name, name.rpartition("/")[2]):
            raise ModelNotFound("There is no such model here; GET /v1/models names the one there is.", resource="model")
        return model


class Tokenizing:
    """Tells the tokens of what could be asked. Safe to share between calls."""

    def __init__(
        self,
        facts: ModelFacts,
        encoder: MediaEncoder,
        library: MediaLibrary,
        limits: Limits,
        admission: Admission | None = None,
    ) -> None:
        self._facts = facts
        self._encoder = encoder
        self._library = library
        self._limits = limits
        self._admission = admission or Admission()

    async def of_text(self, text: str) -> tuple[int, ...]:
        """Return the tokens of plain text."""
        if len(text) > self._limits.text_chars:
            raise InvalidRequest(f"A text has at most {self._limits.text_chars} characters.", field="text")
        return await self._facts.token_ids(text)

    async def of_dialogue(self, request: ChatRequest) -> tuple[int, ...]:
        """Return the tokens of a dialogue's prompt; its media are encoded, and the question that follows finds them.

        It takes a turn's place, and of budgets what a turn without an answer does. Raises what a turn raises before
        its first token.
        """
        check_options(request, self._limits)
        async with self._admission.turn(request) as place:
            dialogue = Dialogue(request.system_message, (), share_tiles(request.messages, request.max_total_tiles))
            check_dialogue(dialogue, self._limits)
            dialogue = await self._library.identify(dialogue)
            encoded = await self._encoder.encode(dialogue.placed_media)
            handles = {medium: each.handle for medium, each in encoded.items()}
            ids = await self._facts.token_ids(prompt_of(dialogue, handles, request.tools))
            place.settle(TokenUsage(prompt_tokens=len(ids)), encoded)
        return ids
