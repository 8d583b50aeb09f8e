"""Rewards by a function, run apart from the trainer for a limited time."""

import asyncio
import importlib
import math
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from distill_workers.data.sample import Prompt
from distill_workers.isolated_process import START_SECONDS, call, end, new_process
from distill_workers.rewards.base import Grade, RewardError

PROCESSES, THREADS = 2, 4
"""Calls at the same time of a reward that runs in processes, and of one that runs in threads."""

GradingFunction = Callable[[Prompt, str], Grade]


class FunctionReward:
    """A reward by a function, run in threads or processes of its own, and ended when it takes too long.

    Each worker has one call at a time: time is not spent in a queue, and what hangs takes no other call with it.
    """

    def __init__(
        self, grade: GradingFunction, processes: bool, timeout_seconds: float, imports: tuple[str, ...] = ()
    ) -> None:
        """`imports` are modules that a process loads before its time runs."""
        self._grade, self._processes, self._timeout, self._imports = grade, processes, timeout_seconds, imports
        # The last one used is taken first; None has yet to be started.
        self._idle: asyncio.LifoQueue[Executor | None] = asyncio.LifoQueue()
        for _ in range(PROCESSES if processes else THREADS):
            self._idle.put_nowait(None)

    async def score(self, prompt: Prompt, response: str) -> float:
        return (await self.grade(prompt, response)).score

    async def grade(self, prompt: Prompt, response: str) -> Grade:
        worker = await self._idle.get()
        try:
            worker = worker or await self._start()
            found: Grade = await call(worker, self._timeout, self._grade, prompt, response)
        except RewardError:
            raise
        except TimeoutError:
            end(worker)
            worker = None
            raise RewardError(f"the reward took longer than {self._timeout:g} s") from None
        except BrokenProcessPool:
            end(worker)
            worker = None
            raise RewardError("the reward's process died") from None
        except Exception as error:
            raise RewardError(f"the reward failed: {type(error).__name__}: {error}", permanent=True) from error
        except BaseException:
            end(worker)  # it is still at work
            worker = None
            raise
        finally:
            self._idle.put_nowait(worker)
        if not math.isfinite(found.score):
            raise RewardError(f"the reward is {found.score}")
        return found

    async def close(self) -> None:
        for _ in range(self._idle.qsize()):
            end(self._idle.get_nowait())

    async def _start(self) -> Executor:
        if not self._processes:
            return ThreadPoolExecutor(1, thread_name_prefix="reward")
        made = new_process()
        try:
            # A new process loads modules first, that of the function too; that is no time of the reward's.
            await call(made, START_SECONDS, callable, self._grade)
            for module in self._imports:
                await call(made, START_SECONDS, _load, module)
        except TimeoutError:
            end(made)
            raise RewardError(f"the reward's process was not ready after {START_SECONDS:g} s") from None
        except BaseException:
            end(made)
            raise
        return made


def _load(module: str) -> None:
    importlib.import_module(module)
