"""How much a turn is guessed to cost before anything is known of it, and how much it has cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.caller import current_caller
from gateway.content import Medium, Message
from gateway.events import CacheTier, ChatRequest, Encoded
from shared.lru import LruCache

_TOKENS_PER_TILE: Final = 256
_BYTES_PER_TOKEN: Final = 4  # of text in UTF-8: about right for English, Chinese and code alike
_ANSWER_TOKENS: Final = 256  # where a request sets no limit
_TILES_OF_A_PICTURE: Final = 12  # the most that released checkpoints cut a picture into by themselves
_FRAMES: Final = 8  # of a video, where a request does not say
_KNOWN_MEDIA: Final = 10_000
# What encoding a tile costs beside reading a token: as long as reading some 1,000, measured on CPUs with the 1B model.
_TOKENS_PER_ENCODE: Final = 1024


@dataclass(frozen=True, slots=True)
class Weight:
    """What a turn takes: tokens read and written, those of its pictures included, and tiles that have to be encoded."""

    tokens: int = 0
    tiles: int = 0

    @property
    def cost(self) -> int:
        """One number for both, at least 1."""
        return max(1, self.tokens + self.tiles * _TOKENS_PER_ENCODE)


class Scales:
    """Guesses the weight of turns, with what earlier ones have shown of their media. One event loop only.

    Whether a medium was seen is remembered by tenant: nobody learns what others have shown.
    """

    def __init__(self) -> None:
        self._tiles = LruCache[tuple[str, Medium], int](_KNOWN_MEDIA, lambda tiles: 1)

    def guess(self, request: ChatRequest) -> Weight:
        """Return what a turn may take at most, by what the request says; a kept dialogue behind it is not counted."""
        text = request.system_message or ""
        tokens = _tokens_of(text) + sum(map(_tokens_of_message, request.messages))
        tokens += sum(_tokens_of(tool.description + tool.parameters_json_schema) for tool in request.tools)
        config = request.config
        tokens += (config.max_output_tokens or _ANSWER_TOKENS) * (config.candidate_count or 1)
        media = [medium for message in request.messages for medium in message.media]
        shown = self.guess_media(media, request.max_total_tiles)
        return Weight(tokens + shown.tokens, shown.tiles)

    def guess_media(self, media: Sequence[Medium], max_total_tiles: int | None = None) -> Weight:
        """Return what media take at most. A medium that was seen before has its embedding, most likely."""
        known = [self._tiles.get(_key(medium)) for medium in media]
        new = sum(_most_tiles(medium) for medium, tiles in zip(media, known, strict=True) if tiles is None)
        seen = sum(tiles for tiles in known if tiles is not None)
        if max_total_tiles is not None:
            new = min(new, max_total_tiles)
        return Weight((new + seen) * _TOKENS_PER_TILE, new)

    def note(self, encoded: Mapping[Medium, Encoded]) -> None:
        """Remember how many tiles media have."""
        for medium, each in encoded.items():
            self._tiles.put(_key(medium), each.handle.tile_count)


def encoded_tiles(encoded: Mapping[Medium, Encoded]) -> int:
    """Return how many tiles had to be encoded; what a cache held, or was being encoded for others, does not count."""
    made = (each for each in encoded.values() if each.cache_tier is CacheTier.NONE and not each.coalesced)
    return sum(each.handle.tile_count for each in made)


def _key(medium: Medium) -> tuple[str, Medium]:
    # What came with its bytes has no digest before it is hashed: that is never known.
    return current_caller().tenant, medium


def _tokens_of_message(message: Message) -> int:
    calls = "".join(call.name + call.arguments_json for call in message.tool_calls)
    return _tokens_of(message.text) + _tokens_of(calls)


def _tokens_of(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode(errors="replace"))
    return -(-size // _BYTES_PER_TOKEN)


def _most_tiles(medium: Medium) -> int:
    options, video = medium.options, medium.options.video
    if video is not None:
        frames = _FRAMES if video.segment_count is None else video.segment_count
        return frames * (options.max_tiles or 1)
    tiles = _TILES_OF_A_PICTURE if options.max_tiles is None else options.max_tiles
    return tiles if options.thumbnail is False or tiles == 1 else tiles + 1
