"""Text to token ids and token ids to bytes, for the tokenizer files of a checkpoint.

The libraries' tokenizers find added tokens in any text they are given, so they never see a client's text whole: text is
encoded by the bare vocabulary, and control tokens are looked up by their strings.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llm_service.prompt.template import CHAT_TOKENS, IMG_CONTEXT, IMG_END, IMG_START
from llm_service.prompt.vocabulary import SentencePieceVocabulary, Vocabulary, bare_byte_pairs
from shared.checkpoint import read_json
from shared.errors import CheckpointError

GROUNDING_MARKERS: Final = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_INTERNVL_TOKENS = (IMG_START, IMG_END, IMG_CONTEXT, *GROUNDING_MARKERS)
# Class in tokenizer_config.json -> class of the library that reads the same files; never one of the checkpoint.
_BYTE_PAIR_CLASSES = {
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",  # the same class, by its name in transformers 5
}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is no part of the vocabulary proper, and the white space next to it that it swallows."""

    token_id: int
    is_special: bool = False
    takes_space_before: bool = False
    takes_space_behind: bool = False


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a family writes prompts and answers.

    `opens_with_space`: a prompt begins with a space of its own. `sets_apart`: in answers, spaces stand around an added
    token that the checkpoint does not list as special. `drops_space`: an answer, and the text behind such a token,
    loses its first word's space.
    """

    bos_ids: tuple[int, ...] = ()
    opens_with_space: bool = False
    sets_apart: bool = False
    drops_space: bool = False


class Tokenizer:
    """The tokenizer of a checkpoint, whichever family it is of. Safe to share between threads."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        added: Mapping[str, AddedToken],
        hidden: frozenset[str],
        rules: TextRules,
    ) -> None:
        """Take the vocabulary, the added tokens, and which tokens are dropped from answers.

        Control tokens never come out of text: the hidden ones, those flagged as special, InternVL's, the templates' and
        the vocabulary's own. Neither does the vocabulary's own spelling of one (`[UNUSED_TOKEN_145]` for `<|im_end|>`).
        """
        self._vocabulary = vocabulary
        self._added = added
        self.bos_ids = rules.bos_ids
        self.opens_with_space = rules.opens_with_space
        flagged = {token for token, entry in added.items() if entry.is_special}
        control = hidden | flagged | CHAT_TOKENS | vocabulary.reserved | set(_INTERNVL_TOKENS)
        self.control_ids = self._ids_of(control)
        self.hidden_ids = self._ids_of(hidden)
        self.marker_ids = self._ids_of(token for token in GROUNDING_MARKERS if token in added)
        unlisted = self._ids_of(added) - self.hidden_ids - self.marker_ids
        self.set_apart_ids = unlisted if rules.sets_apart else frozenset()
        ordinary = [token for token, entry in added.items() if entry.token_id not in self.control_ids]
        self._ordinary = _alternatives(ordinary)
        self._with_markers = _alternatives([*ordinary, *(token for token in GROUNDING_MARKERS if token in added)])
        own_bytes = vocabulary.token_bytes()
        self._bytes = own_bytes | {entry.token_id: token.encode() for token, entry in added.items()}
        self._opening_bytes = vocabulary.opening_bytes() if rules.drops_space else {}
        spellings = {own_bytes.get(token_id, b"").decode(errors="ignore") for token_id in self.control_ids}
        self._cuts = _cuts(
            text for text in control | spellings if text and not self.control_ids.isdisjoint(vocabulary.encode(text))
        )

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    @property
    def has_markers(self) -> bool:
        """Whether the grounding markers are tokens of this model's."""
        return all(token in self._added for token in GROUNDING_MARKERS)

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Return the ids of plain text from within a prompt; with `markup` the grounding markers become tokens."""
        ids: list[int] = []
        pattern = self._with_markers if markup else self._ordinary
        for index, part in enumerate(pattern.split(text) if pattern else (text,)):
            if index % 2:  # what the pattern matched; anything else that looks like an added token is text
                ids.append(self._added[part].token_id)
            elif part:
                ids += self._encode_bare(part)
        return ids

    def token_id(self, token: str) -> int:
        """Return the id of a control token, or raise `CheckpointError` if the vocabulary has none of this name."""
        found = self.find(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}, which the template needs.")
        return found

    def find(self, token: str) -> int | None:
        """Return the id of a token by its string, None if there is none of this name."""
        entry = self._added.get(token)
        return self._vocabulary.token_id(token) if entry is None else entry.token_id

    def takes_space_before(self, token: str) -> bool:
        """Whether a control token swallows the white space before it."""
        return token in self._added and self._added[token].takes_space_before

    def takes_space_behind(self, token: str) -> bool:
        """Whether a control token swallows the white space behind it."""
        return token in self._added and self._added[token].takes_space_behind

    def bytes_of(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token stands for; empty for an id that the vocabulary does not have."""
        return self._bytes.get(token_id, b"")

    def opening_bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for where a run of text in an answer begins."""
        return self._opening_bytes.get(token_id, self.bytes_of(token_id))

    def decoder(self) -> codecs.IncrementalDecoder:
        """Return what makes text of the bytes of an answer's tokens."""
        return self._vocabulary.decoder()

    def _ids_of(self, tokens: Iterable[str]) -> frozenset[int]:
        found = map(self.find, tokens)
        return frozenset(token_id for token_id in found if token_id is not None)

    def _encode_bare(self, text: str) -> list[int]:
        parts = self._cuts.split(text) if self._cuts else [text]
        ids = [token for part in parts for token in self._vocabulary.encode(part)]
        if self.control_ids.isdisjoint(ids):
            return ids
        # The vocabulary's own normal form made a control token of something else (a full-width `<`, say).
        spelled = [token for character in text for token in self._vocabulary.encode(character)]
        return [token for token in spelled if token not in self.control_ids]


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint directory. Runs no code of the checkpoint's."""
    config = read_json(directory / "tokenizer_config.json")
    name = str(config.get("tokenizer_class"))
    if name in _BYTE_PAIR_CLASSES:
        return _byte_pair_tokenizer(directory, config, _BYTE_PAIR_CLASSES[name])
    if name in _SENTENCE_PIECE_RULES:
        return _sentence_piece_tokenizer(directory, config, name)
    supported = ", ".join([*_BYTE_PAIR_CLASSES, *_SENTENCE_PIECE_RULES])
    raise CheckpointError(f"{directory}: tokenizer class {name!r} is not supported; supported: {supported}.")


