"""An embedding store without a Redis, for tests of what stands on one."""

import asyncio

from shared.embedding import Embedding, EmbeddingInfo, EmbeddingKey
from shared.patience import Patience


class MemoryStore:
    """An embedding store in a dictionary; `broken` answers as a store whose Redis is gone."""

    def __init__(self, broken: bool = False) -> None:
        self.kept: dict[EmbeddingKey, Embedding] = {}
        self.broken = broken
        self.reads = 0

    async def describe(self, key: EmbeddingKey, patience: Patience) -> EmbeddingInfo | None:
        await asyncio.sleep(0)
        return self.kept[key].info if key in self.kept else None

    async def get(self, key: EmbeddingKey) -> Embedding | None:
        self.reads += 1
        return self.kept.get(key)

    def put(self, embedding: Embedding) -> "asyncio.Future[bool]":
        return asyncio.ensure_future(self._put(embedding))

    async def delete(self, key: EmbeddingKey) -> None:
        self.kept.pop(key, None)

    async def erase(self, tenant: str, media_digest: str | None) -> int:
        gone = [key for key in self.kept if key.tenant == tenant and media_digest in (None, key.media_digest)]
        for key in gone:
            del self.kept[key]
        return len(gone)

    async def _put(self, embedding: Embedding) -> bool:
        await asyncio.sleep(0)
        if not self.broken:
            self.kept[embedding.key] = embedding
        return not self.broken
