"""What an environment is: a class whose object answers the student through one conversation.

    from distill_workers.environments.protocol import AssistantMessage, Message, Row, ToolCall, Turn

    class Calculator:
        async def reset(self, row: Row) -> list[Message]:
            self.answer = row.answer
            return row.messages

        async def step(self, message: AssistantMessage) -> Turn:
            if not message.tool_calls:
                return Turn(reward=float(message.content.strip() == self.answer), done=True)
            return Turn([call.result(self.calculate(call)) for call in message.tool_calls])

        def calculate(self, call: ToolCall) -> str:
            match call.arguments:
                case {"a": int(a), "b": int(b)}:
                    return str(a + b)
            return "error: a and b must be whole numbers"

`rollout.environment.function: my_envs.calculator:Calculator` names it. It is made anew, without arguments, for each
conversation, in a process that has no other conversation at the time; a call that takes longer than timeoutSeconds ends
that process. Whatever it raises there, or answers wrongly, fails its sample.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]
"""A chat message as chat templates take it: role and content, both texts, and what else the template reads."""


@dataclass(frozen=True, slots=True)
class Row:
    """The row of the data that a conversation begins with."""

    messages: list[Message]
    """The prompt as chat messages; a text is one message of the user."""
    answer: str | None
    """The reference answer, of prompts.answerField."""
    metadata: dict[str, Any]
    """Every other field."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool in the student's message."""

    id: str
    """Different for each call of a conversation."""
    name: str
    arguments: dict[str, Any]

    def result(self, content: str) -> Message:
        """Return the message that answers the call."""
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": content}


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """A message of the student."""

    content: str
    """The text, without thinking and tool calls."""
    tool_calls: tuple[ToolCall, ...] = ()
    thinking: str = ""
    malformed: tuple[str, ...] = ()
    """What is wrong with each tool call that could not be read, as a sentence; its text is in no other field."""
    text: str = ""
    """The whole text as the student wrote it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The answer of an environment to one message of the student."""

    messages: list[Message] = field(default_factory=list)
    """What the student reads next, of the roles tool, user and system; at least one, unless `done`."""
    reward: float = 0.0
    """Added to the reward of the conversation."""
    done: bool = False
    """Ends the conversation: the student reads none of `messages`."""


class Environment(Protocol):
    """The environment of one conversation. `async def close(self)` is optional, and called after its last turn."""

    async def reset(self, row: Row) -> list[Message]:
        """Return the messages that the conversation begins with, which the student answers first."""

    async def step(self, message: AssistantMessage) -> Turn:
        """Return the answer to a message of the student."""
