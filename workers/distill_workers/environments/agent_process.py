"""An agent of the user as a process: its row on the standard input, its reward on the last line that it prints."""

import asyncio
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
KEPT_BYTES = 65_536
"""Of what an agent prints: the end."""
SHOWN = 300
"""Characters of the last line of an agent's errors in a sentence."""
READING_SECONDS = 5.0
"""The longest time to wait for the end of what a killed group has printed: a process that left it may hold the pipe."""
BEGIN = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"  # PR_SET_PDEATHSIG: it ends with the trainer, however that ends
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
        line = _last_line(self.output)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        reward = value.get("reward")
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            raise NoReward(f'printed {line[:SHOWN]} at last, which has no "reward" that is a finite number')
        return float(reward)

    @property
    def failure(self) -> str:
        """Return the end of a sentence about an agent that failed; empty for one that did not."""
        if not self.code:
            return ""
        how = f"ended with exit code {self.code}" if self.code > 0 else f"was ended by signal {-self.code}"
        last = _last_line(self.errors)
        return f"{how}: {last[:SHOWN]}" if last else how


class _End:
    """The end of what a process prints."""

    kept = b""

    async def read(self, pipe: asyncio.StreamReader) -> None:
        while read := await pipe.read(KEPT_BYTES):
            self.kept = (self.kept + read)[-KEPT_BYTES:]


class AgentProcess:
    """The process of one agent and all that it starts, unless that leaves its process group."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        assert process.stdout is not None and process.stderr is not None
        self._ends = [_End(), _End()]
        pipes = (process.stdout, process.stderr)
        self._readers = [asyncio.create_task(end.read(pipe)) for end, pipe in zip(self._ends, pipes, strict=True)]

    async def ended(self) -> Ended:
        """Return how the agent ended, once it has."""
        code = await self._process.wait()
        self.kill()  # what it has left behind would hold the pipes
        await asyncio.wait(self._readers, timeout=READING_SECONDS)
        output, errors = (end.kept.decode(errors="replace") for end in self._ends)
        return Ended(code, output, errors)

    def kill(self) -> None:
        """Kill the process group."""
        kill_group(self._process.pid, was_waited_for=self._process.returncode is not None)

    async def close(self) -> None:
        """Kill the process group, and forget it."""
        self.kill()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self._process.wait()


def check_command(command: Sequence[str]) -> None:
    """Raise ConfigurationError for a program that is not there."""
    if shutil.which(command[0]) is None:
        raise ConfigurationError(
            f"{SETTING}: there is no program {command[0]}; it must be a path, or a name on the PATH of the trainer's "
            "container"
        )


@asynccontextmanager
async def started(command: Sequence[str], row: Row, url: str, key: str) -> AsyncIterator[AgentProcess]:
    """Start an agent, whose group is killed when the context is left. Raises EnvironmentFailed where none starts."""
    with tempfile.TemporaryFile() as given:  # no pipe, which an agent that reads nothing would leave full
        given.write(json.dumps(dataclasses.asdict(row), default=str).encode())
        given.seek(0)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", "-c", BEGIN),
                *command,
                stdin=given,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=_variables(url, key, os.environ),
                process_group=0,
            )
        except OSError as error:
            raise EnvironmentFailed(f"{SETTING}: no process could be started: {error}") from None
    agent = AgentProcess(process)
    try:
        yield agent
    finally:
        await agent.close()


def _variables(url: str, key: str, environment: Mapping[str, str]) -> dict[str, str]:
    own = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "OPENAI_MODEL": MODEL}
    return {**environment, **no_proxy(environment), **own}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
