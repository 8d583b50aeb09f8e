"""A calculator that the student may call: the environment of examples/calculator-cpu.yaml.

The student is asked a product, such as 47*389. It answers, or calls the tool `multiply` of tools.json first.
"""

from distill_workers.environments.protocol import AssistantMessage, Message, Row, ToolCall, Turn


class Calculator:
    async def reset(self, row: Row) -> list[Message]:
        self.answer = row.answer
        return row.messages

    async def step(self, message: AssistantMessage) -> Turn:
        if message.tool_calls:
            return Turn([call.result(multiply(call)) for call in message.tool_calls])
        return Turn(reward=float(message.content == self.answer), done=True)


def multiply(call: ToolCall) -> str:
    """The product of a call's two numbers; an error for a call that has no two."""
    match call.arguments:
        case {"a": int(a), "b": int(b)}:
            return str(a * b)
    return "error"
