"""Turns the JSON schema of a request into the constraint that its answer follows."""

import asyncio
import signal
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import structlog
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from llm_service.prompt.tokenizer import Tokenizer
from llm_service.schema import check
from llm_service.schema.grammar import can_begin, grammar_of, leads_nowhere, matcher_of
from shared.errors import InvalidJsonSchema, QueueFull

log = structlog.get_logger()
MAX_SCHEMA_CHARACTERS = 65_536
MAX_WAITING = 16  # schemas that are being checked or wait for it
_MAX_KNOWN = 64  # verdicts on schemas that were used lately
_MAX_CHECKS = 2  # processes at a time
_CHECK_LIMIT_S = 30.0  # of waiting for a process that is limited in CPU seconds already
_FIELD = "generation_config.json_schema"
_NO_TEXT = "No text can meet the JSON schema."
_TOO_MUCH = "Following the JSON schema takes too much work."
# Verdicts that would be the same again. What ended a check otherwise may have been the machine's state.
_REFUSALS: Final[Mapping[int, str]] = {
    check.INVALID: "The JSON schema is malformed or uses what is not supported.",
    check.UNSATISFIABLE: _NO_TEXT,
    check.TOO_MUCH: _TOO_MUCH,
    -signal.SIGXCPU: _TOO_MUCH,
}


class SchemaConstraint:
    """Follows a schema's grammar, token by token. `vocabulary_size` is the model's."""

    def __init__(self, matcher: LLMatcher, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._vocabulary_size = vocabulary_size

    def copy(self) -> "SchemaConstraint":
        """Return another that stands where this one stands. Both share one limit on work: they are one request's."""
        return SchemaConstraint(self._matcher.deep_copy(), self._vocabulary_size)

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocabulary].

        Raises `InvalidJsonSchema` past the limits of the work, and where nothing can come next.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _failure(self._matcher)
        flags = np.unpackbits(packed, count=min(self._vocabulary_size, 8 * len(packed)), bitorder="little")
        allowed = np.zeros(self._vocabulary_size, bool)
        allowed[: len(flags)] = flags
        return torch.from_numpy(allowed)

    def accept(self, token_id: int) -> None:
        """Move past a token that was allowed."""
        self._matcher.consume_token(token_id)


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found out about a schema: its grammar, or why it is refused."""

    grammar: str = ""
    refusal: str = ""


@dataclass(slots=True)
class _Turn:
    """The requests that wait for one schema's verdict: the first to get the lock brings it for all of them."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_waiting: int = 0


class SchemaCompiler:
    """Makes constraints. Safe to use from any task of one event loop.

    Making the compiler reads the vocabulary, which takes seconds and lets no other thread run.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocabulary_size: int,
        stop_token_ids: frozenset[int],
        checked: Callable[[str], Awaitable[int]] | None = None,
    ) -> None:
        """Take the model's tokens, those that end an answer, and what returns the verdict on a schema."""
        self._vocabulary_size = vocabulary_size
        stops = frozenset(token_id for token_id in stop_token_ids if token_id < vocabulary_size)
        words = TokenizerWrapper(_Words(tokenizer, vocabulary_size, stops))
        self._words = LLTokenizer(words, n_vocab=vocabulary_size, eos_token=sorted(stops))
        self._checked = checked or _checked_apart
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._turns: dict[str, _Turn] = {}
        self._checks = asyncio.Semaphore(_MAX_CHECKS)
        # One thread: large grammars wait for one another, and neither for nor with the event loop.
        self._making = ThreadPoolExecutor(1, "schema")

    async def constraint(self, schema: str) -> SchemaConstraint:
        """Return a constraint of its own at its beginning.

        Raises `InvalidJsonSchema`, and `QueueFull` where too many other schemas wait to be checked.
        """
        if len(schema) > MAX_SCHEMA_CHARACTERS:
            raise InvalidJsonSchema(f"A JSON schema has at most {MAX_SCHEMA_CHARACTERS} characters.", field=_FIELD)
        known = await self._find_out(schema)
        if known.refusal:
            raise InvalidJsonSchema(known.refusal, field=_FIELD)
        # Copies of one matcher would share its memory of states and the limit on them between requests.
        return await asyncio.get_running_loop().run_in_executor(self._making, self._constraint, known.grammar)

    async def _find_out(self, schema: str) -> _Known:
        if schema not in self._known:
            turn = self._turn(schema)
            turn.num_waiting += 1
            try:
                async with turn.lock, self._checks:
                    if schema not in self._known:  # another request may have brought the same one meanwhile
                        self._keep(schema, await self._verdict_on(schema))
            finally:
                turn.num_waiting -= 1
                if not turn.num_waiting:
                    del self._turns[schema]
        self._known.move_to_end(schema)
        return self._known[schema]

    def _turn(self, schema: str) -> _Turn:
        if schema not in self._turns:
            if len(self._turns) >= MAX_WAITING:
                raise QueueFull("Too many JSON schemas are waiting to be checked.", retry_after_s=1.0)
            self._turns[schema] = _Turn()
        return self._turns[schema]

    def _keep(self, schema: str, known: _Known) -> None:
        self._known[schema] = known
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    async def _verdict_on(self, schema: str) -> _Known:
        verdict = await self._checked(schema)
        if verdict == check.SOUND:
            return _Known(await asyncio.get_running_loop().run_in_executor(self._making, grammar_of, schema))
        log.info("json_schema_refused", verdict=verdict, characters=len(schema))
        if verdict not in _REFUSALS:
            raise InvalidJsonSchema(_TOO_MUCH, field=_FIELD)
        return _Known(refusal=_REFUSALS[verdict])

    def _constraint(self, grammar: str) -> SchemaConstraint:
        matcher = matcher_of(grammar, self._words)
        if not can_begin(matcher):
            raise _failure(matcher)
        return SchemaConstraint(matcher, self._vocabulary_size)


def _failure(matcher: LLMatcher) -> InvalidJsonSchema:
    message = _NO_TEXT if not matcher.is_error() or leads_nowhere(matcher) else _TOO_MUCH
    return InvalidJsonSchema(message, field=_FIELD)


async def _checked_apart(schema: str) -> int:
    """Return the exit code of the check, negative for a signal."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", check.__name__, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_CHECK_LIMIT_S):
            await process.communicate(schema.encode())
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode


class _Words:
    """The model's vocabulary as the grammar library wants it. Control tokens never come out of a grammar."""

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(stop_token_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.bytes_of(token_id) for token_id in range(vocabulary_size)]
        # Neither do tokens that some families print with spaces around them: those are no part of what they spell.
        hidden = tokenizer.control_ids | tokenizer.hidden_ids | tokenizer.set_apart_ids | stop_token_ids
        self.special_token_ids = sorted(token_id for token_id in hidden if token_id < vocabulary_size)
        self._ids = {word: token_id for token_id, word in enumerate(self.tokens) if word and token_id not in hidden}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text that the grammar forces; they spell it exactly."""
        ids = self._tokenizer.encode(text.decode(errors="replace"))
        if b"".join(self.tokens[token_id] for token_id in ids) == text:
            return ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """Return the longest tokens from left to right; for families that write a text's first word in another way."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                return ids
            ids.append(self._ids[text[start:end]])
            start = end
        return ids
