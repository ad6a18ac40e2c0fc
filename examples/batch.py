"""Asks the same about many pictures in one call: `python examples/batch.py HOST:PORT PICTURE...`."""

import sys

from internvl_client import Client, Image, InternVLError

address, *pictures = sys.argv[1:]

with Client(address) as client:
    outcomes = client.ask_batch(
        [[Image.open(picture), "Describe the picture."] for picture in pictures],
        on_progress=lambda done, total: print(f"{done} of {total}", file=sys.stderr),
        max_output_tokens=32,
    )
for picture, outcome in zip(pictures, outcomes, strict=True):
    # One bad picture fails alone.
    print(f"{picture}: {f'[{outcome.reason}] ' if isinstance(outcome, InternVLError) else ''}{outcome}")
