"""Asks about a picture, then once more in the same conversation: `python examples/quickstart.py HOST:PORT PICTURE`."""

import sys

from internvl_client import Client, Image

address, picture = sys.argv[1:]

with Client(address) as client:
    answer = client.ask(Image.open(picture), "What is in the picture?", max_output_tokens=64)
    print(answer.text, answer.usage, answer.receipts)

    conversation = client.create_conversation()
    for delta in conversation.stream(Image.open(picture), "Describe it in detail.", max_output_tokens=64):
        print(delta, end="", flush=True)
    print("\n" + conversation.ask("Now in one word.", max_output_tokens=8).text)
