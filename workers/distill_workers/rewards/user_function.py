"""The reward `python`: a function of the user, in a process of its own.

Whatever it does there, to exit, abort, hang or raise, fails its sample. What is wrong with every call, such as a result
that is no number, is a ConfigurationError at the first one.
"""

import asyncio
import importlib
import inspect
import math
import numbers
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from distill_workers.data.sample import Prompt
from distill_workers.failures import ConfigurationError
from distill_workers.rewards.base import WHOLE_RESPONSE, Grade, RewardError
from distill_workers.rewards.function import START_SECONDS, call, end, new_process

CALLS = 4
"""Calls of one function at the same time, each in its own process."""
CHECK_SECONDS = 10.0
"""The longest time that a job waits, before it begins, to hear whether the function can be called."""
IMPORT_SECONDS = 30.0
"""The longest time that the function's module may take to load, or the reward's timeout where that is longer."""
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

    def prepare(self) -> Outcome:
        """Load the function, in its own process, and say what keeps it from being called."""
        try:
            return self._inspect()
        except BaseException as error:
            return Outcome(raised=_raised(error))

    def __call__(self, response: str, answer: str | None, metadata: dict[str, Any]) -> Outcome:
        """Call the function, in its own process."""
        try:
            module, _, attribute = self.name.partition(":")
            result = getattr(importlib.import_module(module), attribute)(response, answer, metadata)
        # SystemExit, CancelledError and KeyboardInterrupt would end the trainer, were they raised there.
        except BaseException as error:
            return Outcome(raised=_raised(error))
        return read_result(result)

    def _inspect(self) -> Outcome:
        module, _, attribute = self.name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            return Outcome(
                refused=f"{error}; put the module on PYTHONPATH: in trainer.template for main, or for distill run in "
                "the environment"
            )
        except BaseException as error:
            return Outcome(refused=f"its module {module} raised {_raised(error)} while it was imported")
        if not callable(function):
            return Outcome(refused="is not a function")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            return Outcome(refused=f"is an async function; {ALLOWED}: write it with def, and await inside asyncio.run")
        try:
            inspect.signature(function).bind("response", "answer", {})
        except TypeError as error:
            return Outcome(refused=f"cannot be called as function(response, answer, metadata): {error}")
        except ValueError:
            pass  # some functions written in C tell no signature
        return Outcome()


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
        self._function, self._timeout = function, timeout_seconds
        self._scored = False
        # The last one used is taken first; None has yet to be started.
        self._idle: asyncio.LifoQueue[ProcessPoolExecutor | None] = asyncio.LifoQueue()
        for _ in range(CALLS):
            self._idle.put_nowait(None)

    async def score(self, prompt: Prompt, response: str) -> float:
        return (await self.grade(prompt, response)).score

    async def grade(self, prompt: Prompt, response: str) -> Grade:
        """Return the function's number. What it does wrong before it ever returned one is a ConfigurationError."""
        worker = await self._idle.get()
        try:
            worker = worker or await self._start()
            outcome = await call(worker, self._timeout, self._function, response, prompt.answer, prompt.metadata)
        except TimeoutError:
            end(worker)
            worker = None
            raise RewardError(f"the reward took longer than {self._timeout:g} s", permanent=True) from None
        except BrokenProcessPool:
            end(worker)
            worker = None
            raise RewardError("the reward's process died", permanent=True) from None
        except (RewardError, ConfigurationError):
            raise
        except Exception as error:
            raise RewardError(f"the reward failed: {type(error).__name__}: {error}") from error
        except BaseException:
            end(worker)  # it is still at work
            worker = None
            raise
        finally:
            self._idle.put_nowait(worker)
        if outcome.raised:
            raise RewardError(f"the reward failed: {outcome.raised}", permanent=True)
        if outcome.value is None:
            sentence = f"reward.function {self._function.name}: {outcome.refused}"
            raise RewardError(sentence, permanent=True) if self._scored else ConfigurationError(sentence)
        self._scored = True
        return Grade(outcome.value, response.strip(), WHOLE_RESPONSE)

    async def close(self) -> None:
        for _ in range(self._idle.qsize()):
            end(self._idle.get_nowait())

    def check(self) -> None:
        """Raises ConfigurationError for a function that cannot be called. One that loads slowly is left to its samples.

        It is loaded in a process of its own: to import it here would let it end, or hang, the trainer.
        """
        worker = new_process()
        kept = False
        try:
            worker.submit(int).result(START_SECONDS)
            self._refuse(worker.submit(self._function.prepare).result(CHECK_SECONDS))
            kept = True
        except TimeoutError:
            return
        except BrokenProcessPool:
            module = self._function.name.partition(":")[0]
            raise ConfigurationError(
                f"reward.function {self._function.name}: its module {module} ended the process while it was imported"
            ) from None
        finally:
            if kept:
                self._idle.get_nowait()
                self._idle.put_nowait(worker)
            else:
                end(worker)

    async def _start(self) -> ProcessPoolExecutor:
        made, limit = new_process(), max(IMPORT_SECONDS, self._timeout)
        try:
            await call(made, START_SECONDS, int)
            try:
                self._refuse(await call(made, limit, self._function.prepare))
            except TimeoutError:
                module = self._function.name.partition(":")[0]
                raise RewardError(
                    f"the reward's module {module} took longer than {limit:g} s to load", permanent=True
                ) from None
        except BaseException:
            end(made)
            raise
        return made

    def _refuse(self, outcome: Outcome) -> None:
        if wrong := outcome.refused or outcome.raised:
            raise ConfigurationError(f"reward.function {self._function.name}: {wrong}")


def build_user_reward(function: UserFunction, timeout_seconds: float) -> UserReward:
    """Return the reward by the function. Raises ConfigurationError for one that cannot be called."""
    reward = UserReward(function, timeout_seconds)
    reward.check()
    return reward


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


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
