"""Media without a question: embeddings made ahead, sizes told, everything of a medium removed."""

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from gateway.catalogue import Catalogue, Estimate, Prefetched
from gateway.content import Medium, PreprocessOptions, VideoOptions
from gateway.dialogue import Limits
from gateway.encoder import MediaEncoder
from gateway.events import CacheTier, MediaReceipt
from gateway.media import LocalMediaCache, MediaLibrary
from shared.digest import digest_of
from shared.errors import (
    InvalidRequest,
    MediaNotFound,
    MediaTooLarge,
    MediaUnreadable,
    QueueFull,
    ServiceError,
    StoreUnavailable,
    VisionUnavailable,
)
from tests.gateway.fakes_gateway import CAT, DOG, OWL, FakeVision, MemoryMediaStore

HEAD_BYTES = 64 << 10
ESTIMATE = Estimate(width=640, height=480, columns=4, rows=3, tiles=13, tokens=3328)


class FakeFacts:
    """Tells the same of every picture of which it gets `header_bytes`; `error` is raised instead, when set."""

    def __init__(self) -> None:
        self.header_bytes = 0
        self.error: ServiceError | None = None
        self.asked: list[int] = []
        self.options: list[PreprocessOptions] = []
        self.erased: list[str] = []

    async def estimate(self, content: bytes, options: PreprocessOptions) -> Estimate:
        self.asked.append(len(content))
        self.options.append(options)
        if self.error:
            raise self.error
        if len(content) < self.header_bytes:
            raise MediaUnreadable("More is needed.")
        return ESTIMATE

    async def erase(self, media_digest: str) -> int:
        self.erased.append(media_digest)
        if self.error:
            raise self.error
        return 3


@dataclass
class Shop:
    """A catalogue with everything around it in reach of the test."""

    cached: Iterable[bytes] = ()
    parallel: int = 8
    max_sent_bytes: int = 1 << 20
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.vision, self.facts, self.store = FakeVision(self.cached), FakeFacts(), MemoryMediaStore()
        self.library = MediaLibrary(self.store, LocalMediaCache(1 << 20), 1 << 20)
        encoder = MediaEncoder(self.vision, self.library, parallel=1, patience_s=0.0)
        self.catalogue = Catalogue(
            self.facts,
            encoder,
            self.library,
            self.limits,
            parallel=self.parallel,
            max_sent_bytes=self.max_sent_bytes,
        )

    async def prefetch(self, *media: Medium) -> list[MediaReceipt | ServiceError]:
        """Return what became of the media, in the order asked."""
        outcomes = [outcome async for outcome in self.catalogue.prefetch(media)]
        return [each.outcome for each in sorted(outcomes, key=lambda outcome: outcome.index)]

    def upload(self, content: bytes) -> Medium:
        self.store.contents[digest_of(content)] = content
        return Medium(digest_of(content))


def inline(content: bytes, options: PreprocessOptions | None = None) -> Medium:
    return Medium("", options or PreprocessOptions(), content)


def told(outcome: MediaReceipt | ServiceError) -> tuple[str, str | None]:
    assert isinstance(outcome, ServiceError)
    return outcome.reason, outcome.field


# Prefetch.


async def test_media_are_encoded_after_all_that_somebody_waits_for() -> None:
    shop = Shop(cached=[OWL])
    outcomes = await shop.prefetch(inline(CAT), shop.upload(DOG), inline(OWL))
    receipts = [outcome for outcome in outcomes if isinstance(outcome, MediaReceipt)]
    assert [receipt.media_digest for receipt in receipts] == list(map(digest_of, (CAT, DOG, OWL)))
    tiers = [receipt.encoded.cache_tier for receipt in receipts]
    assert tiers == [CacheTier.NONE, CacheTier.NONE, CacheTier.STORE]
    assert {receipt.transfer for receipt in receipts} == {None}
    assert sorted(shop.vision.encodes) == [CAT, DOG]
    assert shop.vision.prefetches == shop.vision.finds


async def test_what_is_done_is_told_while_the_rest_goes_on() -> None:
    shop = Shop()
    shop.vision.gate = asyncio.Event()
    async with aclosing(shop.catalogue.prefetch([inline(CAT), Medium("0" * 64), inline(b"")])) as outcomes:
        first = await anext(outcomes)
        assert (first.index, told(first.outcome)) == (2, ("MEDIA_UNREADABLE", "media[2]"))
        shop.vision.gate.set()
        assert {outcome.index async for outcome in outcomes} == {0, 1}


async def test_only_so_many_are_worked_on_at_a_time() -> None:
    shop = Shop(parallel=3)
    shop.vision.gate = asyncio.Event()
    asking = asyncio.create_task(shop.prefetch(*(inline(bytes([number])) for number in range(20))))
    async with asyncio.timeout(5):
        while shop.vision.running < 3:
            await asyncio.sleep(0)
    shop.vision.gate.set()
    assert all(isinstance(outcome, MediaReceipt) for outcome in await asking)
    assert shop.vision.most_running == 3


async def test_a_medium_that_fails_is_no_other_s_fault() -> None:
    shop = Shop(parallel=1)
    shop.vision.errors = [
        InvalidRequest("Too many.", field="header.options.max_tiles"),
        MediaUnreadable("No picture.", field="chunk"),
        QueueFull("Full."),
    ]
    *failed, receipt = await shop.prefetch(inline(CAT), inline(DOG), inline(OWL), inline(CAT))
    assert [told(outcome) for outcome in failed] == [
        ("INVALID_REQUEST", "media[0].options.max_tiles"),
        ("MEDIA_UNREADABLE", "media[1]"),
        ("QUEUE_FULL", None),
    ]
    assert isinstance(receipt, MediaReceipt)


