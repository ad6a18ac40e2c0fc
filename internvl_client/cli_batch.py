"""The command that asks the questions of a file: `internvl batch`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from internvl_client.batch_lines import BatchLine, LineError, MediaFiles, MediumOptions, read_lines
from internvl_client.batches import CANCEL_TIMEOUT_S, Batch, Outcome
from internvl_client.cli import CommandFailure
from internvl_client.cli_gateway import AddressOption, open_client
from internvl_client.cli_output import open_console
from internvl_client.client import Client
from internvl_client.errors import InternVLError, InvalidRequestError, OverloadedError
from internvl_client.results_file import ResultsFile, ResultsInUse
from internvl_client.types import Answer, ChatOptions, Question

_GROUP_ITEMS: Final = 200
_GROUP_CHARS: Final = 1 << 20
_GROUP_MEDIA_BYTES: Final = 64 << 20  # of files that are in memory at a time
_PATIENCE: Final = 60  # times that a full server is asked again
_EXAMPLES: Final = """Examples:

  internvl batch questions.jsonl answers.jsonl

  internvl batch questions.jsonl answers.jsonl --retry-failed

A line of questions.jsonl, with a path relative to that file:

  {"id": "cat", "image": "cat.jpg", "question": "What is this?", "options": {"max_output_tokens": 64}}

Also "images": [..], "video": "..", "system": "..", OpenAI's "messages", and whole lines as OpenAI's batches have them.
"""

SourceArgument = Annotated[
    Path, typer.Argument(metavar="IN", exists=True, dir_okay=False, readable=True, help="Questions, a JSON line each.")
]
TargetArgument = Annotated[
    Path, typer.Argument(metavar="OUT", dir_okay=False, help="Results, a JSON line each, in the order of their ends.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=_EXAMPLES)(batch)


def batch(
    source: SourceArgument,
    target: TargetArgument,
    address: AddressOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what has failed before; the last result of an id counts.")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Questions asked at a time. Default: the server's limit.")
    ] = None,
    max_output_tokens: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Longest answer, where a line does not say.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the likeliest token; where a line does not say.")
    ] = 0.0,
    system: Annotated[str | None, typer.Option(help="System message, where a line does not say.")] = None,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Most tiles of a picture or frame, where a line does not say.")
    ] = None,
) -> None:
    """Ask the questions of a file and write the answers to another; exit 1 if one failed.

    Whoever waits at a prompt comes first: the questions are asked in the background. Run again, the command goes on
    with those that have no result yet. Each result has the question's id and either text and usage, or an error.
    """
    console = open_console()
    options = ChatOptions(max_output_tokens=max_output_tokens, temperature=temperature)
    if system is not None:
        options["system_message"] = system
    if not source.is_file() or (target.exists() and target.samefile(source)):
        raise CommandFailure("IN has to be a file, and another one than OUT.")
    identities = _checked(source)
    with _opened(target) as results, open_client(address) as client:
        wanted = _wanted(identities, results, retry_failed=retry_failed)
        files = MediumOptions(max_tiles=max_tiles)
        with _progress_bar(console, len(identities), len(identities) - len(wanted)) as advance:
            run = BatchRun(client, results, options, concurrency, advance)
            try:
                for group in _groups(source, wanted, files):
                    run.take(group)
            except KeyboardInterrupt:
                console.print("Stopped; the same command goes on from here.")
                raise
        console.print(run.summary(len(identities) - len(wanted)))
        failed = sum(results.succeeded(identity) is False for identity in identities)
    if failed:
        advice = "" if retry_failed else "; --retry-failed asks them again"
        raise CommandFailure(f"{failed} of {len(identities)} have failed{advice}.")


@dataclass(frozen=True, slots=True)
class Group:
    """Lines that are asked together, each with its question, or with why there is none."""

    lines: tuple[tuple[BatchLine, Question | OSError], ...]


class BatchRun:
    """Asks groups of lines, one after another, and keeps what becomes of them."""

    def __init__(
        self,
        client: Client,
        results: ResultsFile,
        options: ChatOptions,
        concurrency: int | None,
        advance: Callable[[], object],
    ) -> None:
        self._client = client
        self._results = results
        self._options = options
        self._concurrency = concurrency
        self._advance = advance
        self._started = time.monotonic()
        self._num_answered = self._num_failed = self._num_tokens = 0

    def take(self, group: Group) -> None:
        """Ask the questions of a group. Raises what keeps all of them from being asked."""
        asked = [(line, question) for line, question in group.lines if isinstance(question, Question)]
        for line, question in group.lines:
            if isinstance(question, OSError):
                self._keep(line, {"error": _file_error(question)})
        if asked:
            self._ask(asked)
        self._results.sync()

    def summary(self, num_before: int) -> str:
        """Return what has been done, beside what `num_before` lines had already."""
        spent_s = max(time.monotonic() - self._started, 1e-3)
        done = self._num_answered + self._num_failed
        before = f", {num_before} had a result before" if num_before else ""
        rate = f"; {done / spent_s:.2f} a second, {self._num_tokens} tokens written" if done else ""
        return f"{self._num_answered} answered, {self._num_failed} failed{before}{rate}."

    def _ask(self, asked: Sequence[tuple[BatchLine, Question]]) -> None:
        try:
            begun = self._begin([question for _, question in asked])
        except (InvalidRequestError, OverloadedError) as error:
            # One of them is too much for a batch, or all are for one message: found by halves, it fails alone.
            if _is_full(error):
                raise
            if len(asked) == 1:
                self._keep(asked[0][0], _result_of(error))
                return
            middle = len(asked) // 2
            self._ask(asked[:middle])
            self._ask(asked[middle:])
            return
        try:
            for index, outcome in begun.results():
                self._keep(asked[index][0], _result_of(outcome))
        except BaseException:
            with suppress(InternVLError):
                begun.cancel(timeout_s=CANCEL_TIMEOUT_S)
            raise

    def _begin(self, questions: Sequence[Question]) -> Batch:
        """Begin a batch; wait while the server is full."""
        for _ in range(_PATIENCE):
            try:
                return self._client.create_batch(questions, concurrency=self._concurrency, **self._options)
            except OverloadedError as error:
                if not _is_full(error):
                    raise
                time.sleep(error.retry_after_s or 1.0)
        return self._client.create_batch(questions, concurrency=self._concurrency, **self._options)

    def _keep(self, line: BatchLine, result: dict[str, Any]) -> None:
        self._results.append(line.identity, result)
        failed = "error" in result
        self._num_failed += failed
        self._num_answered += not failed
        self._num_tokens += 0 if failed else result["usage"]["output_tokens"]
        self._advance()


def _is_full(error: InternVLError) -> bool:
    """Return whether a server has too much to do; without a reason it is gRPC that finds a message too long."""
    return isinstance(error, OverloadedError) and bool(error.reason)


def _checked(source: Path) -> list[str | int]:
    """Return the ids of all lines; raise `CommandFailure` where a line cannot be asked, before any is."""
    identities: dict[str, str | int] = {}
    try:
        for line in read_lines(source):
            if str(line.identity) in identities:
                raise CommandFailure(f"{source}: two lines have the id {line.identity}.")
            identities[str(line.identity)] = line.identity
    except LineError as error:
        raise CommandFailure(f"{source}: {error}") from None
    except OSError as error:
        raise CommandFailure(f"cannot read {source}: {error.strerror}.") from None
    return list(identities.values())


def _opened(target: Path) -> ResultsFile:
    try:
        return ResultsFile(target)
    except ResultsInUse:
        raise CommandFailure(f"another command is writing to {target}.") from None
    except OSError as error:
        raise CommandFailure(f"cannot write {target}: {error.strerror}.") from None


def _wanted(identities: Sequence[str | int], results: ResultsFile, *, retry_failed: bool) -> set[str]:
    """Return the ids that are to be asked."""
    done = (True,) if retry_failed else (True, False)
    return {str(identity) for identity in identities if results.succeeded(identity) not in done}


def _groups(source: Path, wanted: set[str], options: MediumOptions) -> Iterator[Group]:
    """Yield the wanted lines, as many at a time as one batch and this machine's memory take."""
    files = MediaFiles(source.parent, options)
    lines: list[tuple[BatchLine, Question | OSError]] = []
    num_chars = 0
    for line in read_lines(source):
        if str(line.identity) not in wanted:
            continue
        try:
            lines.append((line, line.question(files)))
        except OSError as error:
            lines.append((line, error))
        num_chars += line.num_chars
        if len(lines) >= _GROUP_ITEMS or num_chars >= _GROUP_CHARS or files.num_bytes >= _GROUP_MEDIA_BYTES:
            yield Group(tuple(lines))
            files, lines, num_chars = MediaFiles(source.parent, options), [], 0
    if lines:
        yield Group(tuple(lines))


