"""The one translation between our errors and gRPC statuses, both ways."""

import math
from typing import NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from shared.errors import (
    DeadlineExceeded,
    InternalError,
    QueueFull,
    ServiceError,
    Unavailable,
    reasons,
)

DOMAIN = "internvl-serving"
_DETAILS_KEY = "grpc-status-details-bin"
_BY_REASON = reasons()


class CallStatus(NamedTuple):
    """What ends a call."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def to_status(error: ServiceError) -> CallStatus:
    """Return the status of an error: canonical code, our message, ErrorInfo and at most one further detail.

    Only a quota that is used up comes with two: which it is, and when to try again.
    """
    code = grpc.StatusCode[error.code.value]
    status = status_pb2.Status(code=code.value[0], message=error.message)
    for detail in _details(error):
        status.details.add().Pack(detail)
    return CallStatus(code, error.message, ((_DETAILS_KEY, status.SerializeToString()),))


def from_rpc_error(error: grpc.RpcError, unavailable: type[Unavailable]) -> ServiceError:
    """Return the error that another service's status stands for; `unavailable` is its absence."""
    if known := _known(error):
        return known
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("The deadline passed while another stage was working.")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return QueueFull("A stage has too much to do; try again later.", retry_after_s=1.0)
    # grpcio cancels calls that a server never accepted, and those of a server that stops; we cancel none ourselves
    # and then look at the status.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return unavailable("A stage that is needed cannot be reached; try again.")
    return InternalError("Another stage failed; its log has the request id.")


def _details(error: ServiceError) -> list[Message]:
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        return [info, error_details_pb2.BadRequest(field_violations=[violation])]
    if error.resource is not None:
        return [info, error_details_pb2.ResourceInfo(resource_name=error.resource, description=error.message)]
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))  # never early: it would be refused again
        return [info, error_details_pb2.RetryInfo(retry_delay=delay), *_quota_failure(error)]
    return [info]


def _quota_failure(error: ServiceError) -> list[Message]:
    if error.quota is None:
        return []
    violation = error_details_pb2.QuotaFailure.Violation(subject=error.quota, description=error.message)
    return [error_details_pb2.QuotaFailure(violations=[violation])]


def _known(error: grpc.RpcError) -> ServiceError | None:
    status = _rich_status(error)
    info, field, resource, retry, quota = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.ResourceInfo(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.QuotaFailure(),
    )
    for detail in status.details:
        for kind in (info, field, resource, retry, quota):
            detail.Unpack(kind)
    if info.domain != DOMAIN or info.reason not in _BY_REASON:
        return None
    return _BY_REASON[info.reason](
        status.message,
        field=field.field_violations[0].field if field.field_violations else None,
        resource=resource.resource_name or None,
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None,
        quota=quota.violations[0].subject if quota.violations else None,
    )


def _rich_status(error: grpc.RpcError) -> status_pb2.Status:
    trailing = getattr(error, "trailing_metadata", lambda: None)() or ()
    for key, value in trailing:
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()
