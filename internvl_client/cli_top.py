"""The command that shows what a system does at the moment: `internvl top`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Annotated, Final

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from internvl_client.cli import CommandFailure
from internvl_client.cli_output import open_console
from internvl_client.metrics_text import MetricsAway, Samples, fetch, url_of
from internvl_client.running import find_running
from internvl_client.system_load import Load, Snapshot, load_of

_TIER_NAMES: Final = {"none": "encoded", "local": "vision memory", "store": "embedding store"}
_BAR: Final = 24
_EXAMPLES: Final = """Examples:

  internvl top

  internvl top --once

  internvl top --metrics http://gateway:9100 --metrics http://llm-0:9100 --metrics http://vision-0:9100
"""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=_EXAMPLES)(top)


def top(
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            "-m",
            metavar="URL",
            help="Where a service answers GET /metrics; may be repeated. Without it: the services of `internvl up`.",
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave, as without a terminal.")] = False,
) -> None:
    """Show what a system does: answers in progress, queues, KV cache, caches, tokens a second, first tokens.

    Reads the metrics of the services. Several replicas are added up. Ctrl-C ends it.
    """
    console = open_console()
    watch = Watch(_places(metrics))
    if once or not console.is_terminal:
        for label, text in watch.look():
            console.print(f"{label:<12} {text}")
        watch.check()
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            live.update(_table(watch.look()), refresh=True)
            time.sleep(interval)


class Watch:
    """Looks at services, by name, again and again."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._before: Snapshot | None = None
        self._away: dict[str, str] = {}

    def look(self) -> list[tuple[str, str]]:
        """Return what is going on, as labels and texts, and which services do not answer."""
        now = Snapshot(time.monotonic(), self._fetched())
        load = load_of(now, self._before)
        self._before = now
        return [*rows_of(load), *self._away.items()]

    def check(self) -> None:
        """Raise `CommandFailure` where a service did not answer the last look."""
        if self._away:
            raise CommandFailure(f"{len(self._away)} of {len(self._places)} services do not answer.")

    def _fetched(self) -> Samples:
        with ThreadPoolExecutor(len(self._places)) as threads:
            asked = {name: threads.submit(fetch, url) for name, url in self._places.items()}
        found, self._away = [], {}
        for name, answer in asked.items():
            try:
                found.append(answer.result())
            except MetricsAway as error:
                self._away[name] = str(error)
        return Samples.merged(found)


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, text in rows:
        table.add_row(Text(label, style="bold"), text)
    return table


def rows_of(load: Load) -> list[tuple[str, str]]:
    """Return what is shown, as labels and texts."""
    return [
        ("streams", f"{load.streams} in progress, {load.running} decoding, {load.waiting} waiting"),
        ("vision", f"{load.queued_tiles} tiles waiting"),
        ("tokens", _tokens(load)),
        ("first token", f"p50 {_seconds(load.first_token_p50_s)}, p95 {_seconds(load.first_token_p95_s)}"),
        ("KV cache", _kv_cache(load)),
        ("media", _counted(load.media, _TIER_NAMES)),
        ("prefix", "-" if load.cached_share is None else f"{load.cached_share:.0%} of prompt tokens were cached"),
        ("turns", _counted(load.turns)),
    ]


def _tokens(load: Load) -> str:
    rates = [
        f"{rate:.1f}/s {what}"
        for rate, what in ((load.written_per_s, "written"), (load.read_per_s, "read"))
        if rate is not None
    ]
    return ", ".join([*rates, f"{load.output_tokens} written in all"])


def _kv_cache(load: Load) -> str:
    if not load.kv_blocks:
        return "-"
    used, kept = (round(_BAR * blocks / load.kv_blocks) for blocks in (load.kv_used, load.kv_kept))
    bar = "#" * used + "+" * min(kept, _BAR - used)
    return f"[{bar:.<{_BAR}}] {load.kv_used} used (#), {load.kv_kept} kept (+) of {load.kv_blocks} blocks"


def _counted(counts: Mapping[str, int], names: Mapping[str, str] | None = None) -> str:
    total = sum(counts.values())
    parts = [
        f"{(names or {}).get(value, value.replace('_', ' '))} {count} ({count / total:.0%})"
        for value, count in sorted(counts.items(), key=lambda entry: -entry[1])
    ]
    return ", ".join(parts) or "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _places(given: Sequence[str] | None) -> dict[str, str]:
    """Return where to look, by what is said of a service that does not answer."""
    if given:
        try:
            return {text: url_of(text) for text in given}
        except ValueError as error:
            raise CommandFailure(str(error)) from None
    system = find_running()
    if system is None or not system.metrics:
        raise CommandFailure(
            "nothing that shows metrics runs here. Start a system with `internvl up --model DIR`, "
            "or name its services with --metrics http://HOST:PORT."
        )
    return {name: url_of(address) for name, address in system.metrics.items()}
