"""Media without a question, by both clients, against a scripted gateway."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest

from internvl_client import (
    AsyncClient,
    CacheTier,
    Client,
    DeadlineError,
    Estimate,
    Image,
    InternVLError,
    InvalidRequestError,
    Media,
    NotFoundError,
    Receipt,
    ServerError,
    UnavailableError,
    Video,
)
from internvl_client.media_plan import PrefetchTally
from tests.client.fake_gateway import FakeGateway

SMALL = Image.from_bytes(b"small", max_tiles=2, thumbnail=False)
LARGE = Image.from_bytes(os.urandom(300 << 10))
CLIP = Video.from_bytes(os.urandom(300 << 10), num_segments=4)
HUGE = Image.from_bytes(os.urandom((4 << 20) + 5))
ESTIMATE = Estimate(width=640, height=480, columns=4, rows=3, num_tiles=13, num_tokens=3328)


class Awaited:
    """The asyncio client with the methods of the blocking one, so that a test holds for both."""

    def __init__(self, address: str) -> None:
        async def made() -> AsyncClient:
            return AsyncClient(address, timeout_s=20)

        self._runner = asyncio.Runner()
        self._client = self._runner.run(made())

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self._runner.run(getattr(self._client, name)(*given, **named))

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[Client, Awaited], ids=["blocking", "asyncio"])
def client(request: pytest.FixtureRequest, gateway: FakeGateway) -> Iterator[Client]:
    made = request.param(gateway.address)
    yield made
    made.close()


def told(outcomes: list[Receipt | InternVLError]) -> list[str]:
    return [outcome.reason if isinstance(outcome, InternVLError) else outcome.media_digest for outcome in outcomes]


# Prefetch.


def test_receipts_come_in_the_order_asked(gateway: FakeGateway, client: Client) -> None:
    seen: list[tuple[int, int]] = []
    outcomes = client.prefetch([SMALL, LARGE, CLIP], on_progress=lambda *counts: seen.append(counts))
    assert told(outcomes) == [SMALL.digest, LARGE.digest, CLIP.digest]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    first, second, _ = outcomes
    assert isinstance(first, Receipt)
    assert isinstance(second, Receipt)
    assert (first.num_tiles, first.columns, first.rows, first.num_tokens) == (13, 4, 3, 3328)
    assert (first.cache_tier, second.cache_tier, second.cache_hit) == (CacheTier.NONE, CacheTier.STORE, True)
    assert first.transfer_tier is CacheTier.UNSPECIFIED


def test_small_media_travel_inline_and_large_ones_are_uploaded_once(gateway: FakeGateway, client: Client) -> None:
    client.prefetch([SMALL, LARGE, CLIP])
    client.prefetch([CLIP])
    client.ask(LARGE, "What?")
    assert gateway.asked == [[LARGE.digest, CLIP.digest]]
    assert gateway.uploads == [[300 << 10]] * 2
    small, large, clip = gateway.prefetches[0].media
    assert (small.inline, small.options.max_tiles, small.options.thumbnail) == (b"small", 2, False)
    assert (large.digest, clip.digest, clip.options.video.segment_count) == (LARGE.digest, CLIP.digest, 4)


def test_more_media_than_a_call_takes_go_in_several(gateway: FakeGateway, client: Client) -> None:
    media = [Image.from_bytes(str(number).encode()) for number in range(2001)]
    seen: list[int] = []
    outcomes = client.prefetch(media, on_progress=lambda done, total: seen.append(done))
    assert told(outcomes) == [medium.digest for medium in media]
    assert [len(request.media) for request in gateway.prefetches] == [1000, 1000, 1]
    assert seen == list(range(1, 2002))


def test_more_bytes_than_a_message_takes_go_in_several_calls(gateway: FakeGateway, client: Client) -> None:
    media = [Image.from_bytes(os.urandom(256 << 10)) for _ in range(18)]
    assert told(client.prefetch([LARGE, *media])) == [medium.digest for medium in (LARGE, *media)]
    assert [len(request.media) for request in gateway.prefetches] == [17, 2]
    assert max(request.ByteSize() for request in gateway.prefetches) < 5 << 20


def test_a_medium_that_fails_is_an_error_of_its_own(gateway: FakeGateway, client: Client) -> None:
    gateway.refused = {SMALL.digest: "MEDIA_UNREADABLE"}
    error, receipt, missing = client.prefetch([SMALL, LARGE, Image.from_digest("0" * 64)], request_id="mine")
    assert isinstance(error, InvalidRequestError)
    assert (error.reason, error.field, error.message, error.request_id) == (
        "MEDIA_UNREADABLE",
        "media[0]",
        "Ours.",
        "mine",
    )
    assert isinstance(receipt, Receipt)
    assert isinstance(missing, NotFoundError)
    assert missing.resource == "0" * 64
    assert gateway.metadata[-1]["x-request-id"] == "mine"


def test_a_medium_that_the_server_does_not_take_is_an_error_of_its_own(gateway: FakeGateway, client: Client) -> None:
    gateway.refused = {CLIP.digest: "MEDIA_TOO_LARGE"}
    seen: list[int] = []
    media: list[Media] = [LARGE, CLIP, SMALL]
    for _ in range(2):
        outcomes = client.prefetch(media, on_progress=lambda done, total: seen.append(done))
        assert told(outcomes) == [LARGE.digest, "MEDIA_TOO_LARGE", SMALL.digest]
    assert seen == [1, 2, 3] * 2
    # It is offered again: nobody believes that the server holds it.
    assert gateway.asked == [[LARGE.digest, CLIP.digest], [CLIP.digest]]
    assert told(client.prefetch([CLIP])) == ["MEDIA_TOO_LARGE"]
    assert [len(request.media) for request in gateway.prefetches] == [2, 2]


def test_media_that_the_server_has_lost_are_uploaded_again(gateway: FakeGateway, client: Client) -> None:
    client.prefetch([LARGE, CLIP])
    gateway.media.clear()
    seen: list[int] = []
    outcomes = client.prefetch([LARGE, SMALL, CLIP], on_progress=lambda done, total: seen.append(done))
    assert told(outcomes) == [LARGE.digest, SMALL.digest, CLIP.digest]
    assert seen == [1, 2, 3]
    assert len(gateway.uploads) == 4
    assert [len(request.media) for request in gateway.prefetches] == [2, 3, 2]


class ForgetfulGateway(FakeGateway):
    """Loses what it is given."""

    def Upload(self, request_iterator: Any, context: Any) -> Any:
        response = super().Upload(request_iterator, context)
        self.media.clear()
        return response


@pytest.mark.parametrize("gateway_class", [ForgetfulGateway])
def test_a_medium_that_stays_lost_is_an_error_after_one_more_try(gateway: FakeGateway, client: Client) -> None:
    assert told(client.prefetch([LARGE, SMALL])) == ["MEDIA_NOT_FOUND", SMALL.digest]
    assert len(gateway.uploads) == 2
    assert [len(request.media) for request in gateway.prefetches] == [2, 1]


def test_a_medium_of_which_the_server_says_nothing_is_an_error(gateway: FakeGateway, client: Client) -> None:
    gateway.prefetch_limit = 1
    nothing, receipt = client.prefetch([SMALL, LARGE])
    assert isinstance(nothing, ServerError)
    assert isinstance(receipt, Receipt)


def test_no_media_are_no_call(gateway: FakeGateway, client: Client) -> None:
    assert client.prefetch([]) == []
    assert gateway.prefetches == []


def test_a_request_id_that_no_server_takes_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="request id"):
        client.prefetch([SMALL], request_id="not fit")


class StallingGateway(FakeGateway):
    """Answers for one medium, and then waits for the end of the call."""

    def Prefetch(self, request: Any, context: Any) -> Any:
        context.add_callback(self.cancelled.set)
        yield self._prefetched(0, request.media[0])
        self.cancelled.wait(20)


@pytest.mark.parametrize("gateway_class", [StallingGateway])
def test_a_caller_that_leaves_ends_the_call(gateway: FakeGateway, client: Client) -> None:
    class Left(Exception):
        pass

    def leave(done: int, total: int) -> None:
        raise Left

    with pytest.raises(Left):
        client.prefetch([SMALL, SMALL], on_progress=leave)
    assert gateway.cancelled.wait(5)


@pytest.mark.parametrize("gateway_class", [StallingGateway])
def test_a_deadline_ends_the_call(gateway: FakeGateway, client: Client) -> None:
    with pytest.raises(DeadlineError):
        client.prefetch([SMALL, SMALL], timeout_s=0.3)
    assert gateway.cancelled.wait(5)


def test_equal_media_are_each_answered() -> None:
    tally = PrefetchTally([SMALL, SMALL], None, "call")
    (call,) = tally.calls()
    assert [medium.inline for medium in call.request().media] == [b"small"] * 2
    assert [type(outcome) for outcome in tally.outcomes()] == [ServerError] * 2


# Estimates.


def test_an_estimate_takes_the_first_bytes(gateway: FakeGateway, client: Client) -> None:
    gateway.header_bytes = 64 << 10
    assert client.estimate(HUGE) == ESTIMATE
    assert [len(request.media.inline) for request in gateway.estimates] == [64 << 10]
    assert gateway.uploads == []


def test_the_options_of_a_picture_go_with_it(gateway: FakeGateway, client: Client) -> None:
    client.estimate(SMALL)
    (request,) = gateway.estimates
    assert (request.media.inline, request.media.options.max_tiles) == (b"small", 2)
    assert request.media.options.HasField("thumbnail")


def test_a_picture_whose_first_bytes_are_not_enough_is_sent_whole(gateway: FakeGateway, client: Client) -> None:
    gateway.header_bytes = 300 << 10
    assert client.estimate(LARGE) == ESTIMATE
    assert [len(request.media.inline) for request in gateway.estimates] == [64 << 10, 300 << 10]
    assert gateway.uploads == []


def test_a_picture_too_large_for_a_message_is_uploaded(gateway: FakeGateway, client: Client) -> None:
    gateway.header_bytes = 4 << 20
    assert client.estimate(HUGE) == ESTIMATE
    assert [request.media.digest for request in gateway.estimates] == ["", HUGE.digest]
    # Lost meanwhile, as any upload can be: asked about again before it is named.
    gateway.media.clear()
    assert client.estimate(HUGE) == ESTIMATE
    assert len(gateway.uploads) == 2


def test_a_picture_that_is_none_is_an_error(gateway: FakeGateway, client: Client) -> None:
    gateway.header_bytes = 1 << 30
    for picture, tries in ((SMALL, 1), (LARGE, 2), (HUGE, 2)):
        gateway.estimates.clear()
        with pytest.raises(InvalidRequestError) as caught:
            client.estimate(picture)
        assert (caught.value.reason, len(gateway.estimates)) == ("MEDIA_UNREADABLE", tries)


def test_a_picture_without_bytes_is_estimated_by_its_digest(gateway: FakeGateway, client: Client) -> None:
    with pytest.raises(NotFoundError):
        client.estimate(Image.from_digest(LARGE.digest))
    client.upload(LARGE)
    assert client.estimate(Image.from_digest(LARGE.digest, max_tiles=6)) == ESTIMATE
    assert gateway.estimates[-1].media.options.max_tiles == 6


# Deletion.


def test_a_medium_is_deleted_by_itself_or_its_digest(gateway: FakeGateway, client: Client) -> None:
    assert client.delete_medium(SMALL) == client.delete_medium(CLIP.digest) == 2
    assert gateway.deleted == [SMALL.digest, CLIP.digest]


def test_a_medium_that_was_deleted_is_uploaded_when_it_is_used_again(gateway: FakeGateway, client: Client) -> None:
    client.ask(LARGE, "First")
    client.delete_medium(LARGE)
    client.ask(LARGE, "Second")
    assert len(gateway.uploads) == 2
    assert len(gateway.chats) == 2  # no chat had to be mended


def test_a_deletion_that_fails_may_have_removed_the_bytes(gateway: FakeGateway, client: Client) -> None:
    client.ask(LARGE, "First")
    gateway.refused = {LARGE.digest: "VISION_UNAVAILABLE"}
    with pytest.raises(UnavailableError) as caught:
        client.delete_medium(LARGE)
    assert caught.value.reason == "VISION_UNAVAILABLE"
    gateway.refused.clear()
    client.ask(LARGE, "Second")
    assert len(gateway.chats) == 2
