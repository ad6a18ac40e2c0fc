"""Batches of both clients, against a scripted gateway."""

import os
from collections.abc import AsyncIterator

import pytest

from internvl_client import (
    Answer,
    AsyncClient,
    BatchState,
    Client,
    FinishReason,
    Image,
    InternVLError,
    InvalidRequestError,
    Message,
    NotFoundError,
    OverloadedError,
    ServerError,
    TokenLogprob,
    UnavailableError,
    async_batches,
    batches,
)
from internvl_serving.common.v1 import generation_pb2
from internvl_serving.gateway.v1 import batch_service_pb2, chat_service_pb2
from tests.client.fake_gateway import FakeGateway

SMALL, LARGE = Image.from_bytes(b"small"), Image.from_bytes(os.urandom(300 << 10))
STOP = generation_pb2.FINISH_REASON_STOP
TOP = generation_pb2.TokenLogprob(token_id=9, token=b"y", logprob=-1.5)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LOSS_PAUSE_S", 0.0)
    monkeypatch.setattr(async_batches, "LOSS_PAUSE_S", 0.0)


@pytest.fixture
async def aclient(gateway: FakeGateway) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(gateway.address, timeout_s=20) as client:
        yield client


def answered(index: int, *texts: str, best: int = 0) -> batch_service_pb2.BatchResult:
    """An item whose candidates said `texts`; ids and log-probabilities tell them apart."""
    candidate = chat_service_pb2.Candidate(finish_reason=STOP, output_token_count=2)
    said = [
        batch_service_pb2.BatchCandidate(
            text=text,
            token_ids=[number, 8],
            logprobs=[generation_pb2.TokenLogprob(token_id=number, token=b"x", logprob=-0.5, top=[TOP])],
        )
        for number, text in enumerate(texts)
    ]
    answer = batch_service_pb2.BatchAnswer(
        text=texts[best],
        started=chat_service_pb2.ChatStarted(
            request_id=f"server.{index}", model="tiny", prompt_token_count=3, prompt_token_ids=[1, 2, 3]
        ),
        finished=chat_service_pb2.ChatFinished(
            finish_reason=STOP, candidates=[candidate] * len(texts), best_candidate_index=best
        ),
        candidates=said,
    )
    return batch_service_pb2.BatchResult(item_index=index, answer=answer)


def failed(index: int, code: int, reason: str, field: str = "", resource: str = "") -> batch_service_pb2.BatchResult:
    error = batch_service_pb2.BatchError(code=code, reason=reason, message="Ours.", field=field, resource=resource)
    return batch_service_pb2.BatchResult(item_index=index, error=error)


def told(outcomes: list[Answer | InternVLError]) -> list[str]:
    return [outcome.reason if isinstance(outcome, InternVLError) else outcome.text for outcome in outcomes]


