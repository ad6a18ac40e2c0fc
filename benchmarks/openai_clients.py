"""A load generator of others against our HTTP: `python -m benchmarks.openai_clients install`, then `run --model DIR`.

aiperf, in an environment of its own, asks the whole system as `internvl up` starts it: with text, with pictures, and in
dialogues of several turns, streamed, 16 at a time. Its own figures are printed, and its count of tokens beside ours:
what the server told in `usage` and what the gateway's log says of the same turns have to be the same.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.environment import ROOT, Environment, run
from benchmarks.peers.peer import PeerError
from deploy.local import LocalStack, StackError, StackOptions

VERSION: Final = "0.13.0"
LOADS: Final[dict[str, tuple[str, ...]]] = {
    "text": (),
    "pictures": ("--image-width-mean=896", "--image-height-mean=448", "--image-batch-size=1", "--image-format=jpeg"),
    "dialogues": (
        "--conversation-turn-mean=3",
        "--conversation-turn-stddev=0",
        "--image-width-mean=448",
        "--image-height-mean=448",
        "--image-batch-size=1",
        "--image-format=jpeg",
    ),
}
_FIGURES: Final = ("time_to_first_token", "inter_token_latency", "request_latency")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Answers, and the tokens that they took and had, as one side counts them."""

    answers: int = 0
    prompt: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one load. Times are medians in milliseconds; None where aiperf does not tell."""

    load: str
    errors: int
    theirs: Tokens
    ours: Tokens
    times_ms: dict[str, float | None]

    @property
    def agrees(self) -> bool:
        """Whether nothing failed and both sides counted the same."""
        return not self.errors and self.theirs == self.ours


def measure(system: LocalStack, aiperf: Path, load: str, arguments: argparse.Namespace) -> Found:
    """Put one load on the system; raise `PeerError` where aiperf fails."""
    log = system.processes["gateway"].log_file
    start = log.stat().st_size
    with tempfile.TemporaryDirectory() as directory:
        run([str(aiperf), *_options(system, load, arguments, directory)], Path(directory))
        summary = json.loads(_only(directory, "profile_export_aiperf.json").read_text(encoding="utf-8"))
        records = _lines(_only(directory, "profile_export.jsonl").read_text(encoding="utf-8"))
    told = [entry for entry in _lines(log.read_bytes()[start:].decode()) if entry.get("event") == "turn_finished"]
    return Found(
        load,
        sum(1 for record in records if record.get("error")),
        _tokens([record["metrics"] for record in records if not record.get("error")]),
        Tokens(len(told), sum(entry["prompt_tokens"] for entry in told), sum(entry["output_tokens"] for entry in told)),
        {name: (summary.get(name) or {}).get("p50") for name in _FIGURES},
    )


def report(found: Sequence[Found]) -> None:
    """Print what was found."""
    print(f"\n{'load':<12}{'errors':<8}{'answers':<14}{'prompt tokens':<20}{'output tokens':<18}", end="")
    print("ttft ms   token ms  whole ms")
    for each in found:
        theirs, ours = each.theirs, each.ours
        counts = [f"{getattr(theirs, name)}/{getattr(ours, name)}" for name in ("answers", "prompt", "output")]
        times = "".join(f"{'-' if value is None else f'{value:.1f}':<10}" for value in each.times_ms.values())
        print(f"{each.load:<12}{each.errors:<8}{counts[0]:<14}{counts[1]:<20}{counts[2]:<18}{times}")
    print("Counts are aiperf's, by what each answer's usage said, and ours, by the gateway's log.")


def _options(system: LocalStack, load: str, arguments: argparse.Namespace, directory: str) -> list[str]:
    assert system.model is not None
    options = ["profile", "--model", system.model.name, "--url", f"http://{system.http_address}"]
    options += ["--endpoint-type", "chat", "--streaming", "--use-server-token-count"]
    options += ["--tokenizer", str(arguments.model), "--ui-type", "none", "--output-artifact-dir", directory]
    options += ["--concurrency", str(arguments.concurrency), "--random-seed", "7"]
    options += ["--synthetic-input-tokens-mean", "64", "--output-tokens-mean", str(arguments.output_tokens)]
    count = "--conversation-num" if load == "dialogues" else "--request-count"
    return [*options, count, str(arguments.requests), *LOADS[load]]


def _tokens(metrics: Sequence[dict[str, Any]]) -> Tokens:
    def total(name: str) -> int:
        return sum(int(each[name]["value"]) for each in metrics if name in each)

    return Tokens(len(metrics), total("usage_prompt_tokens"), total("usage_completion_tokens"))


def _only(directory: str, name: str) -> Path:
    found = next(Path(directory).rglob(name), None)
    if found is None:
        raise PeerError(f"aiperf wrote no {name}")
    return found


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def main() -> None:
    """Install aiperf, or run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.openai_clients", description=__doc__)
    parser.add_argument("action", choices=["install", "run"])
    parser.add_argument("--venv", type=Path, default=ROOT / "aiperf", help="default: %(default)s")
    parser.add_argument("--model", type=Path, help="checkpoint directory, for run")
    parser.add_argument("--load", action="append", choices=[*LOADS], help="one of the loads; may be repeated")
    parser.add_argument("--requests", type=int, default=64, help="requests, or dialogues (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--output-tokens", type=int, default=32, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    environment = Environment(arguments.venv)
    try:
        if arguments.action == "install":
            environment.create()
            environment.install(f"aiperf=={VERSION}")
            return
        if arguments.model is None:
            parser.error("run needs --model")
        arguments.model = arguments.model.resolve()
        aiperf = environment.require("aiperf", "benchmarks.openai_clients")
        with LocalStack(StackOptions(arguments.model)) as system:
            found = [measure(system, aiperf, load, arguments) for load in arguments.load or LOADS]
    except (PeerError, StackError) as error:
        raise SystemExit(f"openai_clients: {error}") from None
    report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) | {"agrees": each.agrees} for each in found], indent=1))
    if not all(each.agrees for each in found):
        raise SystemExit("openai_clients: something failed, or was counted differently")


if __name__ == "__main__":
    main()
