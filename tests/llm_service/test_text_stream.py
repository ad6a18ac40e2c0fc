"""Streamed text, joined, is what the reference prints: whole characters, cut at stops, stripped."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.prompt.text_stream import TextStream, overlap
from llm_service.prompt.tokenizer import Tokenizer, load_tokenizer
from tests.golden_cases import ALL_CHECKPOINTS, CHECKPOINTS, GOLDEN


@cache
def tokenizer(checkpoint: str = CHECKPOINTS[0]) -> Tokenizer:
    return load_tokenizer(GOLDEN / "checkpoints" / checkpoint)


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


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab", max_size=9), stop=st.text(alphabet="ab", min_size=1, max_size=6))
def test_an_overlap_is_the_longest_beginning_that_a_text_ends_with(text: str, stop: str) -> None:
    assert overlap(text, stop) == max(length for length in range(len(stop)) if text.endswith(stop[:length]))


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


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_in_every_family_are_the_beginning_of_the_whole(checkpoint: str, data: st.DataObject) -> None:
    chosen = tokenizer(checkpoint)
    token_ids = data.draw(st.lists(st.integers(0, chosen.size - 1), max_size=30))
    stream = TextStream(chosen)
    pieces = [*map(stream.push, token_ids), stream.finish()]
    # Half a character at the end of what has come so far reads as U+FFFD only once nothing more can come.
    for count in range(len(token_ids)):
        so_far = TextStream(chosen)
        shorter = "".join([*map(so_far.push, token_ids[:count]), so_far.finish()])
        assert shorter.startswith("".join(pieces[:count]))


@pytest.mark.parametrize("checkpoint", ["internvl2-8b-tiny", "internvl2-4b-tiny", "internvl2-40b-tiny"])
def test_a_character_spelled_in_bytes_is_never_sent_in_halves(checkpoint: str) -> None:
    chosen = tokenizer(checkpoint)
    of_byte = {chosen.bytes_of(token): token for token in range(chosen.size) if len(chosen.bytes_of(token)) == 1}
    stream = TextStream(chosen)
    token_ids = [chosen.encode("a")[0], *chosen.encode("😀"), of_byte[b"\xe6"], of_byte[b"\x96"], chosen.encode("b")[0]]
    pieces = [*map(stream.push, token_ids), stream.finish()]
    assert [piece for piece in pieces if piece] == ["a", "😀", "\N{REPLACEMENT CHARACTER}" * 2 + "b"]


def test_the_space_before_a_word_is_kept_within_an_answer_and_not_at_its_beginning() -> None:
    chosen = tokenizer("internvl2-4b-tiny")
    token_ids = chosen.encode(" model model")
    assert chosen.bytes_of(token_ids[0]).startswith(b" ")
    stream = TextStream(chosen)
    assert "".join([*map(stream.push, token_ids), stream.finish()]) == "model model"


def test_special_tokens_stay_on_request_as_they_stand() -> None:
    chosen = tokenizer("internvl2-8b-tiny")
    token_ids = [*chosen.encode("a<ref>b</ref>", markup=True), chosen.token_id("<|im_end|>")]
    stream = TextStream(chosen, include_special_tokens=True)
    assert "".join([*map(stream.push, token_ids), stream.finish()]) == "a<ref>b</ref><|im_end|>"