def test_answers_come_in_the_order_of_the_questions(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [answered(2, "c"), failed(0, 3, "PROMPT_TOO_LONG"), answered(1, "b", "d")]
    seen: list[tuple[int, int]] = []
    items = ["Hi", [SMALL, "What?"], [Message.user("a"), Message.assistant("b"), "c"]]
    outcomes = client.ask_batch(
        items,
        on_progress=lambda done, total: seen.append((done, total)),
        concurrency=2,
        max_output_tokens=5,
        system_message="",
        request_id="mine",
    )
    assert told(outcomes) == ["PROMPT_TOO_LONG", "b", "c"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    error, several, plain = outcomes
    assert isinstance(error, InvalidRequestError)
    assert (error.message, error.request_id) == ("Ours.", "mine.0")
    assert isinstance(several, Answer)
    assert isinstance(plain, Answer)
    assert ([candidate.text for candidate in several.candidates], several.token_ids) == (["b", "d"], (0, 8))
    assert (plain.finish_reason, plain.request_id) == (FinishReason.STOP, "server.2")
    (request,) = gateway.batches
    assert (request.concurrency, request.HasField("ttl")) == (2, False)
    assert [len(item.messages) for item in request.items] == [1, 1, 3]
    assert request.items[1].messages[0].parts[0].media.inline == b"small"
    assert {item.generation_config.max_output_tokens for item in request.items} == {5}
    assert all(item.HasField("system_message") for item in request.items)
    assert gateway.metadata[0]["x-request-id"] == "mine"


def test_an_answer_has_all_that_was_asked_for(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [answered(0, "a", "b", "c", best=1)]
    (answer,) = client.ask_batch(["Hi"], candidate_count=3, top_logprobs=1, return_token_ids=True)
    assert isinstance(answer, Answer)
    assert (answer.model, answer.prompt_token_ids, answer.best_index) == ("tiny", (1, 2, 3), 1)
    assert (answer.text, answer.token_ids) == ("b", (1, 8))
    assert [candidate.text for candidate in answer.candidates] == ["a", "b", "c"]
    assert [candidate.token_ids for candidate in answer.candidates] == [(0, 8), (1, 8), (2, 8)]
    likely = [TokenLogprob(number, b"x", -0.5, (TokenLogprob(9, b"y", -1.5),)) for number in range(3)]
    assert [candidate.logprobs for candidate in answer.candidates] == [(each,) for each in likely]
    assert answer.logprobs == (likely[1],)


def test_an_error_names_what_was_wrong(gateway: FakeGateway, client: Client) -> None:
    place = "messages[0].parts[1].media"
    gateway.results = [
        failed(0, 3, "MEDIA_UNREADABLE", field=place),
        failed(1, 5, "MEDIA_NOT_FOUND", resource="a" * 64),
    ]
    bad, missing = client.ask_batch(["a", "b"], request_id="x" * 128)
    assert isinstance(bad, InvalidRequestError)
    assert isinstance(missing, NotFoundError)
    assert (bad.field, bad.resource, missing.field, missing.resource) == (place, None, None, "a" * 64)
    assert [error.request_id for error in (bad, missing)] == [f"{'x' * 126}.0", f"{'x' * 126}.1"]


def test_large_pictures_are_uploaded_once_for_all_questions(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [answered(index, "x") for index in range(3)]
    client.ask_batch([[LARGE, str(index)] for index in range(3)])
    assert gateway.uploads == [[300 << 10]]
    # What the server has lost meanwhile is noticed: an item could not be mended.
    gateway.media.clear()
    client.ask_batch([[LARGE, "again"]])
    assert len(gateway.uploads) == 2


def test_a_stream_of_results_that_breaks_off_goes_on(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [answered(index, str(index)) for index in range(4)]
    gateway.breaks = [1, 0, 3]
    seen: list[int] = []
    outcomes = client.ask_batch(["?"] * 4, on_progress=lambda done, total: seen.append(done))
    assert told(outcomes) == ["0", "1", "2", "3"]
    assert seen == [1, 2, 3, 4]
    assert gateway.ended == []


def test_a_gateway_that_stays_away_ends_the_call_and_the_batch(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [answered(0, "0"), answered(1, "1")]
    gateway.breaks = [1, *[0] * 40]
    with pytest.raises(UnavailableError):
        client.ask_batch(["?", "?"])
    assert gateway.ended == ["b0"]


def test_a_caller_that_leaves_ends_the_batch(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [answered(0, "0"), answered(1, "1")]

    def leave(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.ask_batch(["?", "?"], on_progress=leave)
    assert gateway.ended == ["b0"]


def test_a_batch_that_was_ended_has_no_answer_for_the_rest(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [answered(1, "1")]
    first, second = client.ask_batch(["?", "?"])
    assert isinstance(first, ServerError)
    assert str(second) == "1"


def test_no_questions_are_no_batch(gateway: FakeGateway, client: Client) -> None:
    assert client.ask_batch([]) == []
    assert gateway.batches == []


def test_a_batch_can_be_left_and_read_later(gateway: FakeGateway, client: Client) -> None:
    gateway.results = [failed(0, 8, "QUEUE_FULL")]
    made = client.create_batch(["?"], ttl_s=1.5)
    assert gateway.batches[0].ttl.ToMilliseconds() == 1500
    batch = client.batch(made.batch_id)
    ((index, outcome),) = batch.results()
    assert (index, type(outcome)) == (0, OverloadedError)
    info = batch.info()
    assert (info.state, info.num_items, info.num_succeeded) == (BatchState.RUNNING, 1, 1)
    assert batch.cancel().state is BatchState.CANCELLED


async def test_the_asyncio_client_does_the_same(gateway: FakeGateway, aclient: AsyncClient) -> None:
    gateway.results = [answered(1, "b"), failed(0, 5, "MEDIA_NOT_FOUND")]
    gateway.breaks = [1, 0]
    seen: list[int] = []
    outcomes = await aclient.ask_batch(["a", [LARGE, "b"]], on_progress=lambda done, total: seen.append(done))
    assert (told(outcomes), seen) == (["MEDIA_NOT_FOUND", "b"], [1, 2])
    assert gateway.uploads == [[300 << 10]]
    batch = aclient.batch("b0")
    assert (await batch.info()).num_items == 2
    assert [index async for index, _ in batch.results()] == [1, 0]
    assert (await batch.cancel()).state is BatchState.CANCELLED
    gateway.breaks = [0] * 40
    with pytest.raises(UnavailableError):
        await aclient.ask_batch(["a"])
    assert gateway.ended == ["b0", "b0"]
