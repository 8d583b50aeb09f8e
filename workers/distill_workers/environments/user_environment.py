"""An environment of the user as its own process runs it: each call in plain data, and what came of it likewise."""

import asyncio
import inspect
import json
import math
import numbers
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from distill_workers.environments.protocol import AssistantMessage, Message, Row, Turn
from distill_workers.user_code import described, load

MOST_CHARACTERS = 1_000_000
"""Of the messages of one turn, as JSON: more is no answer, and would hold up the trainer's tokenizer."""
OPENING_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
TURN_ROLES = frozenset({"system", "user", "tool"})
"""Not the assistant's: a conversation has the student's own words alone."""


class WrongAnswer(Exception):
    """Raised for an answer that is none; the message is the end of a sentence that begins with the method's name."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one call, in plain data: anything else may not come back from the process."""

    messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False
    raised: str = ""
    """What was raised, as a sentence; empty where nothing was."""
    wrong: str = ""
    """What is wrong with the answer, as a sentence; empty for one that can be used."""


class _Running:
    """The process's one conversation, and the event loop that all calls share, with what they opened in it."""

    runner: asyncio.Runner | None = None
    environment: Any = None


@dataclass(frozen=True, slots=True)
class UserEnvironment:
    """An environment by the name of its class, `module:Class`. Every method runs in the environment's own process."""

    name: str

    def reset(self, row: Row) -> Answer:
        """Begin a conversation. One that was left is closed before."""
        self.close()
        try:
            _Running.environment = load(self.name)()
            return Answer(read_messages(_run(_Running.environment.reset(row)), OPENING_ROLES))
        except WrongAnswer as error:
            return Answer(wrong=f"reset {error}")
        # SystemExit, CancelledError and KeyboardInterrupt would end the trainer, were they raised there.
        except BaseException as error:
            return Answer(raised=f"reset raised {described(error)}")

    def step(self, message: AssistantMessage) -> Answer:
        """Answer the student's message in the conversation that `reset` began."""
        try:
            return read_turn(_run(_Running.environment.step(message)))
        except WrongAnswer as error:
            return Answer(wrong=f"step {error}")
        except BaseException as error:
            return Answer(raised=f"step raised {described(error)}")

    def close(self) -> str:
        """End the conversation, if there is one, and return what the environment raised."""
        environment, _Running.environment = _Running.environment, None
        close = getattr(environment, "close", None)
        if close is None:
            return ""
        try:
            result = close()
            if inspect.isawaitable(result):
                _run(result)
        except BaseException as error:
            return described(error)
        return ""

    def inspect(self) -> str:
        """Load the class, and return what keeps it from being an environment; empty where nothing does."""
        found = load(self.name)
        if not inspect.isclass(found):
            return "is not a class"
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            return f"cannot be made without arguments: {error}"
        except ValueError:
            pass  # some classes written in C tell no signature
        for name, argument in (("reset", "row"), ("step", "message")):
            method = getattr(found, name, None)
            if not inspect.iscoroutinefunction(method):
                return f"has no method async def {name}(self, {argument})"
            try:
                inspect.signature(method).bind(None, None)
            except TypeError as error:
                return f"has a method {name} that cannot be called as {name}({argument}): {error}"
        return ""


def read_turn(value: Any) -> Answer:
    """Return the turn that `step` answered. Raises WrongAnswer."""
    if not isinstance(value, Turn):
        raise WrongAnswer(f"answered {_kind(value)}, which must be a Turn(messages, reward, done)")
    reward: Any = value.reward  # of the user, who may put anything there
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise WrongAnswer(f"answered the reward {reward!r}, which must be a finite number"[:300])
    if value.done:
        return Answer(reward=float(reward), done=True)
    return Answer(read_messages(value.messages, TURN_ROLES), float(reward))


def read_messages(value: Any, roles: frozenset[str]) -> list[Message]:
    """Return messages as plain data. Raises WrongAnswer for what is none, and for more than MOST_CHARACTERS."""
    if not isinstance(value, list | tuple) or not value:
        raise WrongAnswer(f"answered {_kind(value)} in place of messages, and is not done")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise WrongAnswer(f'answered message {number}, which is no {{"role": …, "content": …}} with texts')
        if message.get("role") not in roles:
            raise WrongAnswer(
                f"answered message {number} of the role {message.get('role')!r}; allowed are {', '.join(sorted(roles))}"
            )
    size = sum(len(message["content"]) for message in value)
    try:
        text = json.dumps(value) if size <= MOST_CHARACTERS else ""
        found: list[Message] = json.loads(text or "[]")
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongAnswer(f"answered messages that are no JSON: {error}") from None
    if not found or len(text) > MOST_CHARACTERS:
        raise WrongAnswer(f"answered {max(size, len(text)):,} characters; at most {MOST_CHARACTERS:,} are read")
    for number, message in enumerate(found, start=1):
        try:
            json.dumps(message, ensure_ascii=False).encode()  # a template may write any of its texts
        except UnicodeEncodeError:
            raise WrongAnswer(f"answered message {number} with half a surrogate pair, which no tokenizer has") from None
    return found


def _run(awaitable: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await awaitable

    _Running.runner = _Running.runner or asyncio.Runner()
    return _Running.runner.run(wait())


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list | tuple) and not value:
        return "no message"
    return f"a value of the type {type(value).__name__}"
