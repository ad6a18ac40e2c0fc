"""The asyncio client: `AsyncClient`, its conversations and its streams. For the tasks of one event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from internvl_client import convert
from internvl_client.access import Access, TlsFiles
from internvl_client.async_batches import AsyncBatch
from internvl_client.async_media import AsyncMediaCalls
from internvl_client.batches import CANCEL_TIMEOUT_S, Outcome, missing_result
from internvl_client.channel import SHORT_CALL_S, CallScope
from internvl_client.content import Image, Media, Message, Part
from internvl_client.errors import InternVLError, NotFoundError, UnavailableError, translated
from internvl_client.plan import AnswerCollector, ChatPlan, plan_batch, plan_chat
from internvl_client.resumption import Resumption
from internvl_client.system import SystemStatus, system_of
from internvl_client.types import (
    Answer,
    BatchItem,
    ChatEvent,
    ChatOptions,
    ConversationInfo,
    Delta,
    Estimate,
    Prefetched,
    Progress,
    Started,
    TurnOptions,
    UploadedMedia,
)
from internvl_serving.gateway.v1 import (
    batch_service_pb2_grpc,
    chat_service_pb2_grpc,
    conversation_service_pb2,
    conversation_service_pb2_grpc,
    system_service_pb2,
    system_service_pb2_grpc,
)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
_SERVING = 1  # of grpc.health.v1


class AsyncEventStream:
    """The events of one answer, in order. Closing it, or leaving it as a context, cancels the call.

    Iterating raises `InternVLError`. One task only.
    """

    def __init__(self, events: AsyncGenerator[ChatEvent, None], request_id: str) -> None:
        self._events = events
        self.request_id = request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatEvent:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the call unless it has ended."""
        await self._events.aclose()


