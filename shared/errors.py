"""Everything that can go wrong in a way a caller should know about.

ServiceError
|-- InvalidRequest                 INVALID_ARGUMENT
|   |-- EmptyMessage
|   |-- InvalidGenerationConfig
|   |-- PromptTooLong
|   |-- MediaUnreadable
|   |-- MediaTooLarge
|   |-- MediaDigestMismatch
|   |-- EmbeddingHandleInvalid
|   |-- VideoRangeEmpty
|   |-- InvalidJsonSchema
|   |-- RemoteUrlRefused
|   `-- NotSupportedByModel
|-- NotFound                       NOT_FOUND
|   |-- ConversationNotFound
|   |-- MediaNotFound
|   |-- EmbeddingNotFound
|   |-- ModelNotFound
|   |-- BatchNotFound
|   `-- MessageNotFound
|-- ConversationBusy               ABORTED
|-- EmbeddingIncompatible          FAILED_PRECONDITION
|-- NoCritic                       FAILED_PRECONDITION
|-- TurnIdReused                   FAILED_PRECONDITION
|-- QueueFull                      RESOURCE_EXHAUSTED
|-- RateLimited                    RESOURCE_EXHAUSTED
|-- ClientTooSlow                  RESOURCE_EXHAUSTED
|-- Unavailable                    UNAVAILABLE
|   |-- NotReady
|   |-- VisionUnavailable
|   |-- LlmUnavailable
|   |-- StoreUnavailable
|   `-- CriticUnavailable
|-- DeadlineExceeded               DEADLINE_EXCEEDED
|-- ApiKeyInvalid                  UNAUTHENTICATED
|-- NotPermitted                   PERMISSION_DENIED
`-- InternalError                  INTERNAL

CheckpointError is apart: it stops a service at start and never reaches a client.
Messages are ours and fit to be shown to a client: no library's words, no paths, no content.
"""

from enum import Enum
from typing import ClassVar


class Code(Enum):
    """The canonical status of an error; `shared.rpc.status` turns it into gRPC's."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ABORTED = "ABORTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"


class ServiceError(Exception):
    """An error with a status code, a reason for programs and a message for people.

    `field` names the request field at fault, `resource` the thing that is missing, `retry_after_s` when to try again;
    at most one of them is set. `quota`, a budget that is used up, goes with `retry_after_s`.
    """

    code: ClassVar[Code]
    reason: ClassVar[str]

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        resource: str | None = None,
        retry_after_s: float | None = None,
        quota: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.resource = resource
        self.retry_after_s = retry_after_s
        self.quota = quota


class InvalidRequest(ServiceError):
    """A field has a value that is not allowed."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class EmptyMessage(InvalidRequest):
    """The message to answer has neither text nor media."""

    reason = "EMPTY_MESSAGE"


class InvalidGenerationConfig(InvalidRequest):
    """A decoding parameter is out of range, not a number, or too long."""

    reason = "INVALID_GENERATION_CONFIG"


class PromptTooLong(InvalidRequest):
    """Prompt and requested output do not fit into the model's context."""

    reason = "PROMPT_TOO_LONG"


class MediaUnreadable(InvalidRequest):
    """The bytes are no picture of an accepted format, or are cut short or damaged."""

    reason = "MEDIA_UNREADABLE"


class MediaTooLarge(InvalidRequest):
    """The medium has more bytes, pixels or tiles than are accepted."""

    reason = "MEDIA_TOO_LARGE"


class MediaDigestMismatch(InvalidRequest):
    """The bytes do not have the digest that was announced."""

    reason = "MEDIA_DIGEST_MISMATCH"


class EmbeddingHandleInvalid(InvalidRequest):
    """An embedding handle was not issued by this system, or was changed since."""

    reason = "EMBEDDING_HANDLE_INVALID"


class VideoRangeEmpty(InvalidRequest):
    """The part of a video that was asked for lies outside of it."""

    reason = "VIDEO_RANGE_EMPTY"


class InvalidJsonSchema(InvalidRequest):
    """A JSON schema is malformed, uses what is not supported, or cannot be met by any text."""

    reason = "INVALID_JSON_SCHEMA"


