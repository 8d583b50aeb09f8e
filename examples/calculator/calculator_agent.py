"""The same calculator as a program that speaks OpenAI's API: the agent of examples/calculator-agent-cpu.yaml."""

import json
import os
import sys
from pathlib import Path

from openai import OpenAI


def multiply(arguments: str) -> str:
    """The product of a call's two numbers; an error for a call that has no two."""
    match json.loads(arguments):
        case {"a": int(a), "b": int(b)}:
            return str(a * b)
    return "error"


row = json.load(sys.stdin)
tools = json.loads(Path(__file__).with_name("tools.json").read_text())
client = OpenAI()
messages = row["messages"]
while True:
    answer = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=messages, tools=tools)
    message = answer.choices[0].message
    if not message.tool_calls:
        break
    messages.append(message)
    for call in message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": multiply(call.function.arguments)})
print(json.dumps({"reward": float(message.content == row["answer"])}))
