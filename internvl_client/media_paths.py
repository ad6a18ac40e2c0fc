"""Files of pictures and videos, by the end of their name, and how terminals paste their paths."""

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

PICTURE_ENDINGS: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEO_ENDINGS: Final = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")

_WORD: Final = re.compile(r"\S+")
# Quoted as a shell would read it, or with what is special escaped; up to white space that is neither.
_PASTED: Final = re.compile(r"""(?:'[^']*'|"(?:[^"\\]|\\.)*"|\\.|[^\s'"\\])+""")


def is_video(path: Path) -> bool:
    """Return whether a file is a video, by the end of its name."""
    return path.suffix.lower() in VIDEO_ENDINGS


def split_pasted(line: str) -> tuple[list[Path], str]:
    """Return the files of pictures and videos that a typed line names, and the line without them.

    A file counts if it is there and its name ends as a picture's or a video's. Paths may be plain, quoted, escaped or
    `file://` URLs; a line that is one path needs none of that.
    """
    if whole := _medium(line.strip()):
        return [whole], ""
    paths: list[Path] = []
    rest, position = [], 0
    while word := _WORD.search(line, position):
        end, found = _media_at(line, word.start(), word.end())
        rest.append(line[position : word.start() if found else end])
        paths += [found] if found else []
        position = end
    return paths, " ".join("".join([*rest, line[position:]]).split()) if paths else line


def _media_at(line: str, start: int, word_end: int) -> tuple[int, Path | None]:
    """Return where the word that begins at `start` ends, and the file that it names if it names one."""
    if pasted := _PASTED.match(line, start):
        with suppress(ValueError):  # an apostrophe is no quotation
            parts = shlex.split(pasted.group())
            if len(parts) == 1 and (found := _medium(parts[0])):
                return pasted.end(), found
    return word_end, _medium(line[start:word_end])


def _medium(text: str) -> Path | None:
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    path = Path(text)
    if path.suffix.lower() not in (*PICTURE_ENDINGS, *VIDEO_ENDINGS):
        return None
    # What is no path of this machine: too long, an unknown user.
    with suppress(OSError, ValueError, RuntimeError):
        expanded = path.expanduser()
        return expanded if expanded.is_file() else None
    return None
