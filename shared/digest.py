"""Identity of content: SHA-256 over bytes, or over length-prefixed fields."""

import hashlib
import re

from shared.errors import InvalidRequest

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(content: bytes | memoryview) -> str:
    """Return the SHA-256 of `content` as 64 lower-case hex digits."""
    return hashlib.sha256(content).hexdigest()


def digest_of_fields(*fields: str | int | bytes) -> str:
    """Return the SHA-256 over `fields`, each preceded by its length, so that no two lists of fields collide."""
    state = hashlib.sha256()
    for field in fields:
        encoded = field if isinstance(field, bytes) else str(field).encode()
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state.hexdigest()


def checked_digest(text: str, field: str) -> str:
    """Return `text` if it is a digest, else raise `InvalidRequest` naming `field`."""
    if not _HEX_DIGEST.fullmatch(text):
        raise InvalidRequest("A digest is the SHA-256 of the content as 64 lower-case hex digits.", field=field)
    return text
