"""Child processes of an entry point, which passes signals on and keeps their exit code.

The first process of a container is deaf to a signal that it has no handler for, and a trainer or a server imports for
many seconds before it can have one. So an entry point stays as a small parent: its handler is there before anything
else is imported, and a child that has no handler yet is ended by the signal itself. Only the standard library is
imported here, and stacks.py, which imports no more.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from distill_workers.stacks import CollectedStacks

GRACE_SECONDS = 20.0
"""Time that the other children have to end once one has failed."""
POLL_SECONDS = 0.2
STOPPED = 75
"""Exit code of a process that was asked to stop before it had begun: distill_api's ExitCode.TEMPORARY."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def exit_on_signal() -> None:
    """Make a signal that asks this process to stop end it at once. For the first line of an entry point, before its
    imports."""
    _handle_stop_signals(_exit_now)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends. Runs between fork and exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_session(session: int) -> None:
    """Kill every process of a session, whichever group it is in. Its first process must not have been waited for: else
    the number may be another's."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getsid(int(name)) == session:
                os.kill(int(name), signal.SIGKILL)


def _begin_child() -> None:
    end_with_parent()
    # It asks for stacks, and would end a child that still imports what answers it (stacks.py).
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Set the handler of SIGTERM, SIGINT and SIGHUP, of the last only where nohup has not had it ignored."""
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)


def _exit_now(number: int, frame: FrameType | None) -> None:
    os._exit(STOPPED)


class ChildProcesses:
    """Processes that begin together and end together: the first that fails ends the others, and its code is theirs."""

    def __init__(self, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
        self._commands = commands
        """For each child its command line, and what its environment has beside ours."""
        self._children: list[subprocess.Popen[bytes]] = []
        # One child writes to our standard error itself: nobody's lines can come between its own.
        self._stacks = [CollectedStacks(e.get("RANK", "")) for _, e in commands] if len(commands) > 1 else []
        self.stopping = False
        """Whether a signal has asked us to stop."""

    def run(self) -> int:
        """Return the exit code of the first child that failed, negative for a death by signal; 0 if none did."""
        _handle_stop_signals(self._forward)
        signal.signal(signal.SIGUSR1, self._forward_stack_request)
        for number, (command, environment) in enumerate(self._commands):
            if not self.stopping:
                of_stacks = self._stacks[number].environment if self._stacks else {}
                variables = {**os.environ, **environment, **of_stacks}
                self._children.append(subprocess.Popen(command, env=variables, preexec_fn=_begin_child))
        while True:
            codes = [child.poll() for child in self._children]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                break
            self._pass_on_stacks()
            time.sleep(POLL_SECONDS)
        self._end()
        self._pass_on_stacks(ended=True)
        if failed:
            return failed[0]
        return STOPPED if self.stopping and len(self._children) < len(self._commands) else 0

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def _forward_stack_request(self, number: int, frame: FrameType | None) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signal.SIGUSR1)

    def _pass_on_stacks(self, ended: bool = False) -> None:
        for stacks in self._stacks:
            stacks.pass_on(ended)

    def _end(self) -> None:
        """End the children that are left: asked first, then killed."""
        for child in self._children:
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for child in self._children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
