"""Lets the model call a function: `python examples/tools.py HOST:PORT "What is 12 times 13?"`."""

import sys

from internvl_client import Client, Message, Tool

address, question = sys.argv[1:]
NUMBERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}
multiply = Tool("multiply", "Multiplies two numbers.", NUMBERS)

with Client(address) as client:
    conversation = client.create_conversation()
    answer = conversation.ask(question, tools=[multiply], max_output_tokens=128)
    while answer.tool_calls:
        results = [Message.tool(str(call.arguments["a"] * call.arguments["b"])) for call in answer.tool_calls]
        answer = conversation.ask(*results, tools=[multiply], max_output_tokens=128)
    print(answer.text)
