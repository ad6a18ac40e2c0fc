"""Reads what services answer at /metrics: Prometheus' text format, over HTTP."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Final, Self
from urllib.parse import urlsplit
from urllib.request import urlopen

_SAMPLE: Final = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")
_LABEL: Final = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_MOST_BYTES: Final = 8 << 20
_PATH: Final = "/metrics"


class MetricsAway(Exception):
    """Nobody answers at an address, or not with metrics; the message says which address."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a metric."""

    labels: Mapping[str, str]
    value: float


class Samples:
    """Numbers by the name of their metric, of one service or of several added up."""

    def __init__(self, by_name: Mapping[str, list[Sample]]) -> None:
        self._by_name = by_name

    @classmethod
    def read(cls, text: str) -> Self:
        """Return what a text says; lines that are no samples are left out."""
        found: defaultdict[str, list[Sample]] = defaultdict(list)
        for line in text.splitlines():
            if not line.startswith("#") and (match := _SAMPLE.match(line.strip())):
                name, labels, value = match.groups()
                found[name].append(Sample(dict(_LABEL.findall(labels or "")), float(value)))
        return cls(found)

    @classmethod
    def merged(cls, parts: Iterable[Samples]) -> Self:
        """Return the numbers of several services together."""
        found: defaultdict[str, list[Sample]] = defaultdict(list)
        for part in parts:
            for name, samples in part._by_name.items():
                found[name] += samples
        return cls(found)

    def has(self, name: str) -> bool:
        """Return whether there is such a metric."""
        return bool(self._by_name.get(name))

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's numbers with these labels; 0 where there are none."""
        wanted = labels.items()
        return math.fsum(each.value for each in self._by_name.get(name, ()) if wanted <= each.labels.items())

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of a metric's numbers by the value of a label."""
        sums: defaultdict[str, float] = defaultdict(float)
        for each in self._by_name.get(name, ()):
            sums[each.labels.get(label, "")] += each.value
        return dict(sums)

    def buckets(self, name: str) -> dict[float, float]:
        """Return how many observations of a histogram were at most so large, by the bounds of its buckets."""
        by_bound = self.by_label(f"{name}_bucket", "le")
        return {float(bound): count for bound, count in by_bound.items() if bound}


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """Return the value below which a share of the observations lies, as Prometheus does; None without any."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank = share * buckets[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and buckets[bound] > below:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return lower


def url_of(text: str) -> str:
    """Return where to ask: `host:port` and URLs without a path get theirs. Raises `ValueError`."""
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text} is no http:// or https:// URL.")
    return url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}{_PATH}"


def fetch(url: str, timeout_s: float = 2.0) -> Samples:
    """Return what a service answers at a URL of `url_of`. Raises `MetricsAway`."""
    try:
        with urlopen(url, timeout=timeout_s) as answer:  # noqa: S310  only http and https come here
            return Samples.read(answer.read(_MOST_BYTES).decode("utf-8", "replace"))
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        raise MetricsAway(f"no metrics at {url}") from error
