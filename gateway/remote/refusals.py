"""Why a URL is not fetched: what the client reads, and what only the log and the metrics may know."""

from enum import StrEnum
from typing import Final


class Outcome(StrEnum):
    """What became of a fetch."""

    FETCHED = "fetched"
    NOT_ALLOWED = "not_allowed"
    UNREACHABLE = "unreachable"
    UNSUITABLE = "unsuitable"
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    QUEUE_FULL = "queue_full"


class Refused(Exception):
    """A URL that is not fetched. `message` is for the client; `detail`, a word or two of ours, only for the log."""

    def __init__(self, outcome: Outcome, message: str, detail: str) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.detail = detail


# One sentence, whether the name is unknown, its address is not public, nobody answers there or the certificate is
# wrong: otherwise a client could ask which hosts there are behind the server's own firewall.
_UNREACHABLE: Final = "The host of this URL cannot be reached."


def not_allowed(message: str, detail: str) -> Refused:
    """Return the refusal of a URL that is not even looked up."""
    return Refused(Outcome.NOT_ALLOWED, message, detail)


def unreachable(detail: str) -> Refused:
    """Return the refusal of a URL whose host there is no way to."""
    return Refused(Outcome.UNREACHABLE, _UNREACHABLE, detail)


def unsuitable(message: str, detail: str) -> Refused:
    """Return the refusal of an answer that is no picture or video, or that breaks a rule of HTTP."""
    return Refused(Outcome.UNSUITABLE, message, detail)


def too_large(max_bytes: int) -> Refused:
    """Return the refusal of a medium of more than `max_bytes`."""
    message = f"What this URL leads to is larger than the {max_bytes} bytes that are fetched."
    return Refused(Outcome.TOO_LARGE, message, "larger than the limit")


def too_slow(detail: str) -> Refused:
    """Return the refusal of a medium that does not come fast enough."""
    return Refused(Outcome.TOO_SLOW, "What this URL leads to comes too slowly.", detail)
