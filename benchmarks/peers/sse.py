"""Server-sent events: the lines of a streamed HTTP answer, whatever pieces they come in."""

from collections.abc import Iterator
from typing import Final

END: Final = "[DONE]"


class EventLines:
    """Takes an answer's bytes as they come, and gives the data of each event that is complete.

    An event is one line "data: ..."; comments, other fields and empty lines are passed over. That is what servers with
    OpenAI's API send.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, content: bytes) -> Iterator[str]:
        """Yield the data of the events that end in `content`."""
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()
