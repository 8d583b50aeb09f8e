"""Rewards: a number for a whole response. One that fails or hangs is a RewardError: its sample fails, not the job."""

import asyncio
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any, Protocol

import aiohttp

from distill_api.spec import Reward as RewardSpec
from distill_api.spec import RewardSource, Spec
from distill_workers.data.sample import Prompt
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics

MATH_SECONDS = 10
"""Of the comparison of two expressions, inside the worker process."""
PROCESSES, THREADS = 2, 4
"""Calls at once of a reward that runs here."""
START_SECONDS = 120.0
"""Of a process."""
CONNECTIONS = 64
"""To a reward's service at once; further requests wait."""
BACKOFF_SECONDS = (0.25, 10.0)
"""Before the first retry and at most: twice as long each time."""


class RewardError(Exception):
    """No reward for this response."""


class Reward(Protocol):
    async def score(self, prompt: Prompt, response: str) -> float:
        """Raises RewardError."""

    async def close(self) -> None: ...


Grade = Callable[[Prompt, str], Any]


class Called:
    """A reward by a function, run in a thread or a process of its own for as long, and ended after a while.

    Each worker has one call at a time: time is not spent in a queue, and what hangs takes no other call with it.
    """

    def __init__(self, grade: Grade, processes: bool, timeout_seconds: float, imports: tuple[str, ...] = ()) -> None:
        """`imports` are modules that a process loads before its time runs."""
        self._grade, self._processes, self._timeout, self._imports = grade, processes, timeout_seconds, imports
        # The last one used is taken first; None has yet to be started.
        self._idle: asyncio.LifoQueue[Executor | None] = asyncio.LifoQueue()
        for _ in range(PROCESSES if processes else THREADS):
            self._idle.put_nowait(None)

    async def score(self, prompt: Prompt, response: str) -> float:
        worker = await self._idle.get()
        try:
            worker = worker or await self._start()
            value = float(await self._call(worker, self._timeout, self._grade, prompt, response))
        except TimeoutError:
            end(worker)
            worker = None
            raise RewardError(f"the reward took longer than {self._timeout:g} s") from None
        except BrokenProcessPool:
            end(worker)
            worker = None
            raise RewardError("the reward's process died") from None
        except Exception as error:
            raise RewardError(f"the reward failed: {type(error).__name__}: {error}") from error
        except BaseException:
            end(worker)  # it is still at work
            worker = None
            raise
        finally:
            self._idle.put_nowait(worker)
        if not math.isfinite(value):
            raise RewardError(f"the reward is {value}")
        return value

    async def close(self) -> None:
        for _ in range(self._idle.qsize()):
            end(self._idle.get_nowait())

    async def _start(self) -> Executor:
        if not self._processes:
            return ThreadPoolExecutor(1, thread_name_prefix="reward")
        # spawn: this process has threads of torch, gloo and Ray, which a fork would break.
        made = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
        try:
            # A new process loads modules first, that of the function too; that is no time of the reward's.
            await self._call(made, START_SECONDS, callable, self._grade)
            for module in self._imports:
                await self._call(made, START_SECONDS, _load, module)
        except BaseException:
            end(made)
            raise
        return made

    @staticmethod
    async def _call(worker: Executor, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(worker.submit(function, *arguments)), seconds)


def end(worker: Executor | None) -> None:
    """A thread cannot be ended: it is left alone."""
    if worker is None:
        return
    for process in list((getattr(worker, "_processes", None) or {}).values()):
        with contextlib.suppress(OSError):
            process.kill()
    worker.shutdown(wait=False, cancel_futures=True)


class Asked:
    """A reward by a service: POST of prompt, response, answer and metadata as JSON, answered {"reward": number}."""

    def __init__(self, url: str, timeout_seconds: float, retries: int, metrics: Metrics) -> None:
        self._url, self._timeout, self._retries, self._metrics = url, timeout_seconds, retries, metrics
        # Of the connector, the wait for a free connection would count as the service's time.
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._session: aiohttp.ClientSession | None = None

    async def score(self, prompt: Prompt, response: str) -> float:
        question = {
            "prompt": prompt.text,
            "response": response,
            "answer": prompt.answer,
            "metadata": prompt.metadata,
        }
        # A data set may hold dates, decimals and bytes, which JSON has not.
        body = json.dumps(question, default=str).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                pause = min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2 ** (attempt - 1))
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            code, answer = await self._post(body)
            if code is not None and code < 500 and code != 429:
                return self._read(code, answer)
        raise RewardError(f"{self._url}: {self._retries + 1} requests failed; the last: {answer[:200]}")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, body: bytes) -> tuple[int | None, str]:
        """Status and text; without an answer, None and why."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=self._timeout),
            )
        code: int | None = None
        try:
            async with self._slots, self._session.post(self._url, data=body) as answer:
                text = await answer.text(errors="replace")
                code = answer.status
                return code, text if code == 200 else f"answered {code}: {text}"
        except TimeoutError:
            return None, f"not answered within {self._timeout:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            return None, f"{type(error).__name__}: {error}"
        finally:
            self._metrics.add("distill_reward_requests", code="error" if code is None else str(code))

    def _read(self, code: int, answer: str) -> float:
        if code != 200:
            raise RewardError(f"{self._url} {answer[:200]}")
        try:
            value = json.loads(answer)["reward"]
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except (ValueError, TypeError, KeyError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(f'{self._url} answered {answer[:200]!r}; it must be {{"reward": NUMBER}}')
        return number


def build_rewards(spec: Spec, metrics: Metrics) -> dict[str, Reward]:
    """The reward of each source of training prompts, by its name; a source without one is not among them."""
    chosen = {source.name: source.reward or spec.objective.reward for source in spec.data.all_sources}
    made: dict[RewardSpec, Reward] = {}
    for reward in chosen.values():
        if reward.source is not RewardSource.NONE and reward not in made:
            made[reward] = build_reward(reward, metrics)
    return {name: made[reward] for name, reward in chosen.items() if reward in made}


def build_reward(reward: RewardSpec, metrics: Metrics) -> Reward:
    """Raises ConfigurationError for a function that cannot be imported, ValueError for source none."""
    limit = float(reward.timeout_seconds)
    match reward.source:
        case RewardSource.EXACT_MATCH:
            return Called(exact_match, False, limit)
        case RewardSource.MATH:
            return Called(math_match, True, limit, imports=("math_verify",))
        case RewardSource.REASONING_GYM:
            return Called(reasoning_gym_score, False, limit)
        case RewardSource.PYTHON:
            assert reward.function is not None
            function = import_function(reward.function)
            return Called(lambda prompt, response: function(response, prompt.answer, prompt.metadata), False, limit)
        case RewardSource.HTTP:
            assert reward.url is not None
            return Asked(reward.url, limit, reward.retries, metrics)
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
            f"reward.function {name}: {error}; put the module on PYTHONPATH through trainer.template"
        ) from None
    if not callable(function):
        raise ConfigurationError(f"reward.function {name}: is not a function")
    return function  # type: ignore[no-any-return]  # the user's code has no types of ours


def needed(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(f"prompt {prompt.index} has no reference answer; set prompts.answerField")
    return prompt.answer


def _load(module: str) -> None:
    importlib.import_module(module)


def _begin() -> None:
    # A SIGTERM for the trainer reaches its group; the trainer decides when its helpers end, or is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
