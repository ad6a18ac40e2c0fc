"""From tokens to what a client sees of a candidate: text, calls of tools, log-probabilities, and how it ended."""

from functools import cache

import pytest

from llm_service.candidate import Candidate, CandidateResult, Delta
from llm_service.engine.sequence import FinishReason, TokenOutput
from llm_service.prompt.text_stream import TextStream
from llm_service.prompt.tokenizer import Tokenizer, load_tokenizer
from tests.golden_cases import GOLDEN

CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "left"}}\n</tool_call>'


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(GOLDEN / "checkpoints" / "internvl3-8b-tiny")


def said(
    text: str, *, reads_calls: bool = True, last: FinishReason = FinishReason.STOP, stops: tuple[str, ...] = ()
) -> tuple[str, CandidateResult, list[Delta]]:
    """Return what a client sees of a candidate that says `text` and then the end token."""
    stream = TextStream(tokenizer(), stops)
    candidate = Candidate(2, tokenizer(), stream, tells_logprobs=True, reads_calls=reads_calls)
    ids = tokenizer().encode(text)
    deltas = []
    for index, token in enumerate(ids):
        reason = last if index == len(ids) - 1 else None
        top = ((token, -0.5), (1, -2.0))
        deltas.append(candidate.push(TokenOutput(token, reason, top, logprob=-0.5, candidate=2), is_text=True))
        if candidate.has_ended:
            break
    if rest := candidate.finish():
        deltas.append(rest)
    return "".join(delta.text for delta in deltas), candidate.result(), deltas


def test_calls_of_tools_are_taken_out_of_the_text() -> None:
    text, result, _ = said(f"I look.\n{CALL}\n{CALL}")
    assert text == "I look."
    assert result.reason is FinishReason.TOOL_CALLS
    assert [(call.name, call.arguments_json) for call in result.tool_calls] == [("look", '{"where": "left"}')] * 2
    assert len({call.tool_call_id for call in result.tool_calls}) == 2


def test_where_no_tools_were_offered_calls_are_text() -> None:
    text, result, _ = said(CALL, reads_calls=False)
    assert text == CALL
    assert result.reason is FinishReason.STOP
    assert result.tool_calls == ()


@pytest.mark.parametrize("broken", [CALL[:-12], "<tool_call>{</tool_call>", '<tool_call>{"name": 1}</tool_call>'])
def test_a_malformed_call_stays_text(broken: str) -> None:
    text, result, _ = said(broken)
    assert text == broken.strip()
    assert result.reason is FinishReason.STOP


def test_an_answer_that_was_cut_says_so_even_behind_a_call() -> None:
    _, result, _ = said(f"{CALL}\nand then", last=FinishReason.LENGTH)
    assert result.reason is FinishReason.LENGTH
    assert len(result.tool_calls) == 1


def test_a_stop_sequence_ends_the_candidate_at_once() -> None:
    text, result, deltas = said("one two three", stops=(" two",), last=FinishReason.LENGTH)
    assert text == "one"
    assert result.reason is FinishReason.STOP
    assert result.num_output_tokens == len([delta for delta in deltas if delta.token_ids])
    assert result.num_output_tokens < len(tokenizer().encode("one two three"))


def test_logprobs_come_with_their_ids_and_the_tokens_bytes() -> None:
    _, result, deltas = said("one")
    for delta in deltas:
        assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
        for entry in delta.logprobs:
            assert entry.token == tokenizer().bytes_of(entry.token_id)
            assert [top.logprob for top in entry.top] == [-0.5, -2.0]
            assert entry.top[0].top == ()
        assert delta.candidate == 2
    assert result.mean_logprob == pytest.approx(-0.5)