class AsyncAnswerStream:
    """The text of one answer as it comes. Closing it, or leaving it as a context, cancels the call."""

    def __init__(self, events: AsyncEventStream) -> None:
        self._events = events
        self._collector = AnswerCollector(events.request_id)
        self.request_id = events.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        async for event in self._events:
            self._collector.add(event)
            if isinstance(event, Delta):
                return event
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the call unless it has ended."""
        await self._events.aclose()

    @property
    def started(self) -> Started | None:
        """The first event, once it has come."""
        return self._collector.started

    async def answer(self) -> Answer:
        """Return the whole answer, waiting for what has not come yet."""
        async for _ in self:
            pass
        return self._collector.answer()


class AsyncClient:
    """Talks to a gateway. Make it where an event loop runs.

    `timeout_s` is the default for every call; without it, answers, uploads and whatever else may take its time have no
    end, and what is answered at once has a minute. `api_key` goes with every call, and over plaintext to this machine
    only, unless `insecure` says that the way is safe. `tls` True trusts the authorities that grpcio knows; `TlsFiles`
    name others; or pass `credentials` of your own making. `metadata` goes with every call.

    Making one raises `ValueError` for arguments that cannot be meant, and `OSError` for files that cannot be read.
    Failed calls raise `InternVLError`. Close the client, or use it as a context.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None = None,
        api_key: str | None = None,
        tls: bool | TlsFiles = False,
        insecure: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        access = Access.to(address, api_key=api_key, tls=tls, insecure=insecure, credentials=credentials)
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = (*metadata, *access.metadata)
        self._channel = access.aio_channel(address)
        self._chat = chat_service_pb2_grpc.ChatServiceStub(self._channel)
        self._conversations = conversation_service_pb2_grpc.ConversationServiceStub(self._channel)
        self._media = AsyncMediaCalls(self._channel, address)
        self._batches = batch_service_pb2_grpc.BatchServiceStub(self._channel)
        self._system = system_service_pb2_grpc.SystemServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End running calls and the connection."""
        await self._channel.close()

    def chat(self, content: Iterable[Message | Part], **options: Unpack[ChatOptions]) -> AsyncEventStream:
        """Return the events of the answer to `content`: a dialogue, or the parts of one user message."""
        return self._stream(plan_chat(content, options, options.get("system_message")), options)

    def stream(self, *content: Message | Part, **options: Unpack[ChatOptions]) -> AsyncAnswerStream:
        """Return the answer to `content` as it comes."""
        return AsyncAnswerStream(self.chat(content, **options))

    async def ask(self, *content: Message | Part, **options: Unpack[ChatOptions]) -> Answer:
        """Return the whole answer to `content`."""
        async with self.stream(*content, **options) as stream:
            return await stream.answer()

    async def ask_batch(
        self,
        items: Iterable[BatchItem],
        *,
        concurrency: int | None = None,
        on_progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Outcome]:
        """Return what becomes of many independent questions, in their order: an answer, or the error of that question.

        Each item is a text, the parts of one user message, a dialogue, or a `Question` with options of its own;
        `options` hold for all. At most `concurrency` are asked at a time (None: the server's limit). `on_progress` is
        told how many have ended, and of how many. A call that is left before its end ends the batch.
        """
        asked = list(items)
        if not asked:
            return []
        batch = await self.create_batch(asked, concurrency=concurrency, **options)
        outcomes: dict[int, Outcome] = {}
        try:
            async for index, outcome in batch.results(timeout_s=options.get("timeout_s")):
                outcomes[index] = outcome
                if on_progress:
                    on_progress(len(outcomes), len(asked))
        except BaseException:
            with suppress(InternVLError):
                await batch.cancel(timeout_s=CANCEL_TIMEOUT_S)
            raise
        return [outcomes.get(index) or missing_result() for index in range(len(asked))]

    async def create_batch(
        self,
        items: Iterable[BatchItem],
        *,
        concurrency: int | None = None,
        ttl_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncBatch:
        """Begin a batch, which goes on without the caller; see `ask_batch`.

        Its results outlive the last of them by `ttl_s` (None: the server's default).
        """
        plan = plan_batch(items, options, concurrency, ttl_s)
        scope = self._scope(options.get("timeout_s"), options.get("request_id"))
        # An item could not be mended as a chat can, so what the server is believed to hold is asked about again.
        await self._media.provide(plan.uploads, scope, anew=True)
        response = await self._unary(self._batches.CreateBatch, plan.request, scope)
        return AsyncBatch(self, response.batch.batch_id, scope.request_id)

    def batch(self, batch_id: str) -> AsyncBatch:
        """Return the batch of this id; nothing is sent yet."""
        return AsyncBatch(self, batch_id)

    async def create_conversation(
        self, *, system_message: str | None = None, ttl_s: float | None = None, timeout_s: float | None = None
    ) -> AsyncConversation:
        """Begin a dialogue that the server keeps for `ttl_s` after its last turn (None: the server's default)."""
        request = convert.create_conversation_request(system_message, ttl_s)
        response = await self._unary(self._conversations.CreateConversation, request, self._scope(timeout_s))
        return self.conversation(response.conversation.conversation_id)

    def conversation(self, conversation_id: str) -> AsyncConversation:
        """Return the kept dialogue of this id; nothing is sent yet."""
        return AsyncConversation(self, conversation_id)

    async def conversations(
        self, *, page_size: int = 100, timeout_s: float | None = None
    ) -> AsyncIterator[ConversationInfo]:
        """Yield the conversations that the server keeps for this caller, the one used last first.

        `timeout_s` is per page. Whoever needs no API key sees what is everybody's; a server that anybody can reach
        without one refuses.
        """
        request = conversation_service_pb2.ListConversationsRequest(page_size=page_size)
        while True:
            response = await self._unary(self._conversations.ListConversations, request, self._scope(timeout_s))
            for conversation in response.conversations:
                yield convert.conversation_of(conversation)
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def find_missing(self, digests: Sequence[str], *, timeout_s: float | None = None) -> list[str]:
        """Return those of `digests` whose bytes the server does not hold."""
        return await self._media.find_missing(digests, self._scope(timeout_s))

    async def upload(self, medium: Media, *, timeout_s: float | None = None) -> UploadedMedia:
        """Upload a medium whether or not the server holds it; raise `ValueError` when its bytes are not known."""
        if medium.content is None:
            raise ValueError("A medium made from a digest has no bytes to upload.")
        return await self._media.upload(medium.digest, medium.content, self._scope(timeout_s))

    async def prefetch(
        self,
        media: Iterable[Media],
        *,
        on_progress: Progress | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> list[Prefetched]:
        """Have the embeddings of media made before anybody asks about them; nobody who waits is held up by it.

        Returns what became of each, in their order: a receipt, or the error of that medium. `on_progress` is told how
        many are done, and of how many. What fails for all of them, such as a deadline, is raised; what has been done
        until then stays done, and a call that is left ends what has not begun.
        """
        return await self._media.prefetch(media, on_progress, self._scope(timeout_s, request_id))

    async def estimate(self, medium: Image, *, timeout_s: float | None = None) -> Estimate:
        """Return how many tiles and visual tokens a picture will take. It is not decoded, so it may still be damaged.

        The first 64 KiB are sent, and more where those do not say it. Without bytes the server must hold them.
        """
        return await self._media.estimate(medium, self._scope(timeout_s))

    async def delete_medium(self, medium_or_digest: Media | str, *, timeout_s: float | None = None) -> int:
        """Have the server forget a medium: its bytes, and every embedding made of them, in all caches.

        Returns how many embeddings the embedding store held. A call that failed may have removed some; repeat it.
        """
        return await self._media.delete(medium_or_digest, self._scope(timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> SystemStatus:
        """Return how the gateway is, and what stands behind it as the gateway sees it."""
        request = system_service_pb2.GetStatusRequest()
        return system_of(await self._unary(self._system.GetStatus, request, self._scope(timeout_s)))

    async def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Return whether the gateway says that it serves; raise `UnavailableError` when nobody answers."""
        # Health messages have one field each, so the well-known wrappers have the same wire format.
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check", StringValue.SerializeToString, Int32Value.FromString
        )
        response = await self._unary(check, StringValue(value="readiness"), self._scope(timeout_s))
        return response.value == _SERVING

    def _stream(self, plan: ChatPlan, options: TurnOptions) -> AsyncEventStream:
        scope = self._scope(options.get("timeout_s"), options.get("request_id"))
        return AsyncEventStream(self._events(plan, scope), scope.request_id)

    async def _events(self, plan: ChatPlan, scope: CallScope) -> AsyncGenerator[ChatEvent, None]:
        await self._media.provide(plan.uploads, scope)
        resumption = Resumption(is_named=plan.is_named)
        try:
            async with aclosing(self._news(plan, scope, resumption)) as events:
                async for event in events:
                    yield event
        except UnavailableError as error:
            if not resumption.begin(error):
                raise
            async with aclosing(self._news(plan, scope, resumption)) as events:
                async for event in events:
                    yield event

    async def _news(self, plan: ChatPlan, scope: CallScope, resumption: Resumption) -> AsyncGenerator[ChatEvent, None]:
        async with aclosing(self._mended(plan, scope)) as events:
            async for event in events:
                for news in resumption.news(event):
                    yield news

    async def _mended(self, plan: ChatPlan, scope: CallScope) -> AsyncGenerator[ChatEvent, None]:
        """Yield the events of a call, which is made again where the server has lost media that are held here."""
        try:
            async with aclosing(self._attempt(plan, scope)) as events:
                async for event in events:
                    yield event
        except NotFoundError as error:
            if not plan.mends(error):
                raise
            await self._media.provide(plan.held, scope, anew=True)
            async with aclosing(self._attempt(plan, scope)) as events:
                async for event in events:
                    yield event

    async def _attempt(self, plan: ChatPlan, scope: CallScope) -> AsyncGenerator[ChatEvent, None]:
        call = self._chat.Chat(plan.request, **scope.options())
        try:
            with translated(self.address, scope.request_id):
                async for response in call:
                    if event := convert.event_of(response):
                        yield event
        finally:
            call.cancel()

    async def _unary(
        self, method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT], request: RequestT, scope: CallScope
    ) -> ResponseT:
        with translated(self.address, scope.request_id):
            return await method(request, **scope.options(SHORT_CALL_S))

    def _scope(self, timeout_s: float | None, request_id: str | None = None) -> CallScope:
        return CallScope(request_id, self._timeout_s if timeout_s is None else timeout_s, self._metadata)


class AsyncConversation:
    """A dialogue that the server keeps, so that a turn carries only what is new. One turn at a time.

    Every turn has an id, so that none is lost or doubled with a connection: it is sent once more then, and told
    again or answered anew. Media of earlier turns are remembered here, to be uploaded again should the server have lost
    them.
    """

    def __init__(self, client: AsyncClient, conversation_id: str) -> None:
        self._client = client
        self._earlier: dict[str, Media] = {}
        self.conversation_id = conversation_id

    def chat(self, content: Iterable[Message | Part], **options: Unpack[TurnOptions]) -> AsyncEventStream:
        """Return the events of the answer to one more user message, or to results of tools (`Message.tool`)."""
        messages = convert.dialogue_of(content)
        plan = plan_chat(messages, options, conversation_id=self.conversation_id, earlier=self._earlier)
        self._earlier |= {medium.digest: medium for message in messages for medium in message.media}
        return self._client._stream(plan, options)

    def stream(self, *content: Message | Part, **options: Unpack[TurnOptions]) -> AsyncAnswerStream:
        """Return the answer to one more user message, or to results of tools, as it comes."""
        return AsyncAnswerStream(self.chat(content, **options))

    async def ask(self, *content: Message | Part, **options: Unpack[TurnOptions]) -> Answer:
        """Return the whole answer to one more user message, or to results of tools."""
        async with self.stream(*content, **options) as stream:
            return await stream.answer()

    async def info(self, *, timeout_s: float | None = None) -> ConversationInfo:
        """Return the conversation as the server has it."""
        request = conversation_service_pb2.GetConversationRequest(conversation_id=self.conversation_id)
        client = self._client
        response = await client._unary(client._conversations.GetConversation, request, client._scope(timeout_s))
        return convert.conversation_of(response.conversation)

    async def messages(self, *, page_size: int = 100, timeout_s: float | None = None) -> AsyncIterator[Message]:
        """Yield the messages, oldest first; their media are digests. `timeout_s` is per page."""
        client = self._client
        request = conversation_service_pb2.ListMessagesRequest(
            conversation_id=self.conversation_id, page_size=page_size
        )
        while True:
            response = await client._unary(client._conversations.ListMessages, request, client._scope(timeout_s))
            for message in response.messages:
                yield convert.message_of(message)
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def fork(
        self, at: Message | Answer | str | None = None, *, ttl_s: float | None = None, timeout_s: float | None = None
    ) -> AsyncConversation:
        """Begin a conversation with what was said here up to an answer, by itself or its id; None: to the last one.

        Either goes on without the other. The fork is kept for `ttl_s` after its last turn (None: as long as this one).
        """
        request = convert.fork_conversation_request(self.conversation_id, at, ttl_s)
        client = self._client
        response = await client._unary(client._conversations.ForkConversation, request, client._scope(timeout_s))
        forked = client.conversation(response.conversation.conversation_id)
        forked._earlier = dict(self._earlier)
        return forked

    async def delete(self, *, timeout_s: float | None = None) -> None:
        """Have the server forget the conversation."""
        request = conversation_service_pb2.DeleteConversationRequest(conversation_id=self.conversation_id)
        client = self._client
        await client._unary(client._conversations.DeleteConversation, request, client._scope(timeout_s))
