"""What a call can fail with, made from gRPC's status and its details.

InternVLError
|-- InvalidRequestError        INVALID_ARGUMENT       the request has to change
|-- NotFoundError              NOT_FOUND              conversation, batch or picture
|-- ConversationBusyError      ABORTED                another turn is running
|-- PreconditionError          FAILED_PRECONDITION
|-- OverloadedError            RESOURCE_EXHAUSTED     try again after `retry_after_s`
|-- UnavailableError           UNAVAILABLE            nobody answers, or not yet, or no longer
|-- DeadlineError              DEADLINE_EXCEEDED      `timeout_s` has passed; also a TimeoutError
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
    not come from the server. `field` names the request field at fault, `resource` what is missing.
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
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.reason = reason
        self.field = field
        self.resource = resource
        self.retry_after_s = retry_after_s
        self.request_id = request_id


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
    )

    def __init__(self, status: status_pb2.Status) -> None:
        self.info, self.bad_request, self.resource_info, self.retry_info = (kind() for kind in self.kinds)
        for detail in status.details:
            for kept in (self.info, self.bad_request, self.resource_info, self.retry_info):
                detail.Unpack(kept)

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
        return f"No gateway answers at {address}."
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "The time allowed for the call has passed."
    return f"{address} answered {code.name}{f': {words}' if words else ''}"


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
