"""Draws a dashboard as Grafana would show it: `python -m benchmarks.dashboard --metrics HOST:PORT ... --out FILE.png`.

A Prometheus of its own (Debian's package `prometheus`) scrapes the named services for a while, meanwhile something else
should ask them; then every panel's queries are evaluated and its lines drawn.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp
import yaml
from PIL import Image, ImageDraw, ImageFont

from deploy.grafana.dashboards import DASHBOARDS, Panel
from deploy.local.ports import free_port

_WIDTH: Final = 420
_HEIGHT: Final = 230
_COLUMNS: Final = 3
_MARGIN: Final = (48, 34, 14, 44)  # left, top, right, bottom of a panel's plot
_STEP_S: Final = 2
_COLOURS: Final = ("#1f5fbf", "#c07020", "#2c963c", "#803090", "#b03040", "#208080", "#707020", "#555555")
Line = list[tuple[float, float]]


async def lines_of(session: aiohttp.ClientSession, panel: Panel, since: float, until: float) -> dict[str, Line]:
    """Return the points of each line of a panel, by its legend."""
    found: dict[str, Line] = {}
    for query, legend in panel.queries:
        asked = {"query": query.replace("$__rate_interval", "20s"), "start": since, "end": until, "step": _STEP_S}
        async with session.get(f"/api/v1/query_range?{urlencode(asked)}") as response:
            answer: dict[str, Any] = await response.json()
        if answer["status"] != "success":
            raise SystemExit(f"{panel.title}: {answer['error']}")
        for series in answer["data"]["result"]:
            name = re.sub(r"{{(\w+)}}", lambda found, labels=series["metric"]: labels.get(found[1], ""), legend)
            points = [(float(at), float(value)) for at, value in series["values"] if value != "NaN"]
            if points:
                found[name] = points
    return found


def drawn(title: str, panels: Sequence[tuple[Panel, dict[str, Line]]], since: float, until: float) -> Image.Image:
    """Return the dashboard as a picture."""
    rows = -(-len(panels) // _COLUMNS)
    picture = Image.new("RGB", (_WIDTH * _COLUMNS, 44 + _HEIGHT * rows), "#f4f5f7")
    pen = ImageDraw.Draw(picture)
    pen.text((14, 10), title, fill="#222222", font=ImageFont.load_default(20))
    for index, (panel, lines) in enumerate(panels):
        row, column = divmod(index, _COLUMNS)
        _draw_panel(pen, panel, lines, (column * _WIDTH, 44 + row * _HEIGHT), since, until)
    return picture


def _draw_panel(
    pen: ImageDraw.ImageDraw, panel: Panel, lines: dict[str, Line], at: tuple[int, int], since: float, until: float
) -> None:
    x, y = at
    pen.rectangle((x + 5, y + 5, x + _WIDTH - 5, y + _HEIGHT - 5), fill="white", outline="#dddddd")
    pen.text((x + 14, y + 12), panel.title, fill="#222222", font=ImageFont.load_default(14))
    left, top, right, bottom = x + _MARGIN[0], y + _MARGIN[1], x + _WIDTH - _MARGIN[2], y + _HEIGHT - _MARGIN[3]
    most = max((value for line in lines.values() for _, value in line), default=0.0) or 1.0
    for part in (0.0, 0.5, 1.0):
        height = bottom - (bottom - top) * part
        pen.line((left, height, right, height), fill="#e6e6e6")
        label = _amount(most * part, panel.unit)
        pen.text((left - 5, height), label, fill="#777777", font=ImageFont.load_default(10), anchor="rm")
    legend_x = left
    for index, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [
            (left + (right - left) * (when - since) / (until - since), bottom - (bottom - top) * value / most)
            for when, value in line
        ]
        pen.line(points, fill=colour, width=2)
        face = ImageFont.load_default(11)
        if legend_x + pen.textlength(name, face) < right:
            pen.text((legend_x, bottom + 12), name, fill=colour, font=face)
            legend_x += int(pen.textlength(name, face)) + 12
    if not lines:
        pen.text(((left + right) / 2, (top + bottom) / 2), "nothing to show", fill="#aaaaaa", anchor="mm")


def _amount(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB"
    if unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g}{' s' if unit == 's' else ''}"


def _prometheus(targets: Sequence[str], folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    address = f"127.0.0.1:{free_port()}"
    jobs = [{"job_name": "internvl", "scrape_interval": "1s", "static_configs": [{"targets": list(targets)}]}]
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": jobs}))
    flags = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    return subprocess.Popen(["prometheus", *flags], stderr=subprocess.DEVNULL), f"http://{address}"


async def _collect(name: str, url: str, since: float) -> Image.Image:
    title, panels = DASHBOARDS[name]
    until = time.time()
    async with aiohttp.ClientSession(url) as session:
        lines = [(panel, await lines_of(session, panel, since, until)) for panel in panels]
    return drawn(title, lines, since, until)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", nargs="+", required=True, metavar="HOST:PORT", help="services to scrape")
    parser.add_argument("--dashboard", choices=sorted(DASHBOARDS), default="overview")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to watch (default 60)")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        process, url = _prometheus(chosen.metrics, Path(folder))
        try:
            since = time.time()
            print(f"Watching for {chosen.seconds:.0f} s ...", flush=True)
            time.sleep(chosen.seconds)
            asyncio.run(_collect(chosen.dashboard, url, since)).save(chosen.out)
        finally:
            process.terminate()
            process.wait()
    print(json.dumps({"dashboard": chosen.dashboard, "file": str(chosen.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
