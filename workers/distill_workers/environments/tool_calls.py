"""Tool calls in the student's text, in the one form that is supported, that of Hermes and Qwen:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

Several may follow each other. `arguments` is an object, or an object as JSON in a text. No other form is read (Llama's
<|python_tag|>, Mistral's [TOOL_CALLS], calls written in XML): for the environment such a message has text alone. What
stands before the last </think> is thinking, and a tool call in it is none.
"""

import json
import re

from distill_workers.environments.protocol import AssistantMessage, ToolCall

CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
THINKING = ("<think>", "</think>")
SHOWN = 200
"""Characters of a malformed call that are shown."""


class Malformed(Exception):
    """Raised for a tool call that cannot be read."""


def parse_message(text: str, turn: int) -> AssistantMessage:
    """Return the student's text, without tokens that end it, as a message; `turn` is its number in the conversation."""
    thinking, said = _thinking(text)
    calls: list[ToolCall] = []
    malformed: list[str] = []
    for number, match in enumerate(CALL.finditer(said)):
        try:
            if not match[2]:
                raise Malformed("has no </tool_call>")
            calls.append(_call(match[1], f"call-{turn}-{number}"))
        except Malformed as error:
            malformed.append(f"tool call {number + 1} {error}: {match[1].strip()[:SHOWN]}")
    return AssistantMessage(CALL.sub("", said).strip(), tuple(calls), thinking, tuple(malformed), text)


def plain_message(text: str) -> AssistantMessage:
    """Return the student's text as a message in which no tool call is read."""
    thinking, said = _thinking(text)
    return AssistantMessage(said.strip(), (), thinking, (), text)


def _thinking(text: str) -> tuple[str, str]:
    begin, end = THINKING
    before, found, after = text.rpartition(end)
    if found:
        return before.removeprefix(begin).strip(), after
    said, found, thinking = text.partition(begin)
    return (thinking.strip(), said) if found else ("", text)


def _call(text: str, name_of_call: str) -> ToolCall:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"is no JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise Malformed('is no object with a "name"')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise Malformed('has "arguments" that are no object')
    return ToolCall(name_of_call, value["name"], arguments)