def _result_of(outcome: Outcome) -> dict[str, Any]:
    """Return what is written of an answer or an error, beside the id."""
    if isinstance(outcome, InternVLError):
        error = {"code": outcome.code.name, "reason": outcome.reason, "message": outcome.message}
        return {"error": error | ({"field": outcome.field} if outcome.field else {}), "request_id": outcome.request_id}
    usage = {
        "prompt_tokens": outcome.usage.num_prompt_tokens,
        "visual_tokens": outcome.usage.num_visual_tokens,
        "cached_tokens": outcome.usage.num_cached_tokens,
        "output_tokens": outcome.usage.num_output_tokens,
    }
    return {
        "text": outcome.text,
        "finish_reason": str(outcome.finish_reason),
        "usage": usage,
        "model": outcome.model,
        "request_id": outcome.request_id,
    } | _candidates_of(outcome)


def _candidates_of(answer: Answer) -> dict[str, Any]:
    if len(answer.candidates) < 2:
        return {}
    return {"candidates": [{"text": each.text, "score": each.score} for each in answer.candidates]}


def _file_error(error: OSError) -> dict[str, str]:
    message = f"A file cannot be read: {error.strerror or type(error).__name__}."
    return {"code": "INVALID_ARGUMENT", "reason": "MEDIA_UNREADABLE", "message": message}


class _RateColumn(ProgressColumn):
    """Questions a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f}/s" if task.speed else "-/s", style="progress.data.speed")


@contextmanager
def _progress_bar(console: Console, total: int, done: int) -> Iterator[Callable[[], object]]:
    """Yield what shows that one more question has its result."""
    columns = (BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda: progress.advance(task)
