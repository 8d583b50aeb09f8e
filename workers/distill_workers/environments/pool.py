"""The environments of a job, one process for each conversation that goes on."""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from distill_api.spec.environment import Environment as EnvironmentSpec
from distill_workers.environments.fair_slots import FairSlots, Kind
from distill_workers.environments.protocol import AssistantMessage, Message, Row
from distill_workers.environments.user_environment import Answer, UserEnvironment
from distill_workers.user_code import UserCodeFailed, UserProcess, UserProcesses, described

log = logging.getLogger(__name__)

CONVERSATIONS = 64
"""Conversations at the same time, each with a process of its own; the others begin when one has ended."""


OPEN_FILES = 16_384
"""This process may have so many, where the system allows it: it holds eight for each process of a conversation, and
many systems begin with a limit of 1,024 for all."""


class EnvironmentFailed(Exception):
    """Raised when an environment gives no answer that can be used: its sample fails, the job goes on."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        """Whether it would fail with another attempt of the run as well."""


class OpenEnvironment:
    """The environment of one conversation. Its methods raise EnvironmentFailed."""

    def __init__(self, environment: UserEnvironment, process: UserProcess) -> None:
        self._environment, self._process = environment, process

    async def reset(self, row: Row) -> list[Message]:
        """Return the messages that the conversation begins with."""
        return (await self._answer(self._environment.reset, row)).messages

    async def step(self, message: AssistantMessage) -> Answer:
        """Return the answer to the student's message."""
        return await self._answer(self._environment.step, message)

    async def close(self) -> None:
        """Let the environment release what it holds; a failure is logged alone, since the conversation is over."""
        if self._process.ended:
            return
        try:
            raised = await self._process.call(self._environment.close)
        except Exception as error:
            raised = str(error) if isinstance(error, UserCodeFailed) else described(error)
        if raised:
            log.warning("rollout.environment.function %s: close: %s", self._environment.name, raised)

    async def _answer(self, function: Callable[..., Answer], argument: Row | AssistantMessage) -> Answer:
        """Return what the environment answers. Raises EnvironmentFailed, and UserCodeFailed where its process ends."""
        try:
            answer: Answer = await self._process.call(function, argument)
        except UserCodeFailed:
            raise
        except Exception as error:  # on the way there or back
            raise EnvironmentFailed(
                f"rollout.environment.function {self._environment.name}: {described(error)}", permanent=True
            ) from None
        if sentence := answer.wrong or answer.raised:
            raise EnvironmentFailed(
                f"rollout.environment.function {self._environment.name}: {sentence}", permanent=bool(answer.wrong)
            )
        return answer


class EnvironmentPool:
    """A pool of the processes in which environments run."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        assert spec.function is not None
        allow_open_files()
        self._environment = UserEnvironment(spec.function)
        self._slots = FairSlots(CONVERSATIONS)
        self._processes = UserProcesses(
            self._environment,
            setting="rollout.environment.function",
            subject="the environment",
            timeout_seconds=float(spec.timeout_seconds),
            processes=CONVERSATIONS,
        )

    @asynccontextmanager
    async def conversation(self, kind: Kind = Kind.TRAINING) -> AsyncIterator[OpenEnvironment]:
        """Open an environment for one conversation, once a process is free and it is the turn of its kind.

        Raises EnvironmentFailed also for what the process itself does: it took too long, or died.
        """
        try:
            async with self._slots.one(kind), self._processes.one() as process:
                opened = OpenEnvironment(self._environment, process)
                try:
                    yield opened
                except asyncio.CancelledError:
                    raise  # at once: the next conversation in the process closes this one
                except BaseException:
                    await opened.close()
                    raise
                else:
                    await opened.close()
        except UserCodeFailed as error:
            raise EnvironmentFailed(str(error)) from None

    def check(self) -> None:
        """Raises ConfigurationError for a class that is no environment (UserProcesses.check)."""
        self._processes.check()

    async def close(self) -> None:
        """End all processes."""
        await self._processes.close()


def allow_open_files() -> None:
    """Let this process have OPEN_FILES, or as many as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
