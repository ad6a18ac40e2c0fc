"""Makes pictures known before anybody asks about them: `python examples/prefetch.py HOST:PORT PICTURE...`."""

import sys

from internvl_client import Client, Image, InternVLError

address, *paths = sys.argv[1:]

with Client(address) as client:
    pictures = [Image.open(path) for path in paths]
    print("visual tokens of the first:", client.estimate(pictures[0]).num_tokens)
    outcomes = client.prefetch(pictures, on_progress=lambda done, total: print(f"{done} of {total}", file=sys.stderr))
    for path, outcome in zip(paths, outcomes, strict=True):
        # One bad picture fails alone.
        print(f"{path}: {outcome if isinstance(outcome, InternVLError) else f'{outcome.num_tiles} tiles'}")

    # From now on a question about one of them waits for no encoding, whoever asks it.
    answer = client.ask(pictures[0], "What is in the picture?", max_output_tokens=32)
    print(answer, "(a cache held the picture)" if answer.receipts[0].cache_hit else "(encoded for this question)")

    # What has to go, goes: the bytes and every embedding made of them.
    client.delete_medium(pictures[0])
