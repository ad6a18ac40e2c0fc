"""One candidate's way from tokens to what the client is shown: text, log-probabilities and calls of tools."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from llm_service.engine.sequence import FinishReason, TokenOutput
from llm_service.prompt.dialogue import ToolCallSegment
from llm_service.prompt.text_stream import TextStream
from llm_service.prompt.tokenizer import Tokenizer
from llm_service.prompt.tool_calls import ToolCallReader


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, and at its own step the likeliest ones. `token` are its bytes."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of a candidate that became certain, the ids generated since, and their log-probabilities if asked for."""

    text: str
    token_ids: tuple[int, ...]
    candidate: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


def joined(deltas: Sequence[Delta]) -> Delta:
    """Return deltas of one candidate that follow one another, at least one, as one."""
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        deltas[0].candidate,
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
    )


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments_json: str
    tool_call_id: str


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """How a candidate ended. `mean_logprob` is 0 where no log-probabilities were computed."""

    reason: FinishReason
    num_output_tokens: int
    mean_logprob: float = 0.0
    tool_calls: tuple[ToolCall, ...] = ()


class Candidate:
    """Takes a candidate's tokens in order. `tells_logprobs` adds them to the deltas, `reads_calls` takes calls out."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, text: TextStream, *, tells_logprobs: bool, reads_calls: bool
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._text = text
        self._tells_logprobs = tells_logprobs
        self._calls = ToolCallReader() if reads_calls else None
        self._tool_calls: list[ToolCall] = []
        self._num_tokens = 0
        self._logprob_sum = 0.0
        self._reason: FinishReason | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is wanted: the engine said so, or a stop sequence appeared."""
        return self._reason is not None

    def push(self, output: TokenOutput, *, is_text: bool) -> Delta:
        """Take the next token, which is shown if it `is_text`."""
        self._num_tokens += 1
        self._logprob_sum += output.logprob or 0.0
        text = self._shown(self._text.push(output.token_id)) if is_text else ""
        self._reason = FinishReason.STOP if self._text.stopped else output.finish_reason
        return Delta(text, (output.token_id,), self._index, self._logprobs(output))

    def finish(self) -> Delta | None:
        """Return what was held back until the end was known, if that is anything."""
        rest = self._shown(self._text.finish())
        if self._calls is not None:
            rest += self._calls.finish()
        return Delta(rest, (), self._index) if rest else None

    def result(self) -> CandidateResult:
        """Return how it ended, after `finish`."""
        reason = self._reason or FinishReason.STOP
        if self._tool_calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        mean = self._logprob_sum / max(1, self._num_tokens)
        return CandidateResult(reason, self._num_tokens, mean, tuple(self._tool_calls))

    def _shown(self, text: str) -> str:
        if self._calls is None or not text:
            return text
        shown, calls = self._calls.push(text)
        self._tool_calls += map(_named, calls)
        return shown

    def _logprobs(self, output: TokenOutput) -> tuple[TokenLogprob, ...]:
        if not self._tells_logprobs or output.logprob is None:
            return ()
        top = tuple(TokenLogprob(token, self._bytes_of(token), logprob) for token, logprob in output.top_logprobs)
        return (TokenLogprob(output.token_id, self._bytes_of(output.token_id), output.logprob, top),)

    def _bytes_of(self, token_id: int) -> bytes:
        return self._tokenizer.bytes_of(token_id)


def _named(call: ToolCallSegment) -> ToolCall:
    return ToolCall(call.name, call.arguments_json, f"call_{secrets.token_hex(12)}")
