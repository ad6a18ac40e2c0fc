"""Text to token ids and token ids to bytes, for the tokenizer files of a checkpoint.

The library's tokenizer finds added tokens in any text it is given, so it never sees a client's text whole: text is
encoded by the bare vocabulary, and control tokens are looked up by their strings.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.checkpoint import read_json
from shared.errors import CheckpointError

GROUNDING_MARKERS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", *GROUNDING_MARKERS)
# Class in tokenizer_config.json -> class of the library that reads the same files; never one of the checkpoint.
_CLASSES = {
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
}


class Tokenizer:
    """A byte-level BPE tokenizer (Qwen2, Llama 3). Safe to share between threads."""

    def __init__(self, vocabulary: Any, added_tokens: dict[str, int], special: frozenset[str], bos: list[int]) -> None:
        """Take the bare vocabulary (`tokenizers.Tokenizer`), the added tokens and those of them that are special.

        Special tokens never come out of text, and are dropped from answers only if the checkpoint lists them.
        """
        self._vocabulary = vocabulary
        self._added = added_tokens
        self.bos_ids = bos
        control = special | set(_INTERNVL_TOKENS)
        self.control_ids = frozenset(added_tokens[token] for token in control if token in added_tokens)
        self._ordinary = _alternatives(token for token in added_tokens if token not in control)
        self._with_markers = _alternatives(
            token for token in added_tokens if token not in control or token in GROUNDING_MARKERS
        )
        self._bytes = _token_bytes(vocabulary, added_tokens)
        self.hidden_ids = frozenset(added_tokens[token] for token in special if token in added_tokens)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Return the ids of plain text; with `markup` the grounding markers become their own tokens."""
        ids: list[int] = []
        pattern = self._with_markers if markup else self._ordinary
        for part in pattern.split(text) if pattern else (text,):
            if part:
                ids += [self._added[part]] if part in self._added and pattern else self._encode_bare(part)
        return ids

    def token_id(self, token: str) -> int:
        """Return the id of a control token, or raise `CheckpointError` if the vocabulary has none of this name."""
        found = self._added.get(token)
        if found is None:
            found = self._vocabulary.token_to_id(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}, which the template needs.")
        return int(found)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token stands for; empty for an id that the vocabulary does not have."""
        return self._bytes.get(token_id, b"")

    def _encode_bare(self, text: str) -> list[int]:
        # The batch form without offsets: it is the one that lets other threads run meanwhile.
        ids: list[int] = self._vocabulary.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint directory. Runs no code of the checkpoint's."""
    import transformers
    from tokenizers import Tokenizer as BareTokenizer

    config = read_json(directory / "tokenizer_config.json")
    name = config.get("tokenizer_class")
    if name not in _CLASSES:
        raise CheckpointError(
            f"{directory}: tokenizer class {name!r} is not supported; supported: {', '.join(_CLASSES)}."
        )
    try:
        library = getattr(transformers, _CLASSES[name]).from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: the tokenizer files cannot be read ({type(error).__name__}).") from None
    description = json.loads(library.backend_tokenizer.to_str())
    added = {entry["content"]: int(entry["id"]) for entry in description["added_tokens"]}
    bos: Sequence[int] = library.backend_tokenizer.encode("").ids
    description |= {"added_tokens": [], "post_processor": None}
    bare = BareTokenizer.from_str(json.dumps(description))
    return Tokenizer(bare, added, listed_special_tokens(config) & added.keys(), list(bos))


def listed_special_tokens(config: dict[str, Any]) -> frozenset[str]:
    """Return the tokens that tokenizer_config.json lists as special: only these vanish from decoded text."""
    names = [config.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    entries = [*names, *config.get("additional_special_tokens", ())]
    return frozenset(entry["content"] if isinstance(entry, dict) else entry for entry in entries if entry)


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _token_bytes(vocabulary: Any, added_tokens: dict[str, int]) -> dict[int, bytes]:
    alphabet = _byte_alphabet()
    table = {
        token_id: bytes(alphabet[character] for character in token)
        for token, token_id in vocabulary.get_vocab(with_added_tokens=False).items()
        if all(character in alphabet for character in token)
    }
    return table | {token_id: token.encode() for token, token_id in added_tokens.items()}


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
