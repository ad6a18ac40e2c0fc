"""What the blocks of the KV cache are called by, so that a prompt finds what was computed before."""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from struct import pack
from typing import Final

import numpy as np

from llm_service.engine.sequence import EngineRequest, Sequence

_KEY_BYTES: Final = 16
_ROOT: Final = bytes(_KEY_BYTES)

# Names the rotation that a prompt's tokens get by the prompt's length: 0 for the plain one.
RotationOf = Callable[[int], int]


def always_plain(length: int) -> int:
    """Return 0: every prompt's tokens are rotated plainly."""
    return 0


class PrefixKeys:
    """Names blocks: two have the same key exactly if they hold the same keys and values.

    Those depend on every token up to the block's end: on its id; where it stands for a picture, on the embedding and
    the row of it; on where it stands, if not at its index; and on how a prompt of that length is rotated. A key is the
    hash of the block's own share of that and of the key of the block before it. 128 bits, so that nobody finds two
    prompts with the same keys. Those of a tenant begin with a hash of its name: no time that a prompt takes tells what
    another tenant has asked.
    """

    def __init__(self, block_size: int, rotation_of: RotationOf) -> None:
        self._block_size = block_size
        self._rotation_of = rotation_of

    def extend(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Return the keys of the sequence's first `num_blocks` blocks, all of whose tokens are known."""
        keys = seq.block_keys
        if len(keys) < num_blocks:
            first = len(keys) * self._block_size
            ids = np.array(seq.token_ids[first : num_blocks * self._block_size], dtype="<i4").tobytes()
            extras = self._extras(seq.request, len(keys), num_blocks)
            size = 4 * self._block_size
            for index in range(num_blocks - len(keys)):
                before = keys[-1] if keys else _root_of(seq.request.tenant)
                own = ids[index * size : (index + 1) * size]
                keys.append(blake2b(own + next(extras), key=before, digest_size=_KEY_BYTES).digest())
        return keys[:num_blocks]

    def _extras(self, request: EngineRequest, first: int, end: int) -> Iterator[bytes]:
        """Yield, block by block, what tells tokens of the same ids apart; empty for text that stands at its index."""
        num_prompt = len(request.prompt.ids)
        rotation = self._rotation_of(num_prompt)
        for block in range(first, end):
            start = block * self._block_size
            stop = start + self._block_size
            parts = [_visual(request, start, stop)]
            if request.positions is not None:
                # Behind the prompt the positions go on by one a token: the prompt's last one says where.
                parts.append(b"p" + request.positions[min(start, num_prompt - 1) : stop].numpy().tobytes())
            if rotation and start < num_prompt:
                parts.append(b"r" + pack("<qi", rotation, min(stop, num_prompt) - start))
            yield b"".join(parts)


def _root_of(tenant: str) -> bytes:
    return blake2b(tenant.encode(), digest_size=_KEY_BYTES, person=b"tenant").digest() if tenant else _ROOT


def _visual(request: EngineRequest, start: int, stop: int) -> bytes:
    """Return which rows of which embeddings stand where between the positions `start` and `stop`."""
    rows: list[bytes] = []
    for place in request.prompt.placeholders:
        first, last = max(start, place.start), min(stop, place.start + place.length)
        if first < last:
            where = pack("<iii", first - start, last - first, place.offset + first - place.start)
            rows.append(b"v" + place.ref.digest.encode() + where)
    return b"".join(rows)
