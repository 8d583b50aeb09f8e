"""Processes for code that may hang, exit or abort: each runs one call at a time, for a limited time, and is killed."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

from distill_workers.child_processes import end_with_parent

START_SECONDS = 120.0
"""The longest time that a process may take to start."""


def new_process() -> ProcessPoolExecutor:
    """Return one process that runs one call at a time, and ends with this one."""
    # spawn: this process has threads of torch, gloo and Ray, which a fork would break.
    made = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    with _without_main():
        made.submit(int)  # starts the process
    return made


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the module that this program runs: a process that is started meanwhile does not import it.

    Of the trainer that would be torch, Megatron and all: seconds, and hundreds of megabytes.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


async def call(worker: Executor, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in the worker. Raises TimeoutError, BrokenProcessPool and what it raises."""
    return await asyncio.wait_for(asyncio.wrap_future(worker.submit(function, *arguments)), seconds)


def is_alive(worker: ProcessPoolExecutor) -> bool:
    """Return whether the process runs: another one may have killed it, such as the kernel for its memory."""
    return all(process.is_alive() for process in (getattr(worker, "_processes", None) or {}).values())


def end(worker: Executor | None) -> None:
    """Kill a process at once, with those that it has started; a thread cannot be ended, and is left alone."""
    if worker is None:
        return
    for process in list((getattr(worker, "_processes", None) or {}).values()):
        kill_group(process.pid, was_waited_for=process.exitcode is not None)
        with contextlib.suppress(OSError):
            process.kill()
    worker.shutdown(wait=False, cancel_futures=True)


def kill_group(number: int, *, was_waited_for: bool) -> None:
    """Kill the process group that a process leads, which may outlive it."""
    # The number of one that was waited for is another's, if such a process is there: never while its group has members.
    is_another = was_waited_for and os.path.exists(f"/proc/{number}")
    if not is_another:
        with contextlib.suppress(OSError):
            os.killpg(number, signal.SIGKILL)


def _begin() -> None:
    os.setpgid(0, 0)  # what the code starts is in this group, by which `end` knows it, and in the trainer's session
    end_with_parent()  # also where a regular expression lets no other thread run
    # A SIGTERM for the trainer reaches its group; the trainer decides when its helpers end, or is gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what the code prints is no output of the command that called it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
