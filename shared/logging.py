"""structlog set up once per process: events with facts, the request id bound at the edge, never any content."""

import logging
import sys

import structlog

from shared.settings import ServiceSettings


def configure_logging(settings: ServiceSettings, service: str) -> None:
    """Send structlog's and the standard library's records of this process to stderr, one event a line."""
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared_processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    tracebacks = [] if console else [structlog.processors.dict_tracebacks]
    structlog.configure(
        processors=[*shared_processors, *tracebacks, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    _route_standard_library(shared_processors, renderer, level)
    logging.captureWarnings(capture=True)
    structlog.contextvars.bind_contextvars(service=service)


def _route_standard_library(
    processors: list[structlog.typing.Processor], renderer: structlog.typing.Processor, level: int
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
