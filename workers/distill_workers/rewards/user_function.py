"""The reward `python`: a function of the user, in a process of its own.

Whatever it does there, to exit, abort, hang or raise, fails its sample. What is wrong with every call, such as a result
that is no number, is a ConfigurationError at the first one.
"""

import inspect
import math
import numbers
from dataclasses import dataclass
from typing import Any

from distill_workers.data.sample import Prompt
from distill_workers.failures import ConfigurationError
from distill_workers.rewards.base import WHOLE_RESPONSE, Grade, RewardError
from distill_workers.user_code import UserCodeFailed, UserProcesses, described, load

CALLS = 4
"""Calls of one function at the same time, each in its own process."""
SHOWN = 120
"""Characters that are shown of a result that is no number."""
ALLOWED = "it must return a number, such as 0.5"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one step in the function's process, in plain data: anything else may not come back from there."""

    value: float | None = None
    """The number that was returned."""
    refused: str = ""
    """What is wrong with the function or its result, as the end of a sentence; allowed are others."""
    raised: str = ""
    """Type and text of what was raised."""


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function by its name `module:function`, called with (response, answer, metadata)."""

    name: str

    def __call__(self, response: str, answer: str | None, metadata: dict[str, Any]) -> Outcome:
        """Call the function, in its own process."""
        try:
            result = load(self.name)(response, answer, metadata)
        # SystemExit, CancelledError and KeyboardInterrupt would end the trainer, were they raised there.
        except BaseException as error:
            return Outcome(raised=described(error))
        return read_result(result)

    def inspect(self) -> str:
        """Load the function, in its own process, and return what keeps it from being called; empty for nothing."""
        function = load(self.name)
        if not callable(function):
            return "is not a function"
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            return f"is an async function; {ALLOWED}: write it with def, and await inside asyncio.run"
        try:
            inspect.signature(function).bind("response", "answer", {})
        except TypeError as error:
            return f"cannot be called as function(response, answer, metadata): {error}"
        except ValueError:
            pass  # some functions written in C tell no signature
        return ""


def read_result(result: Any) -> Outcome:
    """Return the number that a function returned, also one of numpy or torch, or what it returned instead."""
    if inspect.iscoroutine(result):
        result.close()
        return Outcome(refused=f"returned a coroutine; {ALLOWED}: write it with def, and await inside asyncio.run")
    value = result
    if not isinstance(value, numbers.Number) and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except Exception:
            value = result
    if isinstance(value, numbers.Number) and not isinstance(value, complex):
        try:
            number = float(value)  # type: ignore[arg-type]  # every number but a complex one has __float__
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return Outcome(value=number)
    return Outcome(refused=f"returned {_described(result)}; {ALLOWED}")


class UserReward:
    """A reward by a function of the user, each call in a process with nothing else to do, for a limited time."""

    def __init__(self, function: UserFunction, timeout_seconds: float) -> None:
        self._function, self._scored = function, False
        self._processes = UserProcesses(
            function,
            setting="reward.function",
            subject="the reward",
            timeout_seconds=timeout_seconds,
            processes=CALLS,
        )

    async def score(self, prompt: Prompt, response: str) -> float:
        return (await self.grade(prompt, response)).score

    async def grade(self, prompt: Prompt, response: str) -> Grade:
        """Return the function's number. What it does wrong before it ever returned one is a ConfigurationError."""
        try:
            async with self._processes.one() as process:
                outcome = await process.call(self._function, response, prompt.answer, prompt.metadata)
        except UserCodeFailed as error:
            raise RewardError(str(error), permanent=error.permanent) from None
        except ConfigurationError:
            raise
        except Exception as error:
            raise RewardError(f"the reward failed: {type(error).__name__}: {error}") from error
        if outcome.raised:
            raise RewardError(f"the reward failed: {outcome.raised}", permanent=True)
        if outcome.value is None:
            sentence = f"reward.function {self._function.name}: {outcome.refused}"
            raise RewardError(sentence, permanent=True) if self._scored else ConfigurationError(sentence)
        self._scored = True
        return Grade(outcome.value, response.strip(), WHOLE_RESPONSE)

    async def close(self) -> None:
        await self._processes.close()

    def check(self) -> None:
        """Raises ConfigurationError for a function that cannot be called (UserProcesses.check)."""
        self._processes.check()


def build_user_reward(function: UserFunction, timeout_seconds: float) -> UserReward:
    """Return the reward by the function. Raises ConfigurationError for one that cannot be called."""
    reward = UserReward(function, timeout_seconds)
    reward.check()
    return reward


def _described(result: Any) -> str:
    if result is None:
        return "None"
    if isinstance(result, dict):
        keys = ", ".join(repr(key) for key in list(result)[:8])
        hint = " (return its 'score')" if "score" in result else ""
        return f"a dict with {keys or 'nothing in it'}{hint}"
    try:
        text = repr(result)
    except Exception:
        text = ""
    text = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return text if isinstance(result, float) else f"{type(result).__name__} {text}"
