"""What can be wrong with a medium wherever it is looked at, and how that is told from one process to another."""

from collections.abc import Mapping
from typing import Final

from shared.errors import MediaTooLarge, MediaUnreadable, ServiceError, VideoRangeEmpty

_REFUSALS: Final[Mapping[str, type[ServiceError]]] = {
    error.reason: error for error in (MediaUnreadable, MediaTooLarge, VideoRangeEmpty)
}


def is_refusal(error: ServiceError) -> bool:
    """Return whether the error says what is wrong with the medium itself."""
    return error.reason in _REFUSALS


def refusal_of(message: Mapping[str, str]) -> ServiceError:
    """Return the error with the `reason` and the words in `message`; raise `KeyError` where there is no such one."""
    return _REFUSALS[message["reason"]](message["message"])
