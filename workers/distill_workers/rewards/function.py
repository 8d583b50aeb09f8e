"""Rewards by a function, run apart from the trainer for a limited time."""

import asyncio
import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from distill_workers.child_processes import end_with_parent
from distill_workers.data.sample import Prompt
from distill_workers.rewards.base import Grade, RewardError

PROCESSES, THREADS = 2, 4
"""Calls at the same time of a reward that runs in processes, and of one that runs in threads."""
START_SECONDS = 120.0
"""The longest time that a process may take to start."""

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
        except BaseException:
            end(made)
            raise
        return made


def new_process() -> ProcessPoolExecutor:
    """Return one process that runs one call at a time, and ends with this one."""
    # spawn: this process has threads of torch, gloo and Ray, which a fork would break.
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


async def call(worker: Executor, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in the worker. Raises TimeoutError, BrokenProcessPool and what it raises."""
    return await asyncio.wait_for(asyncio.wrap_future(worker.submit(function, *arguments)), seconds)


def end(worker: Executor | None) -> None:
    """Kill a process at once, with those that it has started; a thread cannot be ended, and is left alone."""
    if worker is None:
        return
    for process in list((getattr(worker, "_processes", None) or {}).values()):
        _kill_group(process)
    worker.shutdown(wait=False, cancel_futures=True)


def _kill_group(process: Any) -> None:
    """Kill a process and the group that `_begin` has made of it, which may outlive it."""
    # The number of one that was waited for is another's, if such a process is there: never while its group has members.
    is_another = process.exitcode is not None and os.path.exists(f"/proc/{process.pid}")
    if not is_another:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        process.kill()


def _load(module: str) -> None:
    importlib.import_module(module)


def _begin() -> None:
    os.setpgid(0, 0)  # what a reward starts is in this group, by which `end` knows it, and in the trainer's session
    end_with_parent()  # also where a regular expression lets no other thread run
    # A SIGTERM for the trainer reaches its group; the trainer decides when its helpers end, or is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what a reward prints is no output of the command that called it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
