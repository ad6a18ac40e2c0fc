"""Every documented reason has its error class, and every error survives the way to a client and back."""

import re
from pathlib import Path

import grpc
import pytest

from internvl_serving.common.v1.error_pb2 import ErrorReason
from shared.errors import (
    Code,
    DeadlineExceeded,
    InternalError,
    LlmUnavailable,
    QueueFull,
    ServiceError,
    VisionUnavailable,
    reasons,
)
from shared.rpc.status import from_rpc_error, to_status

PROTO = Path(__file__).parents[2] / "protos/internvl_serving/common/v1/error.proto"


def documented() -> dict[str, str]:
    """Reason and status code, as the comments of the proto say."""
    pattern = r"// ([A-Z_]+): [^\n]*(?:\n  // [^\n]*)*\n  ERROR_REASON_(\w+) ="
    return {reason: code for code, reason in re.findall(pattern, PROTO.read_text())}


def test_reasons_in_the_proto_and_in_the_code_are_the_same_with_the_same_codes() -> None:
    assert documented() == {reason: error.code.value for reason, error in reasons().items()}
    names = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.DESCRIPTOR.values_by_name} - {"UNSPECIFIED"}
    assert names == set(reasons())


def test_every_code_is_a_grpc_status() -> None:
    assert all(code.value in grpc.StatusCode.__members__ for code in Code)


def rpc_error(code: grpc.StatusCode, trailing: tuple[tuple[str, bytes], ...] = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "a library's words", "debug")


@pytest.mark.parametrize("error_class", reasons().values())
@pytest.mark.parametrize(
    "detail",
    [
        {},
        {"field": "a.b"},
        {"resource": "ab"},
        {"retry_after_s": 2.5},
        {"retry_after_s": 2.5, "quota": "tokens_per_minute"},
    ],
)
def test_an_error_keeps_class_message_and_detail_over_the_wire(
    error_class: type[ServiceError], detail: dict[str, str | float]
) -> None:
    status = to_status(error_class("What happened.", **detail))  # type: ignore[arg-type]
    back = from_rpc_error(rpc_error(status.code, status.trailing_metadata), LlmUnavailable)
    assert type(back) is error_class
    assert back.message == "What happened."
    names = ("field", "resource", "retry_after_s", "quota")
    assert {name: getattr(back, name) for name in names} == dict.fromkeys(names) | detail


def test_a_client_is_never_told_to_come_back_early() -> None:
    status = to_status(QueueFull("Later.", retry_after_s=1.0001))
    back = from_rpc_error(rpc_error(status.code, status.trailing_metadata), LlmUnavailable)
    assert back.retry_after_s == 1.001


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, VisionUnavailable),
        (grpc.StatusCode.CANCELLED, VisionUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFull),
        (grpc.StatusCode.UNKNOWN, InternalError),
        (grpc.StatusCode.INTERNAL, InternalError),
    ],
)
def test_a_status_that_is_not_ours_becomes_ours_without_its_words(
    code: grpc.StatusCode, expected: type[ServiceError]
) -> None:
    error = from_rpc_error(rpc_error(code), VisionUnavailable)
    assert type(error) is expected
    assert "library" not in error.message


def test_damaged_details_are_ignored() -> None:
    error = from_rpc_error(
        rpc_error(grpc.StatusCode.UNAVAILABLE, (("grpc-status-details-bin", b"\xff\xff\xff"),)), VisionUnavailable
    )
    assert isinstance(error, VisionUnavailable)
