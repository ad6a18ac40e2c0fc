"""Goes on with an answer whose stream was lost: its turn is sent once more under its id, and nothing is said twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from internvl_client.errors import InternVLError, UnavailableError
from internvl_client.types import ChatEvent, Delta, Finished, Started


class Resumption:
    """What one turn has said, over one stream or two.

    The server answers a turn of a kept conversation once: the second stream tells what it had kept, or else begins anew
    and, unless it samples without a seed, says the same. Where it says something else it is left, and the error of the
    first stream is raised.
    """

    def __init__(self, *, is_named: bool) -> None:
        self._is_named = is_named  # only then may a turn be sent again
        self._is_plain = True  # ids and candidates cannot be matched by their text
        self._has_started = False
        self._said = ""
        self._lost: InternVLError | None = None
        self._matched = 0

    def begin(self, error: UnavailableError) -> bool:
        """Return whether the turn is to be sent again after `error`: once, and not where the server has said why."""
        if self._lost or error.reason or not (self._is_named and self._is_plain):
            return False
        self._lost = error
        return True

    def news(self, event: ChatEvent) -> Iterator[ChatEvent]:
        """Yield what an event adds to what was said before; raise the first stream's error where they disagree."""
        if self._lost is None:
            self._note(event)
            yield event
        elif not isinstance(event, Started):
            yield from self._continued(event, self._lost)
        elif not self._has_started:
            yield event

    def _note(self, event: ChatEvent) -> None:
        if isinstance(event, Started):
            self._has_started = True
        elif isinstance(event, Delta):
            self._said += event.text
            self._is_plain &= not (event.candidate_index or event.token_ids or event.logprobs)

    def _continued(self, event: Delta | Finished, lost: InternVLError) -> Iterator[ChatEvent]:
        expected = self._said[self._matched :]
        if not expected:
            yield event
        elif isinstance(event, Finished) or event.candidate_index:
            raise lost
        else:
            known = event.text[: len(expected)]
            if not expected.startswith(known):
                raise lost
            self._matched += len(known)
            if rest := event.text[len(known) :]:
                yield replace(event, text=rest)
