"""How a video becomes turns: one line for each frame, as the cards write it."""

import json
from pathlib import Path

import pytest

from gateway.content import MediaPart, Medium, Part, PreprocessOptions, TextPart, VideoOptions
from gateway.prompt import EmbeddingHandle, TextSegment, VisualSegment, segments_of

GOLDEN = Path(__file__).parents[1] / "golden/expected"
PICTURE = MediaPart((Medium("a" * 64),))


def video(segment_count: int) -> MediaPart:
    return MediaPart((Medium(f"{segment_count:064d}", PreprocessOptions(video=VideoOptions(segment_count))),))


def written(*parts: Part | str) -> str:
    """What the model reads, with a tag for each picture and each frame."""
    said = [TextPart(part) if isinstance(part, str) else part for part in parts]
    handles = {
        medium: EmbeddingHandle(
            medium.digest, 1, 256, b"", (medium.options.video.segment_count or 8) if medium.options.video else 0
        )
        for part in said
        if isinstance(part, MediaPart)
        for medium in part.media
    }
    segments = segments_of(said, handles)
    frames = [segment.frame for segment in segments if isinstance(segment, VisualSegment)]
    assert [frame for frame in frames if frame is not None] == sorted(frame for frame in frames if frame is not None)
    return "".join(segment.text if isinstance(segment, TextSegment) else "<image>" for segment in segments)


def golden_videos() -> list[tuple[int, str]]:
    return [
        (case["video"]["num_segments"], case["question"])
        for path in sorted(GOLDEN.glob("*/cases.json"))
        for case in json.loads(path.read_text())["cases"]
        if "video" in case
    ]


@pytest.mark.parametrize(("num_segments", "question"), golden_videos())
def test_a_video_is_written_as_the_cards_write_it(num_segments: int, question: str) -> None:
    asked = question.rpartition("<image>\n")[2]
    assert written(video(num_segments), asked) == question
    assert written(video(num_segments), f"\n{asked}") == question


def test_every_frame_is_its_own_segment_of_the_one_handle() -> None:
    clip = video(3)
    handle = EmbeddingHandle("x", 3, 768, b"", 3)
    segments = segments_of([clip, TextPart("Go.")], {clip.media[0]: handle})
    visuals = [segment for segment in segments if isinstance(segment, VisualSegment)]
    assert [(visual.handles, visual.frame) for visual in visuals] == [((handle,), frame) for frame in range(3)]


def test_a_picture_is_no_frame() -> None:
    (segment,) = segments_of([PICTURE], {PICTURE.media[0]: EmbeddingHandle("x", 1, 256, b"")})
    assert segment == VisualSegment((EmbeddingHandle("x", 1, 256, b""),), None)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("Look: ", video(1), "Well?"), "Look: \nFrame1: <image>\nWell?"),
        (("Look:\n", video(1), " so"), "Look:\nFrame1: <image> so"),
        ((video(1), video(2)), "Frame1: <image>\nFrame1: <image>\nFrame2: <image>"),
        ((PICTURE, video(1), PICTURE), "<image>\nFrame1: <image>\n<image>"),
        ((video(2),), "Frame1: <image>\nFrame2: <image>"),
    ],
)
def test_frames_stand_on_lines_of_their_own(parts: tuple[Part | str, ...], text: str) -> None:
    assert written(*parts) == text
