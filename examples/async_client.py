"""Asks about many pictures at once: `python examples/async_client.py HOST:PORT PICTURE...`."""

import asyncio
import sys

from internvl_client import Answer, AsyncClient, Image, InternVLError


async def describe(client: AsyncClient, picture: str) -> Answer | InternVLError:
    try:
        return await client.ask(Image.open(picture), "Describe the picture.", max_output_tokens=32, timeout_s=120)
    except InternVLError as error:  # one bad picture fails alone
        return error


async def main(address: str, pictures: list[str]) -> None:
    async with AsyncClient(address) as client:
        answers = await asyncio.gather(*(describe(client, picture) for picture in pictures))
    for picture, answer in zip(pictures, answers, strict=True):
        print(f"{picture}: {answer}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
