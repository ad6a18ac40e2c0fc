"""What the services' `convert` modules share: durations and element types as messages."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration

from internvl_serving.common.v1 import embedding_pb2
from shared.embedding import DataType

DATA_TYPE_OF_MESSAGE: Mapping[int, DataType] = {
    embedding_pb2.DATA_TYPE_FLOAT32: "float32",
    embedding_pb2.DATA_TYPE_FLOAT16: "float16",
    embedding_pb2.DATA_TYPE_BFLOAT16: "bfloat16",
    embedding_pb2.DATA_TYPE_INT8_ROWS: "int8_rows",
}
MESSAGE_OF_DATA_TYPE: Mapping[DataType, embedding_pb2.DataType.ValueType] = {
    "float32": embedding_pb2.DATA_TYPE_FLOAT32,
    "float16": embedding_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": embedding_pb2.DATA_TYPE_BFLOAT16,
    "int8_rows": embedding_pb2.DATA_TYPE_INT8_ROWS,
}


def duration_of(seconds: float) -> Duration:
    """Return a `Duration` of so many seconds."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def seconds_of(duration: Duration) -> float:
    """Return the seconds of a `Duration`."""
    return duration.ToNanoseconds() / 1e9
