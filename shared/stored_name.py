"""What embeddings are called in the store: the keys of their values."""

import hashlib
import re
from dataclasses import dataclass
from typing import Final

_PREFIX: Final = "ivl:embedding"
_MANIFEST_KEY: Final = re.compile(rf"{_PREFIX}:([0-9a-f]{{32}}):([0-9a-f]{{64}}):([0-9a-f]{{64}})".encode())


@dataclass(frozen=True, slots=True)
class StoredName:
    """An embedding's name in the store, where only a tag tells whose it is. All in lower-case hex digits."""

    tenant_tag: str
    media_digest: str
    digest: str

    @property
    def manifest_key(self) -> bytes:
        """The key of the manifest."""
        return f"{_PREFIX}:{self.tenant_tag}:{self.media_digest}:{self.digest}".encode()

    def group_key(self, index: int) -> bytes:
        """Return the key of a group."""
        return b"%b:%d" % (self.manifest_key, index)

    def belongs_to(self, tenant_tag: str, media_digest: str | None) -> bool:
        """Return whether it is the tenant's, and made from the medium; None is any."""
        return self.tenant_tag == tenant_tag and media_digest in (None, self.media_digest)


def tenant_tag_of(tenant: str) -> str:
    """Return the 32 hex digits that stand for a tenant in the store."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:32]


def name_of(key: bytes) -> StoredName | None:
    """Return the embedding whose manifest has the key; None: it is no manifest's."""
    match = _MANIFEST_KEY.fullmatch(key)
    return StoredName(*(part.decode() for part in match.groups())) if match else None


def keys_of(tenant_tag: str | None, media_digest: str | None = None) -> str:
    """Return the pattern of the keys of a tenant's embeddings of one medium; None is any."""
    return f"{_PREFIX}:{tenant_tag or '*'}:{media_digest or '*'}:*"
