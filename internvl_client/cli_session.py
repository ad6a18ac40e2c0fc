"""What a dialogue at the terminal knows: the media that were opened, their names, and how answers are shown."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from internvl_client.cli import INSTALL_HINT, CommandFailure
from internvl_client.cli_output import show_answer
from internvl_client.client import AnswerStream, Conversation
from internvl_client.content import Detail, Image, Media, Part, Video
from internvl_client.grounding import Orientation, draw_boxes, parse_boxes, picture_size
from internvl_client.media_paths import is_video
from internvl_client.terminal_picture import can_show_pictures, show_picture
from internvl_client.types import Answer, GenerationConfig

_BOX_TAG = "<box>"


@dataclass(frozen=True, slots=True)
class Clip:
    """Which frames of videos are seen; None leaves it to the server."""

    num_segments: int | None = None
    start_s: float | None = None
    end_s: float | None = None


class ChatSession:
    """Opens media, asks and shows answers.

    Answers' boxes are drawn on the last picture and written to `save_boxes`, where that is given; `orientation` is how
    the server sees pictures; `brief` says on one line what an answer cost.
    """

    def __init__(
        self,
        console: Console,
        config: GenerationConfig,
        max_tiles: int | None = None,
        *,
        detail: Detail | None = None,
        clip: Clip | None = None,
        save_boxes: Path | None = None,
        orientation: Orientation = "card",
        brief: bool = False,
    ) -> None:
        if save_boxes is not None and find_spec("PIL") is None:
            raise CommandFailure(f"drawing boxes needs Pillow: {INSTALL_HINT}")
        self.console = console
        self.config = config
        self.names: dict[str, str] = {}
        self._max_tiles = max_tiles
        self._detail = detail
        self._clip = clip or Clip()
        self._save_boxes = save_boxes
        self._orientation: Orientation = orientation
        self._brief = brief
        self._last_picture: Image | None = None

    def open(self, path: Path, max_tiles: int | None = None) -> Image:
        """Return the picture in a file; raise `CommandFailure` when it cannot be read.

        `max_tiles` None takes what the session was made with.
        """
        tiles = max_tiles or self._max_tiles
        try:
            picture = Image.open(path.expanduser(), max_tiles=tiles, detail=None if tiles else self._detail)
        except OSError as error:
            raise CommandFailure(f"cannot read {path}: {error.strerror}.") from None
        self.names[picture.digest] = path.name
        self._last_picture = picture
        return picture

    def open_video(self, path: Path) -> Video:
        """Return the video in a file; raise `CommandFailure` when it cannot be read."""
        clip = self._clip
        try:
            video = Video.open(
                path.expanduser(),
                num_segments=clip.num_segments,
                start_s=clip.start_s,
                end_s=clip.end_s,
                max_tiles=self._max_tiles,
            )
        except OSError as error:
            raise CommandFailure(f"cannot read {path}: {error.strerror}.") from None
        self.names[video.digest] = path.name
        return video

    def open_any(self, path: Path) -> Media:
        """Return the picture or, by the end of its name, the video in a file; raise `CommandFailure`."""
        return self.open_video(path) if is_video(path) else self.open(path)

    def show_medium(self, medium: Media) -> None:
        """Show a picture where the terminal can, or else say what it is."""
        content = medium.content or b""
        if isinstance(medium, Image) and can_show_pictures(self.console):
            with suppress(ValueError):  # the server will say what is wrong with it
                show_picture(self.console, content, orientation=self._orientation)
        kind = "picture" if isinstance(medium, Image) else "video"
        self.console.print(f"  {kind:<8} {self.names[medium.digest]}, {_size(len(content))}", style="dim")

    def ask(self, conversation: Conversation, *parts: Part, temperature: float | None = None) -> Answer:
        """Ask one question, show the answer and return it; `temperature` goes before the session's own."""
        config = self.config if temperature is None else replace(self.config, temperature=temperature)
        return self.show(conversation.stream(*parts, config=config))

    def show(self, stream: AnswerStream) -> Answer:
        """Show an answer as it comes, save its boxes where that is wished, and return it."""
        is_single = (self.config.candidate_count or 1) == 1
        answer = show_answer(self.console, stream, self.names, streams=is_single, brief=self._brief)
        if self.console.is_terminal:
            self._list_boxes(answer.text)
        if self._save_boxes is not None:
            self._draw(answer.text, self._save_boxes)
        return answer

    def _list_boxes(self, text: str) -> None:
        """Print the boxes of an answer in pixels of the last picture, where there is one whose size can be told."""
        picture = self._last_picture
        if _BOX_TAG not in text or picture is None or picture.content is None or find_spec("PIL") is None:
            return
        try:
            size = picture_size(picture.content, orientation=self._orientation)
        except ValueError:
            return
        for box in parse_boxes(text, *size):
            corners = f"({box.left:.0f}, {box.top:.0f}) to ({box.right:.0f}, {box.bottom:.0f})"
            self.console.print(f"  {'box':<8} {corners} px {box.label}".rstrip(), style="dim")

    def _draw(self, text: str, target: Path) -> None:
        if self._last_picture is None or self._last_picture.content is None:
            raise CommandFailure("there is no picture to draw boxes on.")
        content = self._last_picture.content
        try:
            boxes = parse_boxes(text, *picture_size(content, orientation=self._orientation))
            if boxes:
                target.write_bytes(draw_boxes(content, boxes, orientation=self._orientation))
        except (OSError, ValueError) as error:
            raise CommandFailure(f"cannot save boxes as {target}: {error}") from None
        note = f"{len(boxes)} drawn on {self.names[self._last_picture.digest]}, {target}" if boxes else "none to draw"
        self.console.print(f"  {'boxes':<8} {note}", style="dim")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:.1f} kB"
