"""What a turn is guessed to cost, before anything is known of it and after."""

from dataclasses import replace

import pytest

from gateway.caller import Caller
from gateway.content import MediaPart, Medium, PreprocessOptions, VideoOptions
from gateway.events import CacheTier, GenerationConfig
from gateway.weight import Scales, encoded_tiles
from shared.digest import digest_of
from tests.gateway.acting import acting_for
from tests.gateway.fakes_gateway import CAT, DOG, ask, by_digest, embedded, inline, user

ANSWER = GenerationConfig(max_output_tokens=10)


def shown(content: bytes, tiles: int, tier: CacheTier = CacheTier.STORE) -> tuple[Medium, object]:
    medium = Medium(digest_of(content))
    encoded = embedded(medium, tier)
    return medium, replace(encoded, handle=replace(encoded.handle, tile_count=tiles))


def test_text_weighs_a_token_for_four_bytes_and_the_answer_what_it_may_be_long() -> None:
    weight = Scales().guess(ask(user("x" * 400), config=ANSWER))
    assert (weight.tokens, weight.tiles) == (110, 0)
    assert Scales().guess(ask(user("猫" * 400), config=ANSWER)).tokens == 310
    assert Scales().guess(ask(user("x" * 400), config=replace(ANSWER, candidate_count=3))).tokens == 130


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        (PreprocessOptions(), 13),
        (PreprocessOptions(max_tiles=6), 7),
        (PreprocessOptions(max_tiles=6, thumbnail=False), 6),
        (PreprocessOptions(max_tiles=1), 1),
        (PreprocessOptions(video=VideoOptions(segment_count=16)), 16),
        (PreprocessOptions(video=VideoOptions(), max_tiles=2), 16),
    ],
)
def test_a_picture_that_nobody_has_seen_weighs_all_its_tiles(options: PreprocessOptions, tiles: int) -> None:
    part = MediaPart((Medium("", options, CAT),))
    weight = Scales().guess(ask(user(part, "?"), config=ANSWER))
    assert (weight.tiles, weight.tokens) == (tiles, 256 * tiles + 1 + 10)


def test_a_budget_of_tiles_bounds_the_guess() -> None:
    request = ask(user(inline(CAT), inline(DOG), "?"), config=ANSWER, max_total_tiles=4)
    assert Scales().guess(request).tiles == 4


def test_a_picture_that_was_seen_weighs_its_tokens_and_nothing_to_encode() -> None:
    scales = Scales()
    scales.note(dict([shown(CAT, 5)]))
    weight = scales.guess(ask(user(by_digest(CAT), "?"), config=ANSWER))
    assert (weight.tiles, weight.tokens) == (0, 5 * 256 + 11)


def test_what_one_tenant_has_seen_tells_another_nothing() -> None:
    scales = Scales()
    with acting_for(Caller("one")):
        scales.note(dict([shown(CAT, 5)]))
    with acting_for(Caller("other")):
        assert scales.guess(ask(user(by_digest(CAT), "?"))).tiles == 13


def test_only_tiles_that_had_to_be_made_count_as_encoded() -> None:
    made, stored = shown(CAT, 5, CacheTier.NONE), shown(DOG, 7, CacheTier.STORE)
    assert encoded_tiles(dict([made, stored])) == 5
    medium, encoded = made
    assert encoded_tiles({medium: replace(encoded, coalesced=True)}) == 0
