"""Embeddings in this process's memory, in front of the store."""

from shared.embedding import Embedding, EmbeddingKey
from shared.lru import LruCache
from shared.metrics import StoreObserver
from shared.store_metrics import UNOBSERVED
from shared.stored_name import tenant_tag_of


class LocalEmbeddingCache:
    """Embeddings in this process's memory, least recently used first out, bounded in bytes. One thread only."""

    def __init__(self, max_bytes: int, observer: StoreObserver = UNOBSERVED) -> None:
        self._cache = LruCache[EmbeddingKey, Embedding](
            max_bytes, lambda embedding: embedding.info.size_bytes, lambda: observer.cache_evicted("embeddings")
        )
        self.epoch = 0  # grows whenever something is erased

    @property
    def size_bytes(self) -> int:
        """Bytes of all embeddings that are kept."""
        return self._cache.size_bytes

    def get(self, key: EmbeddingKey) -> Embedding | None:
        """Return the embedding and mark it as just used; None is a miss."""
        return self._cache.get(key)

    def put(self, embedding: Embedding, epoch: int | None = None) -> None:
        """Keep the embedding, dropping the least recently used ones to stay within the bound.

        With the `epoch` at which it began to be fetched it is not kept if anything was erased since: it may have been.
        """
        if epoch is None or epoch == self.epoch:
            self._cache.put(embedding.key, embedding)

    def erase(self, tenant: str, media_digest: str | None = None) -> int:
        """Forget a tenant's embeddings of one medium, None: of all its media; return how many there were."""
        return self.erase_tagged(tenant_tag_of(tenant), media_digest)

    def erase_tagged(self, tenant_tag: str, media_digest: str | None) -> int:
        """Do what `erase` does for the tenant whom the tag stands for."""
        self.epoch += 1
        gone = [key for key in self._cache if key.name.belongs_to(tenant_tag, media_digest)]
        for key in gone:
            self._cache.delete(key)
        return len(gone)

    def clear(self) -> None:
        """Forget everything."""
        self.epoch += 1
        self._cache.clear()