async def test_bytes_that_nobody_holds_are_an_error_with_their_digest() -> None:
    (missing,) = await Shop().prefetch(Medium("0" * 64))
    assert isinstance(missing, MediaNotFound)
    assert missing.resource == "0" * 64


@pytest.mark.parametrize(
    ("medium", "expected"),
    [
        (inline(b""), ("MEDIA_UNREADABLE", "media[0]")),
        (inline(b"x" * 101), ("MEDIA_TOO_LARGE", "media[0]")),
        (
            inline(CAT, PreprocessOptions(video=VideoOptions(segment_count=0))),
            ("INVALID_REQUEST", "media[0].options.video.segment_count"),
        ),
        (
            inline(CAT, PreprocessOptions(video=VideoOptions(end_s=float("nan")))),
            ("INVALID_REQUEST", "media[0].options.video.end_seconds"),
        ),
    ],
)
async def test_what_no_chat_takes_is_not_sent_to_the_vision_service(medium: Medium, expected: tuple[str, str]) -> None:
    shop = Shop(limits=Limits(media_bytes=100))
    (outcome,) = await shop.prefetch(medium)
    assert told(outcome) == expected
    assert shop.vision.finds == []


async def test_a_caller_that_leaves_ends_what_is_going_on() -> None:
    shop = Shop(parallel=2)
    shop.vision.gate = asyncio.Event()
    outcomes = shop.catalogue.prefetch([inline(b""), inline(CAT), inline(DOG)])
    assert isinstance(await anext(outcomes), Prefetched)
    async with asyncio.timeout(5):
        while not shop.vision.running:
            await asyncio.sleep(0)
        await outcomes.aclose()
        while shop.vision.running:
            await asyncio.sleep(0)
    assert shop.vision.encodes == []


async def test_without_a_store_media_that_come_along_are_encoded() -> None:
    shop = Shop()
    shop.store.away = True
    receipt, missing = await shop.prefetch(inline(CAT), Medium(digest_of(DOG)))
    assert isinstance(receipt, MediaReceipt)
    assert isinstance(missing, StoreUnavailable)


# Estimates.


async def test_bytes_that_come_along_are_estimated_as_they_are() -> None:
    shop = Shop()
    options = PreprocessOptions(max_tiles=6)
    assert await shop.catalogue.estimate(inline(CAT, options)) == ESTIMATE
    assert (shop.facts.asked, shop.facts.options) == ([len(CAT)], [options])


async def test_of_an_uploaded_picture_the_first_bytes_are_sent() -> None:
    shop = Shop()
    assert await shop.catalogue.estimate(shop.upload(b"x" * 100_000)) == ESTIMATE
    assert shop.facts.asked == [HEAD_BYTES]


async def test_where_those_do_not_say_it_the_whole_is_sent() -> None:
    shop = Shop()
    shop.facts.header_bytes = 100_000
    assert await shop.catalogue.estimate(shop.upload(b"x" * 100_000)) == ESTIMATE
    assert shop.facts.asked == [HEAD_BYTES, 100_000]


@pytest.mark.parametrize("size", [HEAD_BYTES, 100_001])
async def test_more_than_there_is_or_than_a_message_takes_is_not_sent(size: int) -> None:
    shop = Shop(max_sent_bytes=100_000)
    shop.facts.header_bytes = 1 << 20
    with pytest.raises(MediaUnreadable):
        await shop.catalogue.estimate(shop.upload(b"x" * size))
    assert shop.facts.asked == [HEAD_BYTES]


@pytest.mark.parametrize("error", [VisionUnavailable("Away."), QueueFull("Full."), MediaTooLarge("Too many pixels.")])
async def test_an_error_that_more_bytes_cannot_mend_is_final(error: ServiceError) -> None:
    shop = Shop()
    shop.facts.error = error
    with pytest.raises(type(error)):
        await shop.catalogue.estimate(shop.upload(b"x" * 100_000))
    assert shop.facts.asked == [HEAD_BYTES]


@pytest.mark.parametrize(
    ("given", "ours"),
    [("options.max_tiles", "media.options.max_tiles"), ("options.video", "media.options.video"), (None, "media")],
)
async def test_an_error_names_the_field_of_our_own_request(given: str | None, ours: str) -> None:
    shop = Shop()
    shop.facts.error = InvalidRequest("Bad.", field=given)
    with pytest.raises(InvalidRequest) as caught:
        await shop.catalogue.estimate(inline(CAT))
    assert caught.value.field == ours


async def test_a_digest_that_is_not_held_cannot_be_estimated() -> None:
    with pytest.raises(MediaNotFound):
        await Shop().catalogue.estimate(Medium("0" * 64))


# Deletion.


async def test_a_medium_goes_with_all_its_embeddings() -> None:
    shop = Shop()
    medium = shop.upload(CAT)
    await shop.library.content_of(medium)  # so that this process's memory has it too
    assert await shop.catalogue.delete(medium.digest) == 3
    assert shop.facts.erased == [medium.digest]
    with pytest.raises(MediaNotFound):
        await shop.library.content_of(medium)


async def test_a_deletion_that_fails_can_be_asked_for_again() -> None:
    shop = Shop()
    medium = shop.upload(CAT)
    shop.store.away = True
    with pytest.raises(StoreUnavailable):
        await shop.catalogue.delete(medium.digest)
    shop.store.away, shop.facts.error = False, VisionUnavailable("Away.")
    with pytest.raises(VisionUnavailable):
        await shop.catalogue.delete(medium.digest)
    shop.facts.error = None
    assert await shop.catalogue.delete(medium.digest) == 3
