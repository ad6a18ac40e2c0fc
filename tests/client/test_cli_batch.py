"""`internvl batch` against a scripted gateway."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from internvl_client import batch_lines, cli_batch
from internvl_client.batch_lines import LineError, MediaFiles, MediumOptions, read_lines
from internvl_client.results_file import ResultsFile, ResultsInUse
from internvl_serving.common.v1 import generation_pb2
from internvl_serving.gateway.v1 import batch_service_pb2, chat_service_pb2
from tests.client.command_line import run
from tests.client.fake_gateway import FakeGateway, refuse

pytestmark = pytest.mark.usefixtures("own_account")


class AnsweringGateway(FakeGateway):
    """Answers each item of a batch with its last text; fails those that say "bad", refuses batches with "malformed".

    The first `full` batches are refused for now.
    """

    full = 0

    def CreateBatch(self, request: Any, context: Any) -> batch_service_pb2.CreateBatchResponse:
        if self.full:
            self.full -= 1
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        texts = [item.messages[-1].parts[-1].text for item in request.items]
        if "malformed" in texts:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        self.results = [result_of(index, text) for index, text in enumerate(texts)]
        return super().CreateBatch(request, context)


def result_of(index: int, text: str) -> batch_service_pb2.BatchResult:
    if text == "bad":
        error = batch_service_pb2.BatchError(code=3, reason="MEDIA_UNREADABLE", message="Ours.", field="messages")
        return batch_service_pb2.BatchResult(item_index=index, error=error)
    usage = generation_pb2.TokenUsage(prompt_token_count=9, output_token_count=2)
    answer = batch_service_pb2.BatchAnswer(
        started=chat_service_pb2.ChatStarted(model="tiny"),
        finished=chat_service_pb2.ChatFinished(
            finish_reason=generation_pb2.FINISH_REASON_STOP,
            usage=usage,
            candidates=[chat_service_pb2.Candidate(output_token_count=2)],
        ),
        candidates=[batch_service_pb2.BatchCandidate(text=f"{text}!")],
    )
    return batch_service_pb2.BatchResult(item_index=index, answer=answer)


@pytest.fixture
def gateway_class() -> type[FakeGateway]:
    return AnsweringGateway


class Batch:
    """A folder with questions, and the command that asks them."""

    def __init__(self, folder: Path, address: str, *tools: Any) -> None:
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self._address, self._tools = address, tools

    def write(self, *lines: Any) -> None:
        self.source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def run(self, *options: str) -> tuple[Any, ...]:
        return run(*self._tools, "batch", self.source, self.target, "--address", self._address, *options)

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.target.read_text().splitlines()]


@pytest.fixture
def batch(
    tmp_path: Path, gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Batch:
    return Batch(tmp_path, gateway.address, capsys, monkeypatch)


def test_every_question_has_a_line_with_its_id(batch: Batch, gateway: FakeGateway) -> None:
    batch.write({"id": "a", "question": "one"}, {"question": "two"}, {"id": 7, "question": "three"})
    code, out = batch.run("--max-output-tokens", "5", "--system", "Be brief.")
    assert code == 0
    assert out.startswith("3 answered, 0 failed;")
    assert [(line["id"], line["text"], line["finish_reason"]) for line in batch.results()] == [
        ("a", "one!", "STOP"),
        (2, "two!", "STOP"),
        (7, "three!", "STOP"),
    ]
    first = batch.results()[0]
    assert first["usage"] == {"prompt_tokens": 9, "visual_tokens": 0, "cached_tokens": 0, "output_tokens": 2}
    assert (first["model"], first["request_id"].endswith(".0")) == ("tiny", True)
    items = gateway.batches[0].items
    assert {item.generation_config.max_output_tokens for item in items} == {5}
    assert {item.system_message for item in items} == {"Be brief."}


def test_options_of_a_line_go_before_those_of_the_command(batch: Batch, gateway: FakeGateway) -> None:
    options = {"max_output_tokens": 3, "temperature": 0.5, "stop": "x", "seed": 1}
    batch.write({"question": "one", "options": options, "system": "Yours."}, {"question": "two"})
    assert batch.run("--max-output-tokens", "9", "--system", "Mine.")[0] == 0
    first, second = gateway.batches[0].items
    assert (first.generation_config.max_output_tokens, first.system_message) == (3, "Yours.")
    assert (first.generation_config.temperature, list(first.generation_config.stop_sequences)) == (0.5, ["x"])
    assert first.generation_config.seed == 1
    assert (second.generation_config.max_output_tokens, second.system_message) == (9, "Mine.")


def test_pictures_beside_the_file_are_uploaded_once(batch: Batch, gateway: FakeGateway) -> None:
    picture = os.urandom(300 << 10)
    batch.source.with_name("cat.jpg").write_bytes(picture)
    batch.write(
        *({"image": "cat.jpg", "question": f"{number}", "options": {"max_tiles": number + 1}} for number in range(3)),
        {"images": ["cat.jpg", "cat.jpg"], "question": "both"},
    )
    assert batch.run("--max-tiles", "7")[0] == 0
    assert len(gateway.uploads) == 1
    parts = [
        [part.media.options.max_tiles for part in item.messages[0].parts[:-1]] for item in gateway.batches[0].items
    ]
    assert parts == [[1], [2], [3], [7, 7]]


def test_an_item_that_fails_is_an_error_and_exit_code_1(batch: Batch) -> None:
    batch.write({"id": "a", "question": "bad"}, {"id": "b", "question": "good"}, {"id": "c", "image": "no.jpg"})
    code, out = batch.run()
    assert code == "internvl: 2 of 3 have failed; --retry-failed asks them again."
    assert out.startswith("1 answered, 2 failed;")
    by_id = {line["id"]: line for line in batch.results()}
    assert by_id["a"]["error"] == {
        "code": "INVALID_ARGUMENT",
        "reason": "MEDIA_UNREADABLE",
        "message": "Ours.",
        "field": "messages",
    }
    assert by_id["c"]["error"]["message"] == "A file cannot be read: No such file or directory."
    assert by_id["b"]["text"] == "good!"


def test_a_second_run_asks_only_what_has_no_result(batch: Batch, gateway: FakeGateway) -> None:
    batch.write({"id": "a", "question": "one"}, {"id": "b", "question": "bad"})
    batch.run()
    batch.write({"id": "a", "question": "one"}, {"id": "b", "question": "bad"}, {"id": "c", "question": "three"})
    code, out = batch.run()
    assert "1 of 3 have failed" in code
    assert "1 answered, 0 failed, 2 had a result before" in out
    assert [len(request.items) for request in gateway.batches] == [2, 1]
    assert [line["id"] for line in batch.results()] == ["a", "b", "c"]


def test_what_failed_is_asked_again_and_its_last_result_counts(batch: Batch, gateway: FakeGateway) -> None:
    batch.write({"id": "a", "question": "one"}, {"id": "b", "question": "bad"})
    batch.run()
    batch.write({"id": "a", "question": "one"}, {"id": "b", "question": "mended"})
    assert batch.run("--retry-failed")[0] == 0
    assert [(line["id"], line.get("text")) for line in batch.results()] == [
        ("a", "one!"),
        ("b", None),
        ("b", "mended!"),
    ]
    before = len(gateway.batches)
    assert batch.run("--retry-failed")[0] == 0
    assert len(gateway.batches) == before


def test_a_line_that_an_earlier_run_left_unfinished_is_asked_again(batch: Batch) -> None:
    batch.write({"id": "a", "question": "one"}, {"id": "b", "question": "two"})
    batch.target.write_text('{"id": "a", "text": "before"}\n{"id": "b", "te')
    assert batch.run()[0] == 0
    assert [(line["id"], line["text"]) for line in batch.results()] == [("a", "before"), ("b", "two!")]


def test_large_files_are_asked_in_groups(batch: Batch, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_batch, "_GROUP_ITEMS", 2)
    batch.write(*({"question": f"{number}"} for number in range(5)))
    assert batch.run("--concurrency", "3")[0] == 0
    assert [len(request.items) for request in gateway.batches] == [2, 2, 1]
    assert {request.concurrency for request in gateway.batches} == {3}
    assert [line["text"] for line in batch.results()] == [f"{number}!" for number in range(5)]


def test_a_question_that_no_batch_takes_fails_alone(batch: Batch, gateway: FakeGateway) -> None:
    batch.write(*({"question": text} for text in ("a", "b", "malformed", "c", "d")))
    assert "1 of 5" in batch.run()[0]
    assert sorted(line.get("text", "error") for line in batch.results()) == ["a!", "b!", "c!", "d!", "error"]
    # A batch that was refused has no results.
    assert all("malformed" not in str(request.items) for request in gateway.batches)


def test_a_question_that_no_message_holds_fails_alone(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli_batch.time, "sleep", waits.append)
    batch.write({"question": "short"}, {"question": "long" * (3 << 20)})
    assert "1 of 2" in batch.run()[0]
    assert [line.get("text") or line["error"]["code"] for line in batch.results()] == ["short!", "RESOURCE_EXHAUSTED"]
    assert not waits


def test_questions_are_not_overwritten_by_their_answers(batch: Batch) -> None:
    batch.write({"question": "a"})
    before = batch.source.read_text()
    batch.target.symlink_to(batch.source)
    assert "another one than OUT" in batch.run()[0]
    assert batch.source.read_text() == before


def test_a_full_server_is_waited_for(batch: Batch, gateway: AnsweringGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli_batch.time, "sleep", waits.append)
    gateway.full = 2
    batch.write({"question": "one"})
    assert batch.run()[0] == 0
    assert waits == [1.0, 1.0]


def test_a_gateway_that_is_lost_ends_the_run_and_the_next_one_goes_on(batch: Batch, gateway: FakeGateway) -> None:
    batch.write({"id": "a", "question": "one"}, {"id": "b", "question": "two"})
    gateway.breaks = [1] * 10
    assert "NOT_READY" in batch.run()[0]
    assert [line["id"] for line in batch.results()] == ["a"]
    assert gateway.ended == ["b0"]
    gateway.breaks = []
    assert batch.run()[0] == 0
    assert [line["id"] for line in batch.results()] == ["a", "b"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_client.batches.LOSS_PAUSE_S", 0.0)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2: it is no JSON object"),
        ('{"id": "x"}', "asks nothing"),
        ('{"question": "?", "imges": []}', "imges is unknown"),
        ('{"question": 3}', "question has a value of the wrong type"),
        ('{"id": true, "question": "?"}', "id has to be"),
        ('{"question": "?", "image": 3}', "have to name files"),
        ('{"question": "?", "image": "https://example.com/cat.jpg"}', "download"),
        ('{"question": "?", "image": "data:image/png;base64,%%"}', "no base64"),
        ('{"question": "?", "options": {"max_tokns": 3}}', "the option max_tokns is unknown"),
        ('{"question": "?", "options": {"temperature": "hot"}}', "temperature has a value of the wrong type"),
        ('{"question": "?", "options": {"seed": true}}', "seed has a value of the wrong type"),
        ('{"question": "?", "options": {"stop": [1]}}', "stop has a value of the wrong type"),
        ('{"question": "?", "options": {"max_tiles": 0}}', "max_tiles has to be a whole number"),
        ('{"question": "?", "messages": []}', "not both"),
        ('{"messages": ["hi"]}', "an object with a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "a text or a list of parts"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "role robot"),
        ('{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}', "text, image_url or video_url"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}', "has no url"),
        (
            '{"messages": [{"role": "user", "content": '
            '[{"type": "image_url", "image_url": {"url": "a", "detail": 1}}]}]}',
            "detail is one of",
        ),
        ('{"body": [], "custom_id": "a"}', "body has to be an object"),
        ('{"body": {"messages": [], "response_format": {"type": "json_object"}}}', "response_format"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named_before_anything_is_asked(
    batch: Batch, gateway: FakeGateway, line: str, what: str
) -> None:
    batch.source.write_text(f'{{"question": "fine"}}\n{line}\n')
    code, _ = batch.run()
    assert what in code
    assert not gateway.batches
    assert not batch.target.exists()


def test_two_lines_with_one_id_are_refused(batch: Batch) -> None:
    batch.write({"id": 1, "question": "a"}, {"id": "1", "question": "b"})
    assert "two lines have the id 1" in batch.run()[0]


def test_results_have_one_writer(batch: Batch) -> None:
    batch.write({"question": "a"})
    with ResultsFile(batch.target):
        assert "another command is writing" in batch.run()[0]
        with pytest.raises(ResultsInUse):
            ResultsFile(batch.target)
    assert batch.run()[0] == 0


def test_lines_of_openais_batches_are_understood(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    picture = base64.b64encode(b"dog").decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/cat.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "Which?"},
    ]
    schema = {"type": "object"}
    body = {
        "model": "internvl",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": content},
        ],
        "max_completion_tokens": 4,
        "n": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    (tmp_path / "in.jsonl").write_text(json.dumps({"custom_id": "r1", "method": "POST", "url": "/v1", "body": body}))
    (line,) = read_lines(tmp_path / "in.jsonl")
    question = line.question(MediaFiles(tmp_path, MediumOptions(max_tiles=9)))
    assert line.identity == "r1"
    assert question.options == {
        "max_output_tokens": 4,
        "candidate_count": 2,
        "json_schema": schema,
        "system_message": "Be brief.",
    }
    roles = [message.role for message in question.content if hasattr(message, "role")]
    assert [str(role) for role in roles] == ["USER", "ASSISTANT", "USER"]
    last: Any = question.content[-1]
    assert [(image.content, image.max_tiles) for image in last.images] == [(b"cat", 6), (b"dog", 9)]
    assert last.text == "Which?"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"question": "a"}\n\xff\xfe\n')
    with pytest.raises(LineError, match="UTF-8"):
        list(read_lines(tmp_path / "in.jsonl"))


def test_a_file_is_read_once_for_all_its_questions(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"cat")
    files = MediaFiles(tmp_path)
    first = files.image("cat.png", MediumOptions(max_tiles=2))
    path.unlink()
    assert files.image("cat.png", MediumOptions()) == batch_lines.Image(first.digest, b"cat")
    assert files.video("cat.png", MediumOptions(num_segments=4)).num_segments == 4
    assert files.num_bytes == 3
