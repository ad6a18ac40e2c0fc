"""What HTTP offers: chat completions, models, tokens, media. Each is three moves: read, ask, render."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Final, TypeVar

from fastapi import Body as InBody
from fastapi import FastAPI, Request, Response
from starlette.responses import JSONResponse

from gateway.chat import Chat
from gateway.events import ServedModel
from gateway.http import answers
from gateway.http.completions import Completion
from gateway.http.media_urls import RemoteFetcher, digest_url, fetched
from gateway.http.requests import ChatCompletionRequest, ChatMessage, TokenizeChatRequest, TokenizeTextRequest
from gateway.http.streams import EventStream
from gateway.http.turns import Turn, carried_chars, measured_turn_of, remote_places, turn_of
from gateway.media import MediaLibrary
from gateway.tokenizing import ModelDirectory, Tokenizing
from shared.digest import checked_digest
from shared.errors import InvalidRequest
from shared.rpc.deadline import request_id

B = TypeVar("B", ChatCompletionRequest, TokenizeChatRequest)
_OWNER: Final = "internvl-serving"
_READ_ON_LOOP_CHARS: Final = 64 << 10
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": answers.ErrorAnswer, "description": words}
    for status, words in {
        400: "A field has a value that is not allowed; `param` names it.",
        401: "An API key is needed that the server knows.",
        403: "The key does not permit this.",
        404: "Something that was named does not exist.",
        408: "The body came too slowly.",
        409: "Something else stands in the way for now.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        429: "There is too much to do; `Retry-After` says when to come again.",
        500: "A fault of the server; the request id finds it in the log.",
        503: "Something that is needed cannot be reached; `Retry-After` says when to come again.",
        504: "The time for it has passed.",
    }.items()
}
_STREAMED: Final = {
    "description": "The completion; with `stream` its chunks as server-sent events, then `[DONE]`.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
    "model": answers.ChatCompletion,
}
# What an upload's fields, which are gRPC's, are called here; a body of bytes has none.
_UPLOAD_PARAMS: Final[dict[str | None, str | None]] = {"header.digest": "digest", "chunk": None}
_BYTES: Final = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class Routes:
    """The routes, and what they ask."""

    def __init__(
        self,
        chat: Chat,
        library: MediaLibrary,
        models: ModelDirectory,
        tokenizing: Tokenizing,
        remote: RemoteFetcher,
        *,
        max_remote_media: int,
        stall_s: float,
    ) -> None:
        self._chat = chat
        self._library = library
        self._models = models
        self._tokenizing = tokenizing
        self._remote = remote
        self._max_remote_media = max_remote_media
        self._stall_s = stall_s
        self._start_time = int(time.time())

    def add_to(self, api: FastAPI) -> None:
        """Add the routes."""
        api.post(
            "/v1/chat/completions",
            response_model=None,
            responses={200: _STREAMED, **_ERRORS},
            tags=["chat"],
            summary="Answer a dialogue of text, pictures and videos",
        )(self.create_chat_completion)
        api.post(
            "/tokenize",
            response_model=answers.Tokenized,
            responses=_ERRORS,
            tags=["chat"],
            summary="Tell the tokens of a text or a dialogue",
        )(self.tokenize)
        api.get("/v1/models", response_model=answers.ModelList, responses=_ERRORS, tags=["models"], summary="Models")(
            self.list_models
        )
        api.get(
            "/v1/models/{model:path}",
            response_model=answers.Model,
            responses=_ERRORS,
            tags=["models"],
            summary="One model",
        )(self.retrieve_model)
        api.put(
            "/v1/media/{digest}",
            response_model=answers.StoredMediumAnswer,
            responses=_ERRORS,
            tags=["media"],
            summary="Send a picture or a video once, to name it by its SHA-256 afterwards",
            openapi_extra=_BYTES,
        )(self.upload_medium)

    async def create_chat_completion(self, body: ChatCompletionRequest) -> Response:
        """Answer a dialogue."""
        await self._check_model(body.model)
        turn = await self._read(body, turn_of)
        completion = Completion(request_id())
        if body.stream:
            return EventStream(self._chunks(completion, turn, body), self._stall_s)
        with turn.naming_fields():
            return JSONResponse(await completion.whole(self._chat.answer(turn.request)))

    async def tokenize(self, body: Annotated[TokenizeTextRequest | TokenizeChatRequest, InBody()]) -> Response:
        """Tell the tokens of a text or a dialogue; the media of a dialogue are encoded for that."""
        model = await self._check_model(body.model)
        if isinstance(body, TokenizeTextRequest):
            ids = await self._tokenizing.of_text(body.prompt)
        else:
            turn = await self._read(body, measured_turn_of)
            with turn.naming_fields():
                ids = await self._tokenizing.of_dialogue(turn.request)
        tokenized = {"count": len(ids), "max_model_len": model.max_context_tokens, "tokens": ids, "token_strs": None}
        return JSONResponse(tokenized)

    async def list_models(self) -> Response:
        """Name the model that is served."""
        return JSONResponse({"object": "list", "data": [self._described(await self._models.served())]})

    async def retrieve_model(self, model: str) -> Response:
        """Describe the model of a name."""
        return JSONResponse(self._described(await self._models.find(model)))

    async def upload_medium(self, digest: str, request: Request) -> Response:
        """Keep the bytes that are the request's body, if they are those of the digest."""
        try:
            stored = await self._library.upload(checked_digest(digest, "digest"), request.stream())
        except InvalidRequest as error:
            error.field = _UPLOAD_PARAMS.get(error.field, error.field)
            raise
        return JSONResponse(
            {
                "url": digest_url(stored.digest),
                "digest": stored.digest,
                "size_bytes": stored.size_bytes,
                "expires_at": int(stored.expire_time.timestamp()),
            }
        )

    async def _check_model(self, name: str | None) -> ServedModel:
        return await (self._models.find(name) if name else self._models.served())

    async def _read(self, body: B, turn_of: Callable[[B, Mapping[str, bytes]], Turn]) -> Turn:
        contents = await self._fetched(body.messages)
        if carried_chars(body.messages) <= _READ_ON_LOOP_CHARS:
            return turn_of(body, contents)
        return await asyncio.to_thread(turn_of, body, contents)

    async def _fetched(self, messages: list[ChatMessage]) -> dict[str, bytes]:
        places = remote_places(messages)
        if len(places) > self._max_remote_media:
            raise InvalidRequest(f"At most {self._max_remote_media} URLs are fetched at once.", field="messages")
        return await fetched(self._remote, places) if places else {}

    async def _chunks(
        self, completion: Completion, turn: Turn, body: ChatCompletionRequest
    ) -> AsyncGenerator[dict[str, Any], None]:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = completion.chunks(self._chat.answer(turn.request), body.n or 1, with_usage=with_usage)
        with turn.naming_fields():
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk

    def _described(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._start_time,
            "owned_by": _OWNER,
            "max_model_len": model.max_context_tokens,
        }
