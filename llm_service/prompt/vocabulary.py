"""The vocabularies of the model families without their added tokens: plain text to ids, and what bytes an id means."""

import codecs
import json
import re
from typing import Any, Final, Protocol

_WORD_SPACE: Final = "▁"  # U+2581, how SentencePiece writes a space
# normalizer_spec { add_dummy_prefix: false }. Protobuf merges a message that is repeated, so behind a model's file it
# changes this one field.
_NO_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x00"
_RESERVED_PIECE = re.compile(r"<\|[^<>]*\|>")


class Vocabulary(Protocol):
    """Plain text to ids and back. Safe to share between threads."""

    @property
    def reserved(self) -> frozenset[str]:
        """Tokens of the vocabulary itself that stand for no text, such as the beginning of a sequence."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text from within a prompt."""

    def token_id(self, token: str) -> int | None:
        """Return a token's id; None if the vocabulary has none of this name."""

    def token_bytes(self) -> dict[int, bytes]:
        """Return the UTF-8 bytes that each id stands for; ids of whole characters and of parts of them."""

    def opening_bytes(self) -> dict[int, bytes]:
        """Return the bytes of ids that mean something else where a run of text begins: a word without its space."""

    def decoder(self) -> codecs.IncrementalDecoder:
        """Return what makes text of the bytes of many ids, with U+FFFD where they are none, as the reference does."""


class BytePairVocabulary:
    """Byte-level BPE: Qwen2, Llama 3."""

    reserved: frozenset[str] = frozenset()

    def __init__(self, bare: Any) -> None:
        """Take a `tokenizers.Tokenizer` without added tokens and post-processor."""
        self._bare = bare

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text."""
        # The batch form without offsets: it is the one that lets other threads run meanwhile.
        ids: list[int] = self._bare.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its string."""
        found: int | None = self._bare.token_to_id(token)
        return found

    def token_bytes(self) -> dict[int, bytes]:
        """Return what each id stands for."""
        alphabet = _byte_alphabet()
        return {
            token_id: bytes(alphabet[character] for character in token)
            for token, token_id in self._bare.get_vocab(with_added_tokens=False).items()
            if all(character in alphabet for character in token)
        }

    def opening_bytes(self) -> dict[int, bytes]:
        """Return nothing: every id means the same everywhere."""
        return {}

    def decoder(self) -> codecs.IncrementalDecoder:
        """Return a decoder that writes one U+FFFD for the longest beginning of a character that is none."""
        return codecs.getincrementaldecoder("utf-8")(errors="replace")


class SentencePieceVocabulary:
    """A SentencePiece model with bytes to fall back on: InternLM2, InternLM3, Phi-3, Yi."""

    def __init__(self, model: bytes, *, literal_spaces: bool) -> None:
        """Take the content of a `tokenizer.model`; raise `ValueError` if it is none.

        With `literal_spaces` a space is written only where the text has one, and never dropped at its beginning;
        else both are as the model says.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX * literal_spaces)
        except RuntimeError:
            raise ValueError("no SentencePiece model") from None
        if not self._model.get_piece_size():
            raise ValueError("no SentencePiece model")
        self._pieces: list[str] = [self._model.id_to_piece(token) for token in range(self._model.get_piece_size())]
        # Something in front of text keeps the model from dropping the space that the text begins with.
        self._guard: str = self._pieces[self._model.unk_id()]
        self._guard_length = len(self._model.encode(self._guard))
        self._literal_spaces = literal_spaces

    @property
    def reserved(self) -> frozenset[str]:
        """Control pieces, the unknown piece, and pieces that look like control tokens."""
        return frozenset(
            piece
            for token, piece in enumerate(self._pieces)
            if self._is_mark(token) or _RESERVED_PIECE.fullmatch(piece)
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text."""
        if self._literal_spaces and text.startswith((_WORD_SPACE, " ")):
            guarded: list[int] = self._model.encode(self._guard + text)
            return guarded[self._guard_length :]
        ids: list[int] = self._model.encode(text)
        return ids

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its string."""
        token_id = int(self._model.piece_to_id(token))
        return token_id if self._pieces[token_id] == token else None

    def token_bytes(self) -> dict[int, bytes]:
        """Return what each id stands for."""
        return {token: self._bytes_of(token, piece) for token, piece in enumerate(self._pieces)}

    def opening_bytes(self) -> dict[int, bytes]:
        """Return the bytes of words without their first space."""
        words = {token: piece[1:] for token, piece in enumerate(self._pieces) if piece.startswith(_WORD_SPACE)}
        known = set(self._pieces)
        # The reference looks the rest up as a piece of its own; one that it does not find, it prints as it is written.
        return {
            token: (word.replace(_WORD_SPACE, " ") if word in known else word).encode() for token, word in words.items()
        }

    def decoder(self) -> codecs.IncrementalDecoder:
        """Return a decoder that writes one U+FFFD for each byte that is none."""
        return codecs.getincrementaldecoder("utf-8")(errors=_EACH_BYTE)

    def _is_mark(self, token: int) -> bool:
        return bool(self._model.is_control(token) or self._model.is_unknown(token))

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if self._model.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # <0x0A>
        return b"" if self._is_mark(token) else piece.replace(_WORD_SPACE, " ").encode()


def bare_byte_pairs(description: str) -> BytePairVocabulary:
    """Return the vocabulary of a `tokenizers.Tokenizer` given as JSON, without all that is not vocabulary.

    Raises `ValueError` where its tokens are not bytes, as those of a converted SentencePiece model are not.
    """
    from tokenizers import Tokenizer as BareTokenizer

    content = json.loads(description) | {"added_tokens": [], "post_processor": None}
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError("no byte-level vocabulary")
    return BytePairVocabulary(BareTokenizer.from_str(json.dumps(content)))


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Write U+FFFD for every byte that is no character, as SentencePiece does; Python writes one for several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


_EACH_BYTE: Final = "llm_service.replace_each_byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)