def listed_special_tokens(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the tokens that tokenizer_config.json lists as special: only these vanish from decoded text."""
    names = [config.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    more = config.get("extra_special_tokens") or ()  # transformers 5 writes a list, earlier ones tokens by their roles
    more = more.values() if isinstance(more, dict) else more
    entries = [*names, *(config.get("additional_special_tokens") or ()), *more]
    return frozenset(text for text in map(_content, entries) if text)


def _byte_pair_tokenizer(directory: Path, config: Mapping[str, Any], class_name: str) -> Tokenizer:
    import transformers

    try:
        library = getattr(transformers, class_name).from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: the tokenizer files cannot be read ({type(error).__name__}).") from None
    description = library.backend_tokenizer.to_str()
    added = {entry["content"]: _added_token(entry["id"], entry) for entry in json.loads(description)["added_tokens"]}
    hidden = listed_special_tokens(config) & added.keys()
    if class_name == "PreTrainedTokenizerFast":  # here the flag alone makes a token special
        hidden |= {token for token, entry in added.items() if entry.is_special}
    rules = TextRules(tuple(library.backend_tokenizer.encode("").ids))
    try:
        vocabulary = bare_byte_pairs(description)
    except ValueError:
        raise CheckpointError(
            f"{directory / 'tokenizer.json'} has no byte-level vocabulary; give the model's own tokenizer files."
        ) from None
    return Tokenizer(vocabulary, added, frozenset(hidden), rules)


def _sentence_piece_tokenizer(directory: Path, config: Mapping[str, Any], name: str) -> Tokenizer:
    file = directory / "tokenizer.model"
    # Llama's own class, told not to be "legacy", begins a prompt with a space and adds none anywhere else.
    opens_with_space = name == "LlamaTokenizer" and config.get("legacy") is False
    try:
        vocabulary = SentencePieceVocabulary(file.read_bytes(), literal_spaces=opens_with_space)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete.") from None
    except (OSError, ValueError):
        raise CheckpointError(f"{file} cannot be read as a SentencePiece model.") from None
    added = {
        entry["content"]: _added_token(token_id, entry)
        for token_id, entry in config.get("added_tokens_decoder", {}).items()
    }
    bos = _content(config.get("bos_token")) if config.get("add_bos_token", True) else None
    bos_id = vocabulary.token_id(bos) if bos else None
    if bos and bos_id is None:
        raise CheckpointError(f"{directory / 'tokenizer_config.json'}: the vocabulary has no bos_token {bos!r}.")
    sets_apart, drops_space = _SENTENCE_PIECE_RULES[name]
    rules = TextRules(
        bos_ids=() if bos_id is None else (bos_id,),
        opens_with_space=opens_with_space,
        sets_apart=sets_apart,
        drops_space=drops_space,
    )
    return Tokenizer(vocabulary, added, listed_special_tokens(config), rules)


# Class in tokenizer_config.json -> `sets_apart` and `drops_space` of answers, as the classes of these names decode.
_SENTENCE_PIECE_RULES = {
    "InternLM2Tokenizer": (True, False),
    "InternLM3Tokenizer": (False, True),
    "LlamaTokenizer": (True, True),
}


def _added_token(token_id: int | str, entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        token_id=int(token_id),
        is_special=bool(entry.get("special")),
        takes_space_before=bool(entry.get("lstrip")),
        takes_space_behind=bool(entry.get("rstrip")),
    )


def _content(entry: Any) -> str | None:
    """Return the text of a token that tokenizer_config.json writes as a string, an object, or not at all (None)."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and not isinstance(text, str):
        raise CheckpointError("tokenizer_config.json has a special token that is no text.")
    return text


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _cuts(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Match, within each of the tokens, the place behind its first character: text cut there holds none of them."""
    places = [f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in sorted(tokens) if len(token) > 1]
    return re.compile("|".join(places)) if places else None
