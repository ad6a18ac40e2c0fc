"""Writes the dashboards: `python -m deploy.grafana.dashboards` makes the JSON files beside it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3
_FAILED = '{code!~"OK|CANCELLED|NOT_FOUND"}'
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart. `queries` are pairs of PromQL and the words of its legend."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""


def _quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    labels = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    return tuple(
        (f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))", f"{name}p{mark}")
        for share, mark in ((0.5, "50"), (0.95, "95"), (0.99, "99"))
    )


def _rate(metric: str, by: str = "") -> tuple[str, str]:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate({metric}[$__rate_interval]))", f"{{{{{by}}}}}" if by else "all"


def _share(part: str, whole: str) -> str:
    return f"sum(rate({part}[$__rate_interval])) / sum(rate({whole}[$__rate_interval]))"


OVERVIEW = (
    Panel("Time to first token", "s", _quantiles("internvl_gateway_time_to_first_token_seconds"), "What a user waits."),
    Panel("Turns", "reqps", (_rate("internvl_gateway_turns_total", "reason"),), "Turns that ended, by why."),
    Panel("Turns in progress", "short", (("sum(internvl_gateway_turns_in_progress)", "turns"),)),
    Panel("Tokens written", "short", (_rate("internvl_gateway_output_tokens_total"),), "Per second, all replicas."),
    Panel(
        "Prompt tokens that were not read again",
        "percentunit",
        (
            (
                _share("internvl_gateway_cached_tokens_total", "internvl_gateway_prompt_tokens_total"),
                "from the prefix cache",
            ),
        ),
    ),
    Panel(
        "Where pictures came from",
        "reqps",
        (_rate("internvl_gateway_media_total", "tier"),),
        "none: it had to be encoded.",
    ),
    Panel("Waiting for pictures", "s", _quantiles("internvl_gateway_media_duration_seconds")),
    Panel(
        "Calls that failed",
        "reqps",
        ((f"sum by (rpc, code) (rate(internvl_rpc_finished_total{_FAILED}[$__rate_interval]))", "{{rpc}} {{code}}"),),
        "What is not found is how a cache says no.",
    ),
    Panel("Event loop lag", "s", _quantiles("internvl_event_loop_lag_seconds", "job")),
)
VISION = (
    Panel("Embeddings looked for", "reqps", (_rate("internvl_vision_lookups_total", "tier"),)),
    Panel("Encodes that were shared", "reqps", (_rate("internvl_vision_coalesced_total", "scope"),)),
    Panel("Encodes", "reqps", (_rate("internvl_vision_encodes_total", "kind"),)),
    Panel("Waiting for the tower", "s", _quantiles("internvl_vision_queue_seconds")),
    Panel("In the tower", "s", _quantiles("internvl_vision_encode_seconds")),
    Panel("Decoding and tiling", "s", _quantiles("internvl_vision_preprocess_seconds")),
    Panel("Tiles that wait", "short", (("sum by (instance) (internvl_vision_queued_tiles)", "{{instance}}"),)),
    Panel("Tiles of a pass", "short", _quantiles("internvl_vision_batch_tiles")),
    Panel("Encodes that failed", "reqps", (_rate("internvl_vision_encode_errors_total", "reason"),)),
)
LLM = (
    Panel("Time to first token", "s", _quantiles("internvl_llm_time_to_first_token_seconds")),
    Panel("Time per token", "s", _quantiles("internvl_llm_time_per_output_token_seconds")),
    Panel(
        "Tokens", "short", (_rate("internvl_llm_decoded_tokens_total"), _rate("internvl_llm_prefilled_tokens_total"))
    ),
    Panel(
        "Sequences",
        "short",
        (
            ("sum by (instance) (internvl_llm_running_sequences)", "{{instance}} running"),
            ("sum by (instance) (internvl_llm_waiting_sequences)", "{{instance}} waiting"),
        ),
    ),
    Panel(
        "KV cache",
        "percentunit",
        (
            ("sum by (instance) (internvl_llm_kv_used_blocks / internvl_llm_kv_blocks)", "{{instance}} in use"),
            ("sum by (instance) (internvl_llm_kv_kept_blocks / internvl_llm_kv_blocks)", "{{instance}} kept"),
        ),
    ),
    Panel("Preemptions", "reqps", (_rate("internvl_llm_preemptions_total", "instance"),)),
    Panel("Waiting in the queue", "s", _quantiles("internvl_llm_queue_seconds")),
    Panel("Reading the prompt", "s", _quantiles("internvl_llm_prefill_seconds")),
    Panel("Getting an embedding", "s", _quantiles("internvl_llm_embedding_fetch_seconds", "tier")),
)
STORE = (
    Panel("Commands", "reqps", (_rate("internvl_store_commands_total", "outcome"),)),
    Panel("Open breakers", "short", (("sum by (instance) (internvl_store_breaker_open)", "{{instance}}"),)),
    Panel("Embeddings that were not written", "reqps", (_rate("internvl_store_dropped_writes_total", "reason"),)),
    Panel(
        "Waiting to be written", "bytes", (("sum by (instance) (internvl_store_write_queue_bytes)", "{{instance}}"),)
    ),
    Panel("Embeddings in memory", "bytes", (("sum by (instance) (internvl_cache_bytes)", "{{instance}}"),)),
    Panel("Dropped from memory", "reqps", (_rate("internvl_cache_evictions_total", "instance"),)),
)
DASHBOARDS = {
    "overview": ("InternVL: what users see", OVERVIEW),
    "vision": ("InternVL: vision service", VISION),
    "llm": ("InternVL: LLM service", LLM),
    "store": ("InternVL: embedding store", STORE),
}


def dashboard(name: str) -> dict[str, Any]:
    """Return a dashboard as Grafana's JSON."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"internvl-{name}",
        "title": title,
        "tags": ["internvl-serving"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(index, panel) for index, panel in enumerate(panels)],
    }


def text(name: str) -> str:
    """Return a dashboard's file."""
    return json.dumps(dashboard(name), indent=1) + "\n"


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(index, _COLUMNS)
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


def main() -> int:
    """Write every dashboard."""
    for name in DASHBOARDS:
        (HERE / f"{name}.json").write_text(text(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
