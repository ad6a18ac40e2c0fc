"""Asks a running system questions made to measure, and sums up how it answered. Needs grpcio and the stubs only."""

from internvl_client.bench.driver import Round, ask_round, calibrate, warm_up
from internvl_client.bench.exchange import Exchange, Stopwatch
from internvl_client.bench.gateway_target import GatewayTarget
from internvl_client.bench.questions import Question
from internvl_client.bench.scenarios import SCENARIOS
from internvl_client.bench.summary import Spread, Summary
from internvl_client.bench.target import AskedDialogue, Target, TargetError
from internvl_client.bench.workload import Workload

__all__ = [
    "SCENARIOS",
    "AskedDialogue",
    "Exchange",
    "GatewayTarget",
    "Question",
    "Round",
    "Spread",
    "Stopwatch",
    "Summary",
    "Target",
    "TargetError",
    "Workload",
    "ask_round",
    "calibrate",
    "warm_up",
]
