"""`internvl top` against services that answer scripted metrics."""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from internvl_client.cli_top import Watch, rows_of
from internvl_client.metrics_text import MetricsAway, Samples, fetch, quantile, url_of
from internvl_client.running import RunningSystem, announce
from internvl_client.system_load import Snapshot, load_of
from tests.client.command_line import run

pytestmark = pytest.mark.usefixtures("own_account")
GATEWAY = """\
# HELP internvl_gateway_turns_in_progress Turns that have not ended
# TYPE internvl_gateway_turns_in_progress gauge
internvl_gateway_turns_in_progress 3.0
internvl_gateway_turns_total{reason="stop"} 8.0
internvl_gateway_turns_total{reason="tool_calls"} 2.0
internvl_gateway_turns_total{reason="failed"} 0.0
internvl_gateway_media_total{tier="none"} 1.0
internvl_gateway_media_total{tier="store"} 3.0
internvl_gateway_prompt_tokens_total{kind="text"} 100.0
internvl_gateway_prompt_tokens_total{kind="visual"} 300.0
internvl_gateway_cached_tokens_total 100.0
internvl_gateway_output_tokens_total 55.0
internvl_gateway_time_to_first_token_seconds_bucket{le="0.1"} 2.0
internvl_gateway_time_to_first_token_seconds_bucket{le="0.5"} 6.0
internvl_gateway_time_to_first_token_seconds_bucket{le="+Inf"} 10.0
internvl_gateway_time_to_first_token_seconds_count 10.0
"""
LLM = """\
internvl_llm_running_sequences 2.0
internvl_llm_waiting_sequences 1.0
internvl_llm_kv_used_blocks 25.0
internvl_llm_kv_kept_blocks 50.0
internvl_llm_kv_blocks 100.0
internvl_llm_decoded_tokens_total 1000.0
internvl_llm_prefilled_tokens_total 5000.0
"""
VISION = "internvl_vision_queued_tiles 7.0\n"


@contextmanager
def service(*answers: str, status: int = 200) -> Iterator[str]:
    """A service that gives its answers in turn, the last one for ever; yields its address."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            self.send_response(status if found else 404)
            self.end_headers()
            self.wfile.write((left.pop(0) if len(left) > 1 else left[0]).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_one_look_shows_what_all_services_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(GATEWAY) as gateway, service(LLM) as llm, service(VISION) as vision:
        arguments = [flag for address in (gateway, llm, vision) for flag in ("--metrics", f"http://{address}")]
        code, out = run(capsys, monkeypatch, "top", *arguments)
    assert code == 0
    rows = {line[:12].strip(): line[12:].strip() for line in out.splitlines()}
    assert rows["streams"] == "3 in progress, 2 decoding, 1 waiting"
    assert rows["vision"] == "7 tiles waiting"
    assert rows["tokens"] == "55 written in all"
    assert rows["first token"] == "p50 0.40 s, p95 0.50 s"
    assert rows["KV cache"].endswith("25 used (#), 50 kept (+) of 100 blocks")
    assert rows["media"] == "embedding store 3 (75%), encoded 1 (25%)"
    assert rows["prefix"] == "25% of prompt tokens were cached"
    assert rows["turns"] == "stop 8 (80%), tool calls 2 (20%)"


def test_the_services_of_a_running_system_are_found_by_its_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = run(capsys, monkeypatch, "top", "--once")
    assert "internvl up" in code
    with service(LLM) as llm:
        announce(RunningSystem("127.0.0.1:1", "model", os.getpid(), {"llm": llm, "vision": "127.0.0.1:1"}))
        code, out = run(capsys, monkeypatch, "top", "--once")
    assert code == "internvl: 1 of 2 services do not answer."
    assert "2 decoding" in out
    assert "no metrics at http://127.0.0.1:1/metrics" in out


def test_two_looks_make_rates_and_recent_waits() -> None:
    before = Snapshot(10.0, Samples.read(GATEWAY + LLM))
    later = LLM.replace("1000.0", "1100.0").replace("5000.0", "5050.0") + GATEWAY.replace(
        'le="0.1"} 2.0', 'le="0.1"} 6.0'
    ).replace('le="0.5"} 6.0', 'le="0.5"} 10.0').replace('le="+Inf"} 10.0', 'le="+Inf"} 14.0')
    load = load_of(Snapshot(20.0, Samples.read(later)), before)
    assert (load.written_per_s, load.read_per_s) == (10.0, 5.0)
    assert load.first_token_p50_s == pytest.approx(0.05)
    assert ("tokens", "10.0/s written, 5.0/s read, 55 written in all") in rows_of(load)


def test_a_service_that_began_anew_has_no_negative_rates() -> None:
    before = Snapshot(10.0, Samples.read(LLM + GATEWAY))
    now = Snapshot(11.0, Samples.read(LLM.replace("1000.0", "5.0") + GATEWAY.replace("} 10.0", "} 6.0")))
    load = load_of(now, before)
    assert load.written_per_s == 0.0
    assert load.first_token_p50_s is not None


def test_replicas_are_added_up() -> None:
    load = load_of(Snapshot(1.0, Samples.merged([Samples.read(LLM)] * 3)))
    assert (load.running, load.kv_blocks) == (6, 300)


def test_a_system_that_has_done_nothing_shows_no_numbers_that_it_does_not_have() -> None:
    rows = dict(rows_of(load_of(Snapshot(1.0, Samples.read("")))))
    assert (rows["first token"], rows["KV cache"], rows["media"], rows["prefix"]) == ("p50 -, p95 -", "-", "-", "-")


def test_a_watch_remembers_its_last_look() -> None:
    with service(LLM, LLM.replace("1000.0", "2000.0")) as llm:
        watch = Watch({"llm": url_of(llm)})
        watch.look()
        shown = watch.look()
    assert "/s written" in dict(shown)["tokens"]


def test_the_text_format_is_read_with_its_escapes() -> None:
    samples = Samples.read('a{x="1",y="b\\"},c"} 2\na{x="2"} 3 1700000000\n# a 9\nnonsense\na_bucket{le="+Inf"} 4\n')
    assert samples.sum("a") == 5
    assert samples.sum("a", x="1") == 2
    assert samples.by_label("a", "y") == {'b\\"},c': 2, "": 3}
    assert samples.buckets("a") == {math.inf: 4}
    assert samples.sum("b") == 0


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [({}, None), ({1.0: 0.0, math.inf: 0.0}, None), ({1.0: 0.0, math.inf: 4.0}, 1.0), ({1.0: 0, 2.0: 4}, 1.5)],
)
def test_quantiles_are_those_of_prometheus(buckets: dict[float, float], expected: float | None) -> None:
    assert quantile(0.5, buckets) == expected


def test_what_is_no_url_or_answers_something_else_is_said() -> None:
    assert url_of("host:1") == "http://host:1/metrics"
    assert url_of("https://host/other") == "https://host/other"
    for wrong in ("ftp://host", "http://", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="is no http"):
            url_of(wrong)
    with service("no", status=500) as address, pytest.raises(MetricsAway):
        fetch(url_of(address))
    with service("a not-a-number\n") as address, pytest.raises(MetricsAway):
        fetch(url_of(address))
