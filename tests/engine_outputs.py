"""An engine's tokens one at a time, however many of them came at once."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from llm_service.engine.sequence import TokenOutput


async def each(outputs: AsyncGenerator[tuple[TokenOutput, ...]]) -> AsyncGenerator[TokenOutput]:
    """Yield the tokens; closing this closes `outputs`."""
    async with aclosing(outputs):
        async for arrived in outputs:
            for output in arrived:
                yield output