class RemoteUrlRefused(InvalidRequest):
    """The medium behind a URL is not fetched, or could not be; the message says the same whatever was in the way."""

    reason = "REMOTE_URL_REFUSED"


class NotSupportedByModel(InvalidRequest):
    """The model that is served has no form for what was asked, such as tools or grounding tags."""

    reason = "NOT_SUPPORTED_BY_MODEL"


class NotFound(ServiceError):
    """Something that was named does not exist."""

    code = Code.NOT_FOUND


class ConversationNotFound(NotFound):
    """There is no such conversation, or it has expired."""

    reason = "CONVERSATION_NOT_FOUND"


class MediaNotFound(NotFound):
    """The bytes of a digest are not held; they have to be uploaded."""

    reason = "MEDIA_NOT_FOUND"


class EmbeddingNotFound(NotFound):
    """An embedding has left every cache; the medium has to be encoded again."""

    reason = "EMBEDDING_NOT_FOUND"


class BatchNotFound(NotFound):
    """There is no such batch, or it has expired."""

    reason = "BATCH_NOT_FOUND"


class MessageNotFound(NotFound):
    """A conversation has no message of this id."""

    reason = "MESSAGE_NOT_FOUND"


class ModelNotFound(NotFound):
    """Another model than the one that is served was asked for by name."""

    reason = "MODEL_NOT_FOUND"


class ConversationBusy(ServiceError):
    """Another turn of the conversation is running."""

    code = Code.ABORTED
    reason = "CONVERSATION_BUSY"


class EmbeddingIncompatible(ServiceError):
    """An embedding was made for another model."""

    code = Code.FAILED_PRECONDITION
    reason = "EMBEDDING_INCOMPATIBLE"


class NoCritic(ServiceError):
    """Ranking by a critic was asked for, and there is none."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_CRITIC"


class TurnIdReused(ServiceError):
    """A conversation has another turn of this id."""

    code = Code.FAILED_PRECONDITION
    reason = "TURN_ID_REUSED"


class QueueFull(ServiceError):
    """A queue has no room; `retry_after_s` says when to try again."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class RateLimited(ServiceError):
    """A tenant has used up a budget: `quota` names it, `retry_after_s` says when the same request will pass."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "RATE_LIMITED"


class ClientTooSlow(ServiceError):
    """The client does not read what it has asked for."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "CLIENT_TOO_SLOW"


class Unavailable(ServiceError):
    """Something that is needed cannot be reached."""

    code = Code.UNAVAILABLE


class NotReady(Unavailable):
    """The service is starting or shutting down."""

    reason = "NOT_READY"


class VisionUnavailable(Unavailable):
    """No vision replica can be reached."""

    reason = "VISION_UNAVAILABLE"


class LlmUnavailable(Unavailable):
    """No LLM replica can be reached, or the one that served the call was lost."""

    reason = "LLM_UNAVAILABLE"


class StoreUnavailable(Unavailable):
    """The store that keeps conversations or media cannot be reached."""

    reason = "STORE_UNAVAILABLE"


class CriticUnavailable(Unavailable):
    """The critic that ranks candidates cannot be reached."""

    reason = "CRITIC_UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The time that the caller allowed has passed."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class ApiKeyInvalid(ServiceError):
    """No API key was shown, or one that is unknown, wrong, revoked or expired; which of them is not told."""

    code = Code.UNAUTHENTICATED
    reason = "API_KEY_INVALID"


class NotPermitted(ServiceError):
    """The caller is known, and may not do this."""

    code = Code.PERMISSION_DENIED
    reason = "NOT_PERMITTED"


class InternalError(ServiceError):
    """A fault of ours."""

    code = Code.INTERNAL
    reason = "INTERNAL"


class CheckpointError(Exception):
    """A checkpoint directory cannot be served; the message names the file, tensor or setting."""


def reasons() -> dict[str, type[ServiceError]]:
    """Return every error class that is raised, by its reason."""
    found: dict[str, type[ServiceError]] = {}
    pending = [ServiceError]
    while pending:
        for error in pending.pop().__subclasses__():
            pending.append(error)
            if "reason" in vars(error):
                found[error.reason] = error
    return found
