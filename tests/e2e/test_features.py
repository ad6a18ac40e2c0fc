"""Videos, batches, candidates and a critic through the whole system, with golden answers where there are some."""

import json
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

import pytest

from deploy.local import LocalStack, StackOptions
from internvl_client import (
    Answer,
    Client,
    InternVLError,
    InvalidRequestError,
    NotFoundError,
    RankingMethod,
    Video,
    batch_from_card,
    parts_from_card,
)
from tests.e2e.golden_cases import checkpoint_directory, config_of, find_case, golden_image, images_of, up_to_stop
from tests.golden_cases import CHECKPOINTS, GOLDEN

pytestmark = pytest.mark.e2e
CHECKPOINT = CHECKPOINTS[0]
VIDEO = find_case(CHECKPOINT, "video_frames")


def clip(num_segments: int | None = None, start_s: float | None = None) -> Video:
    path = GOLDEN / "video" / VIDEO["video"]["file"]
    return Video.open(path, num_segments=num_segments or VIDEO["video"]["num_segments"], start_s=start_s)


def test_a_video_file_gives_the_reference_ids(client: Client) -> None:
    asked = VIDEO["question"].rpartition("<image>\n")[2]
    answer = client.ask(*parts_from_card(f"<video>\n{asked}", [clip()]), config=config_of(VIDEO), return_token_ids=True)
    assert list(answer.prompt_token_ids) == VIDEO["input_ids"]
    assert list(answer.token_ids) == VIDEO["output_ids"]
    assert len(answer.receipts[0].frames) == VIDEO["video"]["num_segments"]


def test_a_later_turn_about_a_video_encodes_nothing(client: Client) -> None:
    conversation = client.create_conversation()
    conversation.ask(clip(5), "What?", max_output_tokens=4)
    answer = conversation.ask("And then?", max_output_tokens=4)
    assert answer.receipts[0].cache_hit
    assert len(answer.receipts[0].frames) == 5
    (message, *_) = conversation.messages()
    assert message.media == (clip(5),)


def test_more_new_videos_than_the_vision_service_has_room_for_take_turns(client: Client) -> None:
    content = clip().content
    assert content is not None
    # An empty box at the end makes it another video that shows the same.
    videos = [Video.from_bytes(content + b"\0\0\0\x08free" * (number + 1), num_segments=1) for number in range(7)]
    answer = client.ask(*videos, "What?", max_output_tokens=2)
    assert [receipt.cache_hit for receipt in answer.receipts] == [False] * 7


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (clip(10_000), "INVALID_REQUEST"),
        (replace(clip(), num_segments=0), "INVALID_REQUEST"),
        (clip(4, start_s=1000.0), "VIDEO_RANGE_EMPTY"),
        (Video.from_bytes(b"no video"), "MEDIA_UNREADABLE"),
    ],
)
def test_a_video_that_cannot_be_seen_has_its_reason(client: Client, video: Video, reason: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.ask(video, "What?")
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["batch_images", "batch_text"])
def test_a_batch_gives_the_reference_ids(client: Client, name: str) -> None:
    case = find_case(CHECKPOINT, name)
    images = images_of(CHECKPOINT, case) or [None] * len(case["questions"])
    stop_id = json.loads((GOLDEN / "expected" / CHECKPOINT / "cases.json").read_text())["eos_token_id"]
    outcomes = client.ask_batch(
        batch_from_card(case["questions"], images), config=config_of(case), return_token_ids=True
    )
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    assert [list(answer.token_ids) for answer in answers] == [up_to_stop(row, stop_id) for row in case["output_ids"]]
    for question, image, answer in zip(case["questions"], images, answers, strict=True):
        parts = batch_from_card([question], [image])[0]
        alone = client.ask(*parts, config=config_of(case), return_token_ids=True)
        assert (answer.prompt_token_ids, answer.model) == (alone.prompt_token_ids, alone.model)


def test_what_is_wrong_with_one_question_is_no_other_s_fault(client: Client) -> None:
    cat = golden_image("rgb_square.png", 1)
    outcomes = client.ask_batch(["Hi", [Video.from_bytes(b"no video"), "?"], [cat, "?"]], max_output_tokens=4)
    assert [outcome.reason if isinstance(outcome, InternVLError) else "" for outcome in outcomes] == [
        "",
        "MEDIA_UNREADABLE",
        "",
    ]


def test_a_batch_that_there_is_not_has_its_reason(client: Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.batch("a" * 32).info()
    assert caught.value.reason == "BATCH_NOT_FOUND"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a system with a critic. Which one is known from its scores only: the models are random."""
    model = checkpoint_directory(CHECKPOINT)
    options = StackOptions(model, logs=tmp_path_factory.mktemp("logs"), critic=model)
    with LocalStack(options) as stack, Client(stack.address, timeout_s=60) as client:
        assert {"critic-vision", "critic-llm"} <= set(stack.processes)
        yield client


def test_a_critic_reads_the_picture_and_chooses(judged: Client) -> None:
    picture = golden_image("rgb_landscape.png", 2)
    answer = judged.ask(picture, "What?", candidate_count=4, temperature=1.0, seed=3, max_output_tokens=12)
    scores = [candidate.score for candidate in answer.candidates]
    assert answer.best_index == scores.index(max(scores))
    for candidate in answer.candidates:
        assert candidate.score == pytest.approx(fmean(candidate.step_scores))
        assert 0 < min(candidate.step_scores) <= max(candidate.step_scores) < 1
    assert len(set(scores)) > 1
    # The very same answer gets the same score, whatever else is judged beside it.
    again = judged.ask(
        picture, "What?", temperature=1.0, seed=3, max_output_tokens=12, ranking_method=RankingMethod.CRITIC
    )
    assert again.text == answer.candidates[0].text
    assert again.candidates[0].step_scores == pytest.approx(answer.candidates[0].step_scores, abs=1e-4)


def test_a_system_without_a_critic_says_so(client: Client) -> None:
    with pytest.raises(InternVLError) as caught:
        client.ask("Hi", ranking_method=RankingMethod.CRITIC)
    assert caught.value.reason == "NO_CRITIC"
    answer = client.ask("Hi", candidate_count=2, temperature=1.0, max_output_tokens=4)
    assert [candidate.score for candidate in answer.candidates] == [
        candidate.mean_logprob for candidate in answer.candidates
    ]
