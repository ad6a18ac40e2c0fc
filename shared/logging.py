"""structlog set up once per process: events with facts, the request id bound at the edge, never any content."""

import logging
import sys

import structlog
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from shared.log_sink import LogSink
from shared.settings import ServiceSettings


def configure_logging(settings: ServiceSettings, service: str) -> LogSink:
    """Send structlog's and the standard library's records of this process to stderr, one event a line.

    No caller ever waits for whoever reads them. Whoever ends the process drains the sink that is returned.
    """
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    sink = LogSink(sys.stderr.fileno())
    facts: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _naming(service),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering = _console_rendering() if console else _json_rendering()
    structlog.configure(
        processors=[*facts, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _LineLogger(sink),
    )
    _route_standard_library(sink, facts, rendering, level)
    logging.captureWarnings(capture=True)
    return sink


class _LineLogger:
    """What structlog hands rendered events to."""

    def __init__(self, sink: LogSink) -> None:
        self._sink = sink

    def msg(self, line: str) -> None:
        self._sink.write(f"{line}\n")

    debug = info = warning = error = critical = msg


def _naming(service: str) -> Processor:
    # A processor and no context variable: threads do not inherit those.
    def name(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**event, "service": service}

    return name


# Both renderings show an error's traceback without the variables of its frames, which hold prompts, tokens and keys.
def _json_rendering() -> list[Processor]:
    tracebacks = ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    return [tracebacks, structlog.processors.JSONRenderer()]


def _console_rendering() -> list[Processor]:
    return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]


def _route_standard_library(sink: LogSink, facts: list[Processor], rendering: list[Processor], level: int) -> None:
    handler = logging.StreamHandler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=facts,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
