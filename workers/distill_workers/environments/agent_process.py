"""An agent of the user as a process: its row on the standard input, its reward on the last line that it prints."""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from distill_workers.environments.chat_completions import MODEL
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.environments.protocol import Row
from distill_workers.failures import ConfigurationError
from distill_workers.isolated_process import kill_group
from distill_workers.loopback import no_proxy

SETTING = "rollout.environment.agent.command"
"""The field of the job that names an agent, unless another one is said to."""
KEPT_BYTES = 65_536
"""Of what an agent prints: the end."""
SHOWN = 300
"""Characters of the last line of an agent's errors in a sentence."""
READING_SECONDS = 5.0
"""The longest time to wait for the end of what a killed group has printed: a process that left it may hold the pipe."""
BEGIN = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"  # PR_SET_PDEATHSIG: it ends with the trainer, however that ends
    "for one in (signal.SIGPIPE, signal.SIGXFSZ): signal.signal(one, signal.SIG_DFL)\n"  # Python ignores both
    "try: os.execvp(sys.argv[1], sys.argv[1:])\n"
    "except OSError as error: sys.exit(str(error))\n"
)
"""Becomes the agent. A preexec_fn would run Python after a fork, while threads of the trainer may have held locks."""


class NoReward(Exception):
    """Raised for a reward that is none; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How an agent ended."""

    code: int
    """Its exit code, negative for a signal."""
    output: str
    errors: str
    """The end of what it printed."""

    @property
    def reward(self) -> float | None:
        """Return the reward in the last line of the output; None where that is no JSON object. Raises NoReward."""
        line = last_line(self.output)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        reward = value.get("reward")
        with contextlib.suppress(OverflowError):  # of a whole number that no float is near to
            if isinstance(reward, int | float) and not isinstance(reward, bool) and math.isfinite(reward):
                return float(reward)
        raise NoReward(f'printed {line[:SHOWN]} at last, which has no "reward" that is a finite number')

    @property
    def failure(self) -> str:
        """Return the end of a sentence about an agent that failed; empty for one that did not."""
        if not self.code:
            return ""
        how = f"ended with exit code {self.code}" if self.code > 0 else f"was ended by signal {-self.code}"
        last = last_line(self.errors)
        return f"{how}: {last[:SHOWN]}" if last else how


class _End(asyncio.Protocol):
    """The end of what is written into a pipe, which is open for writing until `begin` is left.

    It is none of asyncio's own for subprocesses, with which a process has not ended before its pipes are closed: those
    that it has left behind may hold them.
    """

    def __init__(self) -> None:
        self.kept = b""
        self.closed = asyncio.Event()
        self._transport: asyncio.BaseTransport | None = None

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[int]:
        """Open the pipe, and yield the descriptor to write into."""
        reading, writing = os.pipe()
        try:
            pipe = os.fdopen(reading, "rb", buffering=0)
            self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: self, pipe)
            yield writing
        finally:
            os.close(writing)

    def data_received(self, data: bytes) -> None:
        self.kept = (self.kept + data)[-KEPT_BYTES:]

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()

    def close(self) -> None:
        """Read no further."""
        if self._transport is not None:
            self._transport.close()


class AgentProcess:
    """The process of one agent and all that it starts, unless that leaves its process group."""

    def __init__(self, process: asyncio.subprocess.Process, output: _End, errors: _End) -> None:
        self._process, self._output, self._errors = process, output, errors

    async def ended(self) -> Ended:
        """Return how the agent ended, once it has."""
        code = await self._process.wait()
        self.kill()  # what it has left behind would hold the pipes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READING_SECONDS):
                await self._output.closed.wait()
                await self._errors.closed.wait()
        output, errors = (end.kept.decode(errors="replace") for end in (self._output, self._errors))
        return Ended(code, output, errors)

    def kill(self) -> None:
        """Kill the process group, and the process where it has left that."""
        has_ended = self._process.returncode is not None
        kill_group(self._process.pid, was_waited_for=has_ended)
        if not has_ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def check_command(command: Sequence[str], setting: str = SETTING) -> None:
    """Raise ConfigurationError for a program that is not there; `setting` is the field of the job that names it."""
    if shutil.which(command[0]) is None:
        raise ConfigurationError(
            f"{setting}: there is no program {command[0]}; it must be a path, or a name on the PATH of the trainer's "
            "container"
        )


@asynccontextmanager
async def started(
    command: Sequence[str], row: Row, url: str, key: str, *, setting: str = SETTING
) -> AsyncIterator[AgentProcess]:
    """Start an agent, whose group is killed when the context is left. Raises EnvironmentFailed where none starts."""
    content = _content(row, setting)
    output, errors = _End(), _End()
    try:
        # No pipe for the row, which an agent that reads nothing would leave full.
        with tempfile.TemporaryFile() as given:
            given.write(content)
            given.seek(0)
            async with output.begin() as to_output, errors.begin() as to_errors:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-I", "-S", "-c", BEGIN),
                    *command,
                    stdin=given,
                    stdout=to_output,
                    stderr=to_errors,
                    env=_variables(url, key, os.environ),
                    process_group=0,
                )
    except BaseException as error:
        output.close()
        errors.close()
        if isinstance(error, OSError):
            raise EnvironmentFailed(f"{setting}: no process could be started: {error}") from None
        raise
    agent = AgentProcess(process, output, errors)
    try:
        yield agent
    finally:
        agent.kill()
        output.close()
        errors.close()
        await process.wait()


def _content(row: Row, setting: str) -> bytes:
    """Return a row as JSON. Raises EnvironmentFailed for one that JSON cannot have, such as a mapping by tuples."""
    try:
        return json.dumps(dataclasses.asdict(row), default=str).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EnvironmentFailed(f"{setting}: the row cannot be written as JSON: {error}", permanent=True) from None


def _variables(url: str, key: str, environment: Mapping[str, str]) -> dict[str, str]:
    own = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "OPENAI_MODEL": MODEL}
    return {**environment, **no_proxy(environment), **own}


def last_line(text: str) -> str:
    """Return the last line of a text that is not blank; empty where there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
