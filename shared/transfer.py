"""Moves embeddings between memory and Redis on the calling thread, value by value, sealed or verified on the way."""

import threading
import time
from dataclasses import dataclass

import numpy as np

from shared.bulk import BulkConnection, BulkConnections
from shared.embedding import EmbeddingInfo
from shared.embedding_values import HEADER_BYTES, Bytes, EmbeddingFormat
from shared.stored_name import StoredName

_ON_THE_WAY = 2  # values asked for at a time: one travels while the one before it is verified


class ValueDamaged(Exception):
    """A value is not what was stored there."""


class ValueMissing(Exception):
    """There is no such value any more, or nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Transfers:
    """Reads and writes the groups of embeddings, any number of threads at a time.

    `timeout_s` bounds a value, which has 2 MiB at most, and not a whole embedding. Methods raise `StoreAway` and
    `StoreRefused`.
    """

    connections: BulkConnections
    value_format: EmbeddingFormat
    timeout_s: float

    def read(self, name: StoredName, info: EmbeddingInfo, first_s: float, stop: threading.Event) -> memoryview:
        """Return the tensor's bytes, in memory of their own.

        Gives up when the first value has not come after `first_s`, or once `stop` is set. Raises `ValueDamaged`,
        `ValueMissing`, and `MemoryError`.
        """
        # Not a bytearray: to fill one with zeros takes as long as to receive what goes there.
        payload = np.empty(info.size_bytes, np.uint8).data
        deadline = time.monotonic() + first_s
        with self.connections.connection() as connection:
            for index in range(min(_ON_THE_WAY, info.group_count)):
                connection.send(deadline, b"GET", name.group_key(index))
            for index in range(info.group_count):
                rows, header = payload[info.group_slice(index)], memoryview(bytearray(HEADER_BYTES))
                _read_value(connection, deadline, header, rows)
                deadline = time.monotonic() + self.timeout_s
                if index + _ON_THE_WAY < info.group_count:
                    connection.send(deadline, b"GET", name.group_key(index + _ON_THE_WAY))
                if not self.value_format.verify_group(name, info, index, header, rows):
                    raise ValueDamaged
                if stop.is_set():
                    raise ValueMissing
        return payload

    def write(self, name: StoredName, info: EmbeddingInfo, payload: Bytes, ttl_s: int, stop: threading.Event) -> None:
        """Store the groups, then the manifest, so that a manifest never precedes what it lists.

        Raises `ValueMissing` once `stop` is set.
        """
        rest, ttl = memoryview(payload), b"%d" % ttl_s
        with self.connections.connection() as connection:
            for index in range(info.group_count):
                rows = rest[info.group_slice(index)]
                header = self.value_format.group_header(name, info, index, rows)
                self._write_value(connection, name.group_key(index), ttl, header, rows)
                if stop.is_set():
                    raise ValueMissing
            self._write_value(connection, name.manifest_key, ttl, self.value_format.manifest(name, info))

    def _write_value(self, connection: BulkConnection, key: bytes, ttl: bytes, *value: Bytes) -> None:
        deadline = time.monotonic() + self.timeout_s
        connection.send(deadline, b"SETEX", key, ttl, value=value)
        connection.read_ok(deadline)


def _read_value(connection: BulkConnection, deadline: float, *targets: memoryview) -> None:
    size = connection.read_size(deadline)
    if size is None:
        raise ValueMissing
    if size != sum(map(len, targets)):
        raise ValueDamaged
    connection.read_into(deadline, *targets)
