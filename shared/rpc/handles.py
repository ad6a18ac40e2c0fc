"""Signs embedding handles, so that nobody can ask a cache for an embedding that they were not given."""

import hmac
import time
from collections.abc import Callable

from blake3 import blake3

from internvl_serving.common.v1 import embedding_pb2
from shared.digest import digest_of_fields
from shared.errors import EmbeddingHandleInvalid, EmbeddingNotFound


class HandleSigner:
    """Signs and checks handles with a key that vision and LLM services share. `clock` is the time of day in seconds.

    With an empty key a signature is a checksum that anybody can make.
    """

    def __init__(self, key: str, clock: Callable[[], float] = time.time) -> None:
        self._key = blake3(key.encode(), derive_key_context="internvl-serving embedding handles v1").digest()
        self._clock = clock

    def sign(self, handle: embedding_pb2.EmbeddingHandle) -> None:
        """Put the signature over all other fields into the handle."""
        handle.signature = self._signature(handle)

    def check(self, handle: embedding_pb2.EmbeddingHandle) -> None:
        """Raise `EmbeddingHandleInvalid` for a handle that was changed, `EmbeddingNotFound` for one that is over."""
        if not hmac.compare_digest(self._signature(handle), handle.signature):
            raise EmbeddingHandleInvalid("The handle was not issued by this system; encode the medium again.")
        if handle.expire_time.seconds <= self._clock():
            raise EmbeddingNotFound("The handle has expired; encode the medium again.", resource=handle.digest)

    def _signature(self, handle: embedding_pb2.EmbeddingHandle) -> bytes:
        # Field by field, because the bytes of a message are not the same in every version of its type.
        fields = digest_of_fields(
            handle.digest,
            handle.media_digest,
            handle.tenant,
            handle.tile_count,
            handle.token_count,
            handle.hidden_size,
            handle.data_type,
            handle.frame_count,
            handle.source,
            handle.expire_time.seconds,
        )
        return blake3(fields.encode(), key=self._key).digest()
