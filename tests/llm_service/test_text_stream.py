"""Streamed text, joined, is what the reference prints: whole characters, cut at stops, stripped."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.prompt.text_stream import TextStream
from llm_service.prompt.tokenizer import Tokenizer, load_tokenizer
from tests.golden_cases import CHECKPOINTS, GOLDEN


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(GOLDEN / "checkpoints" / CHECKPOINTS[0])


def streamed(token_ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer(), stops)
    pieces = []
    for token in token_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def at_once(token_ids: list[int], stops: tuple[str, ...] = ()) -> str:
    visible = [token for token in token_ids if token not in tokenizer().hidden_ids]
    text = b"".join(map(tokenizer().bytes_of, visible)).decode(errors="replace")
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)].strip() if ends else text.strip()


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.integers(0, 510), max_size=40))
def test_any_tokens_give_the_text_of_the_whole(token_ids: list[int]) -> None:
    assert "".join(streamed(token_ids)) == at_once(token_ids)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab \n。", max_size=40),
    stops=st.lists(st.text(alphabet="ab \n。", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_where_the_earliest_stop_sequence_begins(text: str, stops: list[str]) -> None:
    # One token per byte, so that stops and characters are split in every way.
    token_ids = [token for byte in text.encode() for token in tokenizer_ids_of_byte(byte)]
    # Streaming stops at the first sequence that is complete; of sequences inside one another that is the shorter.
    result = "".join(streamed(token_ids, tuple(stops)))
    assert at_once(token_ids).startswith(result) or result == at_once(token_ids, tuple(stops))
    assert not any(stop in result for stop in stops)


@cache
def tokenizer_ids_of_byte(byte: int) -> tuple[int, ...]:
    return (next(token for token in range(512) if tokenizer().bytes_of(token) == bytes([byte])),)


def test_a_character_is_never_sent_in_halves() -> None:
    token_ids = [token for byte in "é文😀".encode() for token in tokenizer_ids_of_byte(byte)]
    assert [piece for piece in streamed(token_ids) if piece] == ["é", "文", "😀"]


def test_nothing_of_a_stop_sequence_is_sent_before_it_is_known_not_to_be_one() -> None:
    token_ids = [token for byte in b"abcabd!" for token in tokenizer_ids_of_byte(byte)]
    assert streamed(token_ids, ("abd",)) == ["", "", "abc", "", "", "", ""]


def test_half_a_character_behind_a_stop_sequence_is_not_sent() -> None:
    token_ids = [token for byte in b"Hi." + b"\xe2\x80" for token in tokenizer_ids_of_byte(byte)]
    stream = TextStream(tokenizer(), (".",))
    assert "".join([stream.push(token) for token in token_ids] + [stream.finish()]) == "Hi"


def test_white_space_waits_for_what_follows_it() -> None:
    token_ids = [token for byte in b"  a  b  " for token in tokenizer_ids_of_byte(byte)]
    assert streamed(token_ids) == ["", "", "a", "", "", "  b", "", "", ""]
