"""Rewards: a number for a whole response. One that fails or hangs is a RewardError: its sample fails, not the job."""

import asyncio
import contextlib
import importlib
import math
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any, Protocol

from distill_api.spec import Reward as RewardSpec
from distill_api.spec import RewardSource
from distill_workers.failures import ConfigurationError
from distill_workers.sample import Prompt

TIMEOUT_SECONDS = 30.0
MATH_SECONDS = 10
"""Of the comparison of two expressions, inside the worker process."""


class RewardError(Exception):
    """No reward for this response."""


class Reward(Protocol):
    async def score(self, prompt: Prompt, response: str) -> float:
        """Raises RewardError."""


Grade = Callable[[Prompt, str], Any]


class Called:
    """A reward by a function, run in an executor and cut off after a while."""

    def __init__(self, grade: Grade, processes: bool, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._grade, self._processes, self._timeout = grade, processes, timeout_seconds
        self._executor = self._new_executor()

    async def score(self, prompt: Prompt, response: str) -> float:
        try:
            future = self._executor.submit(self._grade, prompt, response)
            value = float(await asyncio.wait_for(asyncio.wrap_future(future), self._timeout))
        except TimeoutError:
            self._replace_executor()
            raise RewardError(f"the reward took longer than {self._timeout:.0f} s") from None
        except BrokenProcessPool:
            self._replace_executor()
            raise RewardError("the reward's process died") from None
        except Exception as error:
            raise RewardError(f"the reward failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise RewardError(f"the reward is {value}")
        return value

    def _new_executor(self) -> ProcessPoolExecutor | ThreadPoolExecutor:
        if not self._processes:
            return ThreadPoolExecutor(4, thread_name_prefix="reward")
        # spawn: this process has threads of torch, gloo and Ray, which a fork would break.
        return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_signals)

    def _replace_executor(self) -> None:
        old, self._executor = self._executor, self._new_executor()
        for process in list((getattr(old, "_processes", None) or {}).values()):
            with contextlib.suppress(OSError):
                process.kill()
        old.shutdown(wait=False, cancel_futures=True)


def build_reward(reward: RewardSpec) -> Reward:
    """Raises ConfigurationError for a function that cannot be imported, ValueError for source none."""
    match reward.source:
        case RewardSource.EXACT_MATCH:
            return Called(exact_match, processes=False)
        case RewardSource.MATH:
            return Called(math_match, processes=True)
        case RewardSource.REASONING_GYM:
            return Called(reasoning_gym_score, processes=False)
        case RewardSource.PYTHON:
            assert reward.function is not None
            function = import_function(reward.function)
            return Called(lambda prompt, response: function(response, prompt.answer, prompt.metadata), processes=False)
        case RewardSource.NONE:
            raise ValueError("source none computes no reward")


def exact_match(prompt: Prompt, response: str) -> float:
    return float(response.strip() == needed(prompt).strip())


def math_match(prompt: Prompt, response: str) -> float:
    """math-verify; a response without an expression is wrong. Runs in a main thread, since it times out by signal."""
    from math_verify import parse, verify

    answer = needed(prompt)
    # A bare number or LaTeX without dollars is parsed as such only inside a box.
    gold = parse(answer, parsing_timeout=MATH_SECONDS) or parse(rf"\boxed{{{answer}}}", parsing_timeout=MATH_SECONDS)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} of prompt {prompt.index} is no mathematical expression")
    return float(verify(gold, parse(response, parsing_timeout=MATH_SECONDS), timeout_seconds=MATH_SECONDS))


def reasoning_gym_score(prompt: Prompt, response: str) -> float:
    """The task's own score of what is inside <answer>, or of the whole response."""
    from reasoning_gym.utils import extract_answer

    if "entry" not in prompt.metadata:
        raise ValueError(f"prompt {prompt.index} was not made by reasoning-gym")
    scorer = _scorer(prompt.metadata["task"], tuple(sorted(prompt.metadata["options"].items())))
    answer = extract_answer(response)
    return float(scorer(response.strip() if answer is None else answer, prompt.metadata["entry"]))


@cache
def _scorer(task: str, options: tuple[tuple[str, Any], ...]) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=1, seed=0, **dict(options))
    score: Callable[[str, dict[str, Any]], float] = dataset.score_answer
    return score


def import_function(name: str) -> Callable[[str, str | None, dict[str, Any]], float]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"objective.reward.function {name}: {error}; put the module on PYTHONPATH through trainer.template"
        ) from None
    if not callable(function):
        raise ConfigurationError(f"objective.reward.function {name}: is not a function")
    return function  # type: ignore[no-any-return]  # the user's code has no types of ours


def needed(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(f"prompt {prompt.index} has no reference answer; set prompts.answerField")
    return prompt.answer


def _ignore_signals() -> None:
    # A SIGTERM for the trainer reaches its group; the trainer decides when its helpers end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
