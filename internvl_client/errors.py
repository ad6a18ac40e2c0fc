"""What a call can fail with, made from gRPC's status and its details.

InternVLError
|-- InvalidRequestError        INVALID_ARGUMENT       the request has to change
|-- NotFoundError              NOT_FOUND              conversation, batch or picture
|-- ConversationBusyError      ABORTED                another turn is running
|-- PreconditionError          FAILED_PRECONDITION
|-- OverloadedError            RESOURCE_EXHAUSTED     try again after `retry_after_s`
|-- UnavailableError           UNAVAILABLE            nobody answers, or not yet, or no longer
|-- DeadlineError              DEADLINE_EXCEEDED      `timeout_s` has passed; also a TimeoutError
|-- UnauthenticatedError       UNAUTHENTICATED        the server wants an API key that it knows
|-- NotPermittedError          PERMISSION_DENIED      the key is good, but not for this
`-- ServerError                everything else        the request id finds it in the server's log
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "internvl-serving"
MEDIA_NOT_FOUND = "MEDIA_NOT_FOUND"
MEDIA_UNREADABLE = "MEDIA_UNREADABLE"
_DETAILS_KEY = "grpc-status-details-bin"


class InternVLError(Exception):
    """A call that failed.

    `reason` is an entry of `internvl_serving.common.v1.ErrorReason` without its prefix, or empty where the status did
    not come from the server. `field` names the request field at fault, `resource` what is missing,
    `quota` the budget that is used up.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        field: str | None = None,
        resource: str | None = None,
        retry_after_s: float | None = None,
        quota: str | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.reason = reason
        self.field = field
        self.resource = resource
        self.retry_after_s = retry_after_s
        self.quota = quota
        self.request_id = request_id

    @property
    def is_retryable(self) -> bool:
        """Whether the same call may succeed later as it is: after `retry_after_s`, or else in about a second.

        A call that had begun to answer begins anew; nothing that failed this way has been kept.
        """
        return self.retry_after_s is not None or self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)


class InvalidRequestError(InternVLError):
    """The request cannot be served as it is; `field` and `reason` say why."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(InternVLError):
    """A conversation, a batch or a picture is not there, or no longer; `resource` names it."""

    code = grpc.StatusCode.NOT_FOUND


class ConversationBusyError(InternVLError):
    """Another turn of the conversation is running."""

    code = grpc.StatusCode.ABORTED


class PreconditionError(InternVLError):
    """The system is not in a state in which the request makes sense."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OverloadedError(InternVLError):
    """There is too much to do; try again after `retry_after_s`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(InternVLError):
    """The gateway cannot be reached or is not ready, or a stage that it needs is not."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineError(InternVLError, TimeoutError):
    """The time allowed with `timeout_s` has passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class UnauthenticatedError(InternVLError):
    """The call showed no API key, or none that the server takes, or no longer."""

    code = grpc.StatusCode.UNAUTHENTICATED


class NotPermittedError(InternVLError):
    """The call showed a good API key, which is not good for this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ServerError(InternVLError):
    """The server failed; its log has `request_id`."""

    code = grpc.StatusCode.INTERNAL


class _Details:
    """The parts of a `google.rpc.Status` that we send."""

    kinds: ClassVar = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.ResourceInfo,
        error_details_pb2.RetryInfo,
        error_details_pb2.QuotaFailure,
    )

    def __init__(self, status: status_pb2.Status) -> None:
        kept = tuple(kind() for kind in self.kinds)
        self.info, self.bad_request, self.resource_info, self.retry_info, self.quota_failure = kept
        for detail in status.details:
            for each in kept:
                detail.Unpack(each)

    @property
    def reason(self) -> str:
        return str(self.info.reason) if self.info.domain == ERROR_DOMAIN else ""

    @property
    def field(self) -> str | None:
        violations = self.bad_request.field_violations
        return violations[0].field if violations else None

    @property
    def resource(self) -> str | None:
        return self.resource_info.resource_name or None

    @property
    def quota(self) -> str | None:
        violations = self.quota_failure.violations
        return violations[0].subject if violations else None

    @property
    def retry_after_s(self) -> float | None:
        if not self.retry_info.HasField("retry_delay"):
            return None
        return float(self.retry_info.retry_delay.ToMilliseconds() / 1000)


@contextmanager
def translated(address: str, request_id: str) -> Iterator[None]:
    """Raise the failures of gRPC calls made inside as `InternVLError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(error, address, request_id) from None


def error_of(error: grpc.RpcError, address: str, request_id: str) -> InternVLError:
    """Return the error that the status of a call to `address` stands for."""
    code = _code_of(error)
    details = _Details(_rich_status(error))
    return _kind_of(code)(
        _message(error, code, details, address),
        code=code,
        reason=details.reason,
        field=details.field,
        resource=details.resource,
        retry_after_s=details.retry_after_s,
        quota=details.quota,
        request_id=request_id,
    )


def error_of_item(
    number: int, reason: str, message: str, *, field: str, resource: str, request_id: str
) -> InternVLError:
    """Return the error that one item of many ended with; `number` is the canonical status code."""
    code = next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)
    return _kind_of(code)(
        message, code=code, reason=reason, field=field or None, resource=resource or None, request_id=request_id
    )


def _kind_of(code: grpc.StatusCode) -> type[InternVLError]:
    return next((kind for kind in InternVLError.__subclasses__() if kind.code is code), ServerError)


def _code_of(error: grpc.RpcError) -> grpc.StatusCode:
    code = _asked(error, "code")
    # A call that we did not cancel ourselves was dropped by a server that is full or stops.
    return grpc.StatusCode.UNAVAILABLE if code is grpc.StatusCode.CANCELLED else code or grpc.StatusCode.UNKNOWN


def _message(error: grpc.RpcError, code: grpc.StatusCode, details: _Details, address: str) -> str:
    words = str(_asked(error, "details") or "")
    if details.reason:
        return words
    if code is grpc.StatusCode.UNAVAILABLE:
        return _absence(words.lower(), address)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "The time allowed for the call has passed."
    return f"{address} answered {code.name}{f': {words}' if words else ''}"


def _absence(words: str, address: str) -> str:
    # What gRPC says is for people who know it, but tells a mistake in the settings from an absent gateway.
    if "handshake" in words or "verification" in words:
        return f"TLS with {address} fails: it shows no certificate of that name and authority, or speaks no TLS."
    if "socket closed" in words and "failing" in words:
        return f"{address} hangs up at once: it wants TLS, or a certificate."
    return f"No gateway answers at {address}."


def _rich_status(error: grpc.RpcError) -> status_pb2.Status:
    for key, value in _asked(error, "trailing_metadata") or ():
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def _asked(error: grpc.RpcError, name: str) -> Any:
    # Both the blocking and the asyncio error carry these methods; grpc.RpcError itself does not declare them.
    method = getattr(error, name, None)
    return method() if method else None
