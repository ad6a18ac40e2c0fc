"""Makes text of generated tokens while they come: whole characters only, cut at stop sequences, stripped."""

from collections.abc import Iterable

from llm_service.prompt.tokenizer import Tokenizer


class TextStream:
    """The text of one answer. What `push` and `finish` return, joined, is the whole text, cut and stripped.

    It is cut where the stop sequence begins that is complete first. Special tokens that the checkpoint lists are
    dropped, but with `grounding` the markers of boxes and references are kept, and with `include_special_tokens` every
    token is, as it stands.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_sequences: Iterable[str] = (),
        *,
        grounding: bool = False,
        include_special_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop_sequences)
        kept = tokenizer.marker_ids if grounding else frozenset()
        self._hidden = frozenset() if include_special_tokens else tokenizer.hidden_ids - kept
        self._set_apart = frozenset() if include_special_tokens else tokenizer.set_apart_ids
        self._decoder = tokenizer.decoder()
        # Where a run of ordinary text begins: at first, and behind a token that is set apart.
        self._opening, self._gap = not include_special_tokens, ""
        self._held = ""
        self._begun = False
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take a token; return the text that has become certain. After a stop sequence `stopped` is set."""
        if token_id in self._hidden or self.stopped:
            return ""
        self._held += self._text_of(token_id)
        return self._release(self._cut() or self._certain())

    def finish(self) -> str:
        """Return what was held back until the end was known; nothing after a stop sequence."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        end = self._cut() or len(self._held)
        return self._release(len(self._held[:end].rstrip()))

    def _text_of(self, token_id: int) -> str:
        """Return the text that a token completes, with the spaces that set some tokens apart."""
        if token_id in self._set_apart:
            self._opening, self._gap = True, " "
            return self._decoder.decode(b"", final=True) + " " + self._tokenizer.bytes_of(token_id).decode()
        if not self._opening:
            return self._decoder.decode(self._tokenizer.bytes_of(token_id))
        self._opening = False
        return self._gap + self._decoder.decode(self._tokenizer.opening_bytes_of(token_id))

    def _cut(self) -> int | None:
        """Return where the earliest stop sequence begins, and drop what follows; None if there is none."""
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if not found:
            return None
        self.stopped = True
        self._held = self._held[: min(found)].rstrip()
        return len(self._held) or None

    def _certain(self) -> int:
        """Return how much can neither begin a stop sequence nor be trailing white space."""
        if self.stopped:
            return 0
        possible = max((overlap(self._held, stop) for stop in self._stops), default=0)
        return len(self._held[: len(self._held) - possible].rstrip())

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop`, short of all of it, that `text` ends with."""
    end = text[max(0, len(text) - len(stop) + 1) :]
    start = end.find(stop[0])
    while start >= 0 and not stop.startswith(end[start:]):
        start = end.find(stop[0], start + 1)
    return len(end) - start if start >= 0 else 0
