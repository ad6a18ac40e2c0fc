"""Runs the LLM service: `python -m llm_service --model DIR`."""

from llm_service.app import lifespan
from llm_service.settings import LlmSettings
from shared.allocator import keep_freed_memory
from shared.rpc.server import run

if __name__ == "__main__":
    keep_freed_memory()
    run(LlmSettings.from_command_line("llm_service"), "llm", lifespan)
