"""The stacks of a process that hangs: on request, by SIGUSR1, and where a call takes far too long.

They go to standard error, written by faulthandler without Python, so that they come also where the interpreter waits in
a collective. `kill -USR1` of a launcher reaches its ranks or server. faulthandler writes a line in many small pieces,
and ranks that hang together write together: so each of several ranks has a file, which its launcher passes on.
"""

import contextlib
import faulthandler
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TextIO

FILE = "DISTILL_STACKS_FILE"
"""The variable that names the file of a rank."""
SETTLED_SECONDS = 1.0
"""A file that has not grown for so long holds whole stacks."""


def on_signal() -> None:
    """Have SIGUSR1 write the stacks of all threads of this process, which goes on."""
    faulthandler.register(signal.SIGUSR1, file=_file(), all_threads=True)


@contextlib.contextmanager
def dumped_after(seconds: float) -> Iterator[None]:
    """Write the stacks of all threads, once, if the block takes longer than so many seconds. One block at a time."""
    faulthandler.dump_traceback_later(seconds, file=_file())
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@functools.cache
def _file() -> TextIO | int:
    """The launcher's file for this process, not for those that it starts; standard error where none can be had."""
    path = os.environ.pop(FILE, None)
    with contextlib.suppress(OSError):  # stacks of several ranks may then mix, but each rank starts
        if path:
            return os.open(path, os.O_WRONLY | os.O_APPEND)
    return sys.__stderr__ or 2


class CollectedStacks:
    """What one rank writes of its stacks, in memory, passed on to standard error in one piece."""

    def __init__(self, rank: str) -> None:
        self._rank = rank
        self._descriptor = os.memfd_create(f"stacks-{rank}")
        self._size = self._told = 0
        self._grown = 0.0
        self.environment = {FILE: f"/proc/{os.getpid()}/fd/{self._descriptor}"}
        """What the rank's environment has beside others."""

    def pass_on(self, ended: bool = False) -> None:
        """Write what is new, once it grows no more or the rank has ended."""
        size, now = os.fstat(self._descriptor).st_size, time.monotonic()
        if size != self._size:
            self._size, self._grown = size, now
        if size > self._told and (ended or now - self._grown >= SETTLED_SECONDS):
            new = os.pread(self._descriptor, size - self._told, self._told)
            self._told = size
            with contextlib.suppress(OSError):  # nobody reads the log any more: no reason to end the ranks
                _write_whole(2, f"stacks of rank {self._rank}:\n".encode() + new)


def _write_whole(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
