"""One turn through the heart of the gateway, with fake stages."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from gateway.chat import Stopwatch
from gateway.content import MediaPart
from gateway.events import CacheTier, Delta, Finished, FinishReason, Generated, Started, Transfer
from gateway.prompt import TextSegment, VisualSegment
from shared.digest import digest_of
from shared.errors import (
    DeadlineExceeded,
    EmbeddingIncompatible,
    EmbeddingNotFound,
    EmptyMessage,
    LlmUnavailable,
    MediaNotFound,
    MediaUnreadable,
    PromptTooLong,
    QueueFull,
    ServiceError,
    StoreUnavailable,
    VisionUnavailable,
)
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    OWL,
    STARTED,
    Gateway,
    MemoryMediaStore,
    Script,
    answer_of,
    ask,
    assistant,
    by_digest,
    gateway_without_redis,
    inline,
    user,
)

GONE = EmbeddingNotFound("Gone.")
LOST = LlmUnavailable("Lost.")


async def test_a_text_chat_streams_started_deltas_finished() -> None:
    gateway = gateway_without_redis(answer_of("Good ", "day."))
    *events, finished = await gateway.answer(ask(user("Hi")))
    assert events == [STARTED, Delta("Good "), Delta("day.")]
    assert isinstance(finished, Finished)
    assert (finished.generated.finish_reason, finished.message_id) == (FinishReason.STOP, "")
    assert finished.receipts == ()
    assert gateway.vision.finds == []


async def test_the_whole_dialogue_reaches_the_model() -> None:
    gateway = gateway_without_redis()
    await gateway.answer(ask(user("a"), assistant("b"), user("c"), system_message=""))
    prompt = gateway.llm.requests[0].prompt
    assert prompt.system_message == ""
    assert [segment for turn in prompt.turns for segment in turn.segments] == [
        TextSegment("a"),
        TextSegment("b"),
        TextSegment("c"),
    ]


async def test_a_cached_embedding_needs_no_bytes() -> None:
    gateway = gateway_without_redis(cached=[CAT])
    finished = await gateway.finished(ask(user(by_digest(CAT), "What?")))
    assert gateway.vision.encodes == []
    assert finished.receipts[0].encoded.cache_tier is CacheTier.STORE


async def test_a_new_picture_is_sent_to_vision_and_its_handle_to_the_model() -> None:
    gateway = gateway_without_redis()
    finished = await gateway.finished(ask(user(inline(CAT), "What?")))
    assert gateway.vision.encodes == [CAT]
    visual, words = gateway.llm.requests[0].prompt.turns[0].segments
    assert isinstance(visual, VisualSegment)
    assert visual.handles == (finished.receipts[0].encoded.handle,)
    assert words == TextSegment("\nWhat?")
    assert finished.receipts[0].media_digest == digest_of(CAT)


async def test_an_uploaded_picture_is_read_from_the_store() -> None:
    store = MemoryMediaStore()
    await store.put(digest_of(CAT), CAT)
    gateway = gateway_without_redis(store=store)
    await gateway.answer(ask(user(by_digest(CAT))))
    assert gateway.vision.encodes == [CAT]


async def test_a_picture_seen_lately_is_read_from_memory() -> None:
    store = MemoryMediaStore()
    gateway = gateway_without_redis(store=store)
    await gateway.answer(ask(user(inline(CAT))))
    store.away = True
    gateway.vision.encoded.clear()
    await gateway.answer(ask(user(by_digest(CAT))))
    assert gateway.vision.encodes == [CAT, CAT]


async def test_bytes_that_nobody_holds_are_asked_for_by_digest() -> None:
    gateway = gateway_without_redis()
    with pytest.raises(MediaNotFound) as caught:
        await gateway.answer(ask(user(by_digest(CAT))))
    assert caught.value.resource == digest_of(CAT)
    assert gateway.llm.requests == []


async def test_bytes_that_cannot_be_looked_up_are_not_said_to_be_missing() -> None:
    store = MemoryMediaStore()
    store.away = True
    with pytest.raises(StoreUnavailable):
        await gateway_without_redis(store=store).answer(ask(user(by_digest(CAT))))


async def test_a_store_that_is_away_stops_neither_inline_nor_cached_pictures() -> None:
    store = MemoryMediaStore()
    store.away = True
    gateway = gateway_without_redis(store=store, cached=[DOG])
    finished = await gateway.finished(ask(user(inline(CAT), by_digest(DOG))))
    assert len(finished.receipts) == 2


async def test_a_stored_picture_that_is_used_lives_on() -> None:
    store = MemoryMediaStore()
    gateway = gateway_without_redis(store=store, cached=[CAT])
    await gateway.answer(ask(user(by_digest(CAT))))
    assert store.touched == [digest_of(CAT)]


async def test_receipts_come_in_order_of_appearance_one_per_medium() -> None:
    gateway = gateway_without_redis(cached=[DOG])
    group = MediaPart((*by_digest(DOG).media, *inline(CAT).media), grouped=True)
    finished = await gateway.finished(ask(user(inline(CAT), group), assistant("x"), user(inline(OWL))))
    assert [receipt.media_digest for receipt in finished.receipts] == [digest_of(c) for c in (CAT, DOG, CAT, OWL)]
    # The fake says how long each transfer took by its place in the prompt: both of the cat's come back in order.
    durations = [receipt.transfer.duration_s for receipt in finished.receipts if receipt.transfer]
    assert durations == [0.0, 0.001, 0.002, 0.003]


async def test_a_transfer_reported_once_serves_every_receipt_of_its_embedding() -> None:
    gateway = gateway_without_redis()
    await gateway.answer(ask(user(inline(CAT))))
    digest = (await gateway.vision.find(inline_medium(CAT))).handle.digest  # type: ignore[union-attr]
    once = Generated(FinishReason.STOP, transfers=(Transfer(digest, CacheTier.LOCAL, 0.5),))
    gateway.llm.scripts.append([STARTED, once])
    finished = await gateway.finished(ask(user(inline(CAT), inline(CAT))))
    assert [receipt.transfer for receipt in finished.receipts] == [once.transfers[0]] * 2


def inline_medium(content: bytes) -> Any:
    return by_digest(content).media[0]


async def test_a_picture_that_appears_twice_is_encoded_once() -> None:
    gateway = gateway_without_redis()
    finished = await gateway.finished(ask(user(inline(CAT), by_digest(CAT), inline(CAT, max_tiles=2))))
    assert len(gateway.vision.finds) == len(gateway.vision.encodes) == 2  # once per way of tiling
    assert len(finished.receipts) == 3


async def test_bytes_given_once_serve_every_place_of_their_digest() -> None:
    gateway = gateway_without_redis(cache_bytes=0)
    await gateway.answer(ask(user(by_digest(CAT)), assistant("x"), user(inline(CAT))))
    assert gateway.vision.encodes == [CAT]


async def test_pictures_are_encoded_side_by_side_but_not_all_at_once() -> None:
    gateway = gateway_without_redis()
    gateway.vision.gate = asyncio.Event()
    pictures = [inline(bytes([number]) * 10) for number in range(20)]
    task = asyncio.create_task(gateway.answer(ask(user(*pictures))))
    while gateway.vision.running < 8:
        await asyncio.sleep(0)
    gateway.vision.gate.set()
    await task
    assert gateway.vision.most_running == 8


async def test_one_bad_picture_ends_the_others_and_is_named_by_its_place() -> None:
    gateway = gateway_without_redis(cached=[CAT])
    gateway.vision.gate = asyncio.Event()
    task = asyncio.create_task(gateway.answer(ask(user("x", inline(CAT), inline(DOG)))))
    while gateway.vision.running < 2:
        await asyncio.sleep(0)
    gateway.vision.errors = [MediaUnreadable("No picture.", field="chunk")]
    gateway.vision.gate.set()
    with pytest.raises(MediaUnreadable) as caught:
        await task
    assert caught.value.field == "messages[0].parts[2].media"
    assert gateway.vision.running == 0


async def test_a_lost_vision_replica_is_asked_once_more() -> None:
    gateway = gateway_without_redis()
    gateway.vision.errors = [VisionUnavailable("Away.")]
    await gateway.answer(ask(user(inline(CAT))))
    gateway.vision.errors = [VisionUnavailable("Away."), VisionUnavailable("Away.")]
    with pytest.raises(VisionUnavailable):
        await gateway.answer(ask(user(inline(DOG))))


@pytest.mark.parametrize("error", [GONE, EmbeddingIncompatible("Other model.")])
@pytest.mark.parametrize("before", [[], [STARTED]])
async def test_an_embedding_that_is_no_use_is_encoded_again(error: ServiceError, before: list[Started]) -> None:
    gateway = gateway_without_redis([*before, error], answer_of("Cat."), cached=[CAT, DOG])
    events = await gateway.answer(ask(user(inline(CAT), inline(DOG))))
    assert sorted(gateway.vision.encodes) == sorted([CAT, DOG])
    assert events[:2] == [STARTED, Delta("Cat.")]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert [receipt.encoded.cache_tier for receipt in finished.receipts] == [CacheTier.NONE] * 2


async def test_an_embedding_is_encoded_again_once_and_not_twice() -> None:
    gateway = gateway_without_redis([GONE], [EmbeddingIncompatible("Still.")], cached=[CAT])
    with pytest.raises(EmbeddingIncompatible):
        await gateway.answer(ask(user(inline(CAT))))
    assert (len(gateway.vision.encodes), len(gateway.llm.requests)) == (1, 2)


async def test_an_embedding_whose_picture_is_gone_too_is_asked_for() -> None:
    gateway = gateway_without_redis([GONE], cached=[CAT])
    with pytest.raises(MediaNotFound):
        await gateway.answer(ask(user(by_digest(CAT))))


BREAKS: list[Script] = [[LOST], [STARTED, LOST], [STARTED]]


@pytest.mark.parametrize("broken", BREAKS)
async def test_a_stream_that_breaks_before_its_first_delta_is_begun_again(broken: Script) -> None:
    gateway = gateway_without_redis(broken, answer_of("Hi."))
    events = await gateway.answer(ask(user("Hi")))
    assert events[:-1] == [STARTED, Delta("Hi.")]


async def test_a_stream_is_begun_again_once_and_not_twice() -> None:
    gateway = gateway_without_redis([LOST], [LOST])
    with pytest.raises(LlmUnavailable):
        await gateway.answer(ask(user("Hi")))
    assert len(gateway.llm.requests) == 2


async def test_a_lost_embedding_and_a_lost_replica_have_one_try_each() -> None:
    gateway = gateway_without_redis([GONE], [LOST], answer_of("Cat."), cached=[CAT])
    assert (await gateway.answer(ask(user(inline(CAT)))))[1] == Delta("Cat.")


@pytest.mark.parametrize("error", [LOST, GONE])
async def test_after_a_delta_nothing_is_tried_again(error: ServiceError) -> None:
    gateway = gateway_without_redis([STARTED, Delta("H"), error])
    events = gateway.chat.answer(ask(user("Hi")))
    assert [await anext(events), await anext(events)] == [STARTED, Delta("H")]
    with pytest.raises(type(error)):
        await anext(events)
    assert len(gateway.llm.requests) == 1


async def test_a_stream_that_ends_too_early_is_an_error() -> None:
    gateway = gateway_without_redis([STARTED, Delta("H")])
    with pytest.raises(LlmUnavailable):
        await gateway.answer(ask(user("Hi")))


@pytest.mark.parametrize("error", [PromptTooLong("Long."), QueueFull("Later."), DeadlineExceeded("Late.")])
async def test_what_the_model_refuses_is_not_tried_again(error: ServiceError) -> None:
    gateway = gateway_without_redis([error])
    with pytest.raises(type(error)):
        await gateway.answer(ask(user("Hi")))
    assert len(gateway.llm.requests) == 1


async def test_a_caller_that_leaves_closes_the_model_s_stream() -> None:
    gateway = gateway_without_redis([STARTED, Delta("H"), asyncio.Event()])
    async with aclosing(gateway.chat.answer(ask(user("Hi")))) as events:
        await anext(events)
        await anext(events)
        assert gateway.llm.open == 1
    assert gateway.llm.open == 0


async def test_a_cancelled_turn_closes_the_model_s_stream() -> None:
    gateway = gateway_without_redis([STARTED, asyncio.Event()])
    await cancelled_while_generating(gateway)
    assert gateway.llm.open == 0


async def cancelled_while_generating(gateway: Gateway) -> None:
    task = asyncio.create_task(gateway.answer(ask(user("Hi"))))
    await gateway.llm.waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_turn_ends_its_encodes() -> None:
    gateway = gateway_without_redis()
    gateway.vision.gate = asyncio.Event()
    task = asyncio.create_task(gateway.answer(ask(user(inline(CAT), inline(DOG)))))
    while gateway.vision.running < 2:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (gateway.vision.running, gateway.vision.cancelled) == (0, 2)


async def test_what_cannot_be_answered_reaches_no_stage() -> None:
    gateway = gateway_without_redis()
    with pytest.raises(EmptyMessage):
        await gateway.answer(ask(user(inline(CAT)), assistant("x"), user()))
    assert (gateway.vision.finds, gateway.llm.requests) == ([], [])


async def test_timings_follow_the_turn() -> None:
    gateway = gateway_without_redis(answer_of("a", "b"))
    timings = (await gateway.finished(ask(user(inline(CAT))))).timings
    assert timings.time_to_first_token_s is not None
    assert 0 < timings.media_s <= timings.time_to_first_token_s <= timings.total_s


async def test_an_answer_without_deltas_has_no_first_token() -> None:
    gateway = gateway_without_redis(answer_of())
    assert (await gateway.finished(ask(user("Hi")))).timings.time_to_first_token_s is None


def test_only_the_first_delta_sets_the_time_to_first_token() -> None:
    stopwatch = Stopwatch()
    stopwatch.note_delta()
    first = stopwatch.read().time_to_first_token_s
    stopwatch.note_delta()
    assert stopwatch.read().time_to_first_token_s == first
