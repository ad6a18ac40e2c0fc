"""A cache in this process's memory, bounded in bytes."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class LruCache(Generic[V]):
    """Values by digest, least recently used first out. One thread only. `size_of` says how many bytes a value takes."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._entries: OrderedDict[str, V] = OrderedDict()
        self.size_bytes = 0

    def get(self, digest: str) -> V | None:
        """Return the value and mark it as just used; None is a miss."""
        if digest in self._entries:
            self._entries.move_to_end(digest)
        return self._entries.get(digest)

    def put(self, digest: str, value: V) -> None:
        """Keep the value, dropping the least recently used ones to stay within the bound."""
        self.delete(digest)
        if self._size_of(value) > self._max_bytes:
            return
        self._entries[digest] = value
        self.size_bytes += self._size_of(value)
        while self.size_bytes > self._max_bytes:
            self.delete(next(iter(self._entries)))

    def delete(self, digest: str) -> None:
        """Forget the value, if it is there."""
        if digest in self._entries:
            self.size_bytes -= self._size_of(self._entries.pop(digest))
