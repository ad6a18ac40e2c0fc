"""Blocks are given out side by side, shared by key, kept while there is room, and never lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.sequence import Sequence
from tests.llm_service.fakes_llm import request


def sequence(num_tokens: int = 1) -> Sequence:
    return Sequence(request([1] * num_tokens), lambda output: None, 0.0)


def given_blocks(blocks: BlockManager, num_tokens: int) -> Sequence:
    seq = sequence(num_tokens)
    assert blocks.start(seq, [], num_tokens)
    return seq


def published(blocks: BlockManager, seq: Sequence, name: bytes) -> list[bytes]:
    keys = [name + bytes([index]) for index in range(len(seq.block_table))]
    for block, key in zip(seq.block_table, keys, strict=True):
        blocks.publish(block, key)
    return keys


def is_run(table: list[int]) -> bool:
    return table == list(range(table[0], table[0] + len(table)))


def test_sequences_that_grow_in_turn_have_their_blocks_side_by_side() -> None:
    blocks = BlockManager(256, 4)
    seqs = [given_blocks(blocks, 20) for _ in range(4)]
    for num_tokens in range(20, 120):
        assert all(blocks.grow(seq, num_tokens) for seq in seqs)
    assert all(is_run(seq.block_table) for seq in seqs)


def test_a_long_prompt_takes_a_gap_that_holds_it() -> None:
    blocks = BlockManager(100, 4)
    first = given_blocks(blocks, 40)
    second = given_blocks(blocks, 80 * 4)
    assert is_run(first.block_table)
    assert is_run(second.block_table)


def test_what_is_kept_is_found_and_read_by_several() -> None:
    blocks = BlockManager(8, 4)
    seq = given_blocks(blocks, 12)
    keys = published(blocks, seq, b"a")
    table = seq.block_table
    blocks.release(seq)
    assert (blocks.num_free, blocks.num_kept) == (8, 3)
    found = blocks.find([*keys, b"other"])
    assert found == table
    one, two = sequence(), sequence()
    assert blocks.start(one, found, 16)
    assert blocks.start(two, found, 16)
    assert (blocks.num_free, blocks.num_kept) == (3, 0)
    blocks.release(one)
    assert blocks.find(keys) == found
    blocks.release(two)
    assert blocks.num_free == 8


def test_a_gap_in_what_is_known_ends_the_search() -> None:
    blocks = BlockManager(8, 4)
    seq = given_blocks(blocks, 12)
    keys = published(blocks, seq, b"a")
    assert blocks.find([keys[0], b"unknown", keys[2]]) == seq.block_table[:1]


def test_empty_blocks_go_before_kept_ones_and_those_read_longest_ago_before_others() -> None:
    blocks = BlockManager(6, 4)
    old, new = given_blocks(blocks, 8), given_blocks(blocks, 8)
    old_keys, new_keys = published(blocks, old, b"o"), published(blocks, new, b"n")
    blocks.release(old)
    blocks.release(new)
    given_blocks(blocks, 8)
    assert len(blocks.find(old_keys)) == len(blocks.find(new_keys)) == 2
    given_blocks(blocks, 4)
    assert len(blocks.find(old_keys)) == 1, "the end of a prompt goes before its beginning"
    given_blocks(blocks, 4)
    assert blocks.find(old_keys) == []
    assert len(blocks.find(new_keys)) == 2


def test_what_was_found_counts_as_room_only_once() -> None:
    blocks = BlockManager(4, 4)
    seq = given_blocks(blocks, 12)
    keys = published(blocks, seq, b"a")
    blocks.release(seq)
    asking = sequence()
    assert not blocks.start(asking, blocks.find(keys), 20)
    assert asking.block_table == []
    assert (blocks.num_free, blocks.num_kept) == (4, 3)
    assert blocks.start(asking, blocks.find(keys), 16)
    assert blocks.num_free == 0


def test_two_blocks_of_one_key_are_known_by_the_first() -> None:
    blocks = BlockManager(4, 4)
    one, two = given_blocks(blocks, 4), given_blocks(blocks, 4)
    blocks.publish(one.block_table[0], b"k")
    blocks.publish(two.block_table[0], b"k")
    first = one.block_table[0]
    assert blocks.find([b"k"]) == [first]
    blocks.release(two)
    assert blocks.num_kept == 0
    blocks.release(one)
    assert (blocks.num_kept, blocks.find([b"k"])) == (1, [first])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["start", "grow", "release", "forget", "share"]), st.integers(0, 9)), max_size=60
    )
)
def test_no_block_is_ever_lost_or_given_twice(steps: list[tuple[str, int]]) -> None:
    blocks = BlockManager(24, 4)
    seqs: list[Sequence] = []
    names = iter(range(1000))
    for step, number in steps:
        picked = seqs[number % len(seqs)] if seqs else None
        if step == "start":
            seq = sequence()
            if blocks.start(seq, [], 4 * number + 1):
                seqs.append(seq)
        elif step == "forget":
            blocks.forget()
        elif picked and step == "grow":
            blocks.grow(picked, 4 * (len(picked.block_table) + number))
        elif picked and step == "share":
            found = blocks.find(published(blocks, picked, b"%d" % next(names)))
            seq = sequence()
            if blocks.start(seq, found, 4 * (len(found) + number % 3)):
                seqs.append(seq)
        elif picked:
            blocks.release(picked)
            seqs.remove(picked)
        held = {block for seq in seqs for block in seq.block_table}
        assert blocks.num_free == 24 - len(held)
    for seq in seqs:
        blocks.release(seq)
    assert blocks.num_free == 24
    assert sorted(given_blocks(blocks, 96).block_table) == list(range(24))
