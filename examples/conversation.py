"""Talks about a picture, tries another way on, and cleans up: `python examples/conversation.py HOST:PORT PICTURE`."""

import sys

from internvl_client import Client, ContextOverflow, Image

address, picture = sys.argv[1:]

with Client(address) as client:
    conversation = client.create_conversation(system_message="Answer in one sentence.", ttl_s=3600)
    first = conversation.ask(Image.open(picture), "What is in the picture?", max_output_tokens=32)
    conversation.ask("Which colours does it have?", max_output_tokens=32)

    # The same past, another way on. Neither knows of the other.
    forked = conversation.fork(at=first)
    # However long it gets, it goes on: what the model cannot hold any more is left out, the oldest first.
    answer = forked.ask(
        "Would it make a good cover?", max_output_tokens=32, context_overflow=ContextOverflow.DROP_OLDEST_TURNS
    )
    print(answer.text, f"({answer.num_dropped_turns} turns left out)")

    # A turn that is sent again under its id is answered once, whatever became of the first answer on its way.
    once = forked.ask("Why?", max_output_tokens=32, turn_id="why-1")
    again = forked.ask("Why?", max_output_tokens=32, turn_id="why-1")
    assert (again.text, again.message_id, again.replayed) == (once.text, once.message_id, True)

    for message in forked.messages():
        print(f"{message.role}: {message.text}{' [cut off]' if message.cut_off else ''}")

    mine = {conversation.conversation_id, forked.conversation_id}
    for kept in client.conversations():
        if kept.conversation_id in mine:
            print(f"{kept.num_messages} messages, kept until {kept.expire_time:%H:%M}")
    conversation.delete()
    forked.delete()
