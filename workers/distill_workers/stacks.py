"""The stacks of a process that hangs: on request, by SIGUSR1, and where a call takes far too long.

They go to standard error, written by faulthandler without Python, so that they come also where the interpreter waits in
a collective. `kill -USR1` of a launcher reaches its ranks or server.
"""

import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def on_signal() -> None:
    """Have SIGUSR1 write the stacks of all threads of this process, which goes on."""
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or 2, all_threads=True)


@contextmanager
def dumped_after(seconds: float) -> Iterator[None]:
    """Write the stacks of all threads, once, if the block takes longer than so many seconds. One block at a time."""
    faulthandler.dump_traceback_later(seconds, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
