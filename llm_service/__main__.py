"""Runs the LLM service: `python -m llm_service --model DIR`."""

from llm_service.app import lifespan
from llm_service.settings import LlmSettings
from shared.rpc.server import run

if __name__ == "__main__":
    run(LlmSettings.from_command_line("llm_service"), "llm", lifespan)
