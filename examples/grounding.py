"""Finds something in a picture and draws a box around it: `python examples/grounding.py HOST:PORT PICTURE WHAT OUT`.

Needs Pillow.
"""

import sys
from pathlib import Path

from internvl_client import Client, Image, draw_boxes, parse_boxes
from internvl_client.grounding import picture_size

address, path, what, out = sys.argv[1:]
content = Path(path).read_bytes()
question = f"Please provide the bounding box coordinates of the region this sentence describes: <ref>{what}</ref>"

with Client(address) as client:
    answer = client.ask(Image.from_bytes(content), question, grounding=True, max_output_tokens=64)
boxes = parse_boxes(answer.text, *picture_size(content))
print(answer.text, *boxes, sep="\n")
Path(out).write_bytes(draw_boxes(content, boxes))
