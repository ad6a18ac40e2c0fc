"""Asks about a part of a video: `python examples/video.py HOST:PORT VIDEO FROM_S TO_S`."""

import sys

from internvl_client import Client, Video

address, path, start, end = sys.argv[1:]

with Client(address) as client:
    video = Video.open(path, num_segments=8, start_s=float(start), end_s=float(end))
    answer = client.ask(video, "What happens here?", max_output_tokens=64)
    print(answer.text)
    print("seen:", ", ".join(f"{frame.time_s:.2f} s" for frame in answer.receipts[0].frames))
