"""A cache in this process's memory, bounded in bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key, least recently used first out. One thread only.

    `size_of` says how many bytes a value takes; `evicted` is called for each that has to go so that others fit.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[V], int], evicted: Callable[[], None] = lambda: None) -> None:
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._evicted = evicted
        self._entries: OrderedDict[K, V] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: K) -> V | None:
        """Return the value and mark it as just used; None is a miss."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep the value, dropping the least recently used ones to stay within the bound."""
        self.delete(key)
        if self._size_of(value) > self._max_bytes:
            return
        self._entries[key] = value
        self.size_bytes += self._size_of(value)
        while self.size_bytes > self._max_bytes:
            self.delete(next(iter(self._entries)))
            self._evicted()

    def __iter__(self) -> Iterator[K]:
        """Yield the keys, least recently used first."""
        return iter(self._entries)

    def delete(self, key: K) -> None:
        """Forget the value, if it is there."""
        if key in self._entries:
            self.size_bytes -= self._size_of(self._entries.pop(key))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.size_bytes = 0
