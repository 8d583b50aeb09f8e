"""A served teacher whose weights are replaced while the job runs: the student's, every so many steps (teacher.student).

Each weights that it is given have a name of their own, and a server says in each answer by which weights it is. An
answer by others is not taken: that server, which was away when the others got theirs or has been started again, first
loads the right ones from their folder, and is asked again. A score in flight ends before its server loads others. A
server that loads slowly, or hangs, holds up nothing while another has the weights.
"""

import asyncio
import logging
import math
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from distill_api.spec.job_spec import NamedTeacherSource, Spec
from distill_workers.serving.admin_key import admin_key, bearer
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.prefix_affinity import PrefixAffinity
from distill_workers.teacher.protocol import Observer, TeacherRequest, TeacherUnreachable
from distill_workers.teacher.replicas import NotAnswered, NotReached, Replica
from distill_workers.teacher.sglang_protocol import SEPARATOR, weights_name

log = logging.getLogger(__name__)

START = "0"
"""Name of the weights that a server starts with, the student's own (serving/server.py)."""
LOAD_SECONDS = 1800.0
INFO_SECONDS = 10.0
"""A server tells at once which weights it has, also while it loads others."""
LEAST_PATIENCE_SECONDS = 10.0
"""Seconds that a server has to load the weights, however quick another was."""


class OtherWeights(NotReached):
    """Raised for an answer by other weights than are held."""


@dataclass(frozen=True)
class HeldWeights:
    """The weights that all servers of a teacher are to have."""

    version: int
    """Optimiser steps after which they were the student's."""
    folder: Path
    """A Hugging Face checkpoint, as trainer and servers see it."""
    name: str
    """What servers call them. Those of one version that were made twice, as after a roll-back, have two names."""

    @classmethod
    def of(cls, version: int, folder: Path) -> "HeldWeights":
        """Return the weights in a folder, under a new name."""
        return cls(version, folder, f"{version}{SEPARATOR}{uuid.uuid4().hex[:12]}")

    def are(self, name: str) -> bool:
        """Return whether a server that names its weights so has these."""
        return name == self.name or (self.version == 0 and name == START)


@dataclass(frozen=True)
class Load:
    """A server's load of weights."""

    task: asyncio.Task[None]
    begun: float
    """time.monotonic"""

    @property
    def succeeded(self) -> bool:
        """Whether it has ended well. Raises what is neither that nor NotAnswered."""
        if not self.task.done() or self.task.cancelled():
            return False
        error = self.task.exception()
        if error is not None and not isinstance(error, NotAnswered):
            raise error
        return error is None

    def state(self) -> str:
        """Return what is true of one that has not succeeded."""
        if self.task.done() and not self.task.cancelled():
            return str(self.task.exception())
        return f"it has been loading them for {time.monotonic() - self.begun:.0f} s"


class RefreshedTeacher(TeacherPool):
    """The TeacherPool of a teacher whose weights `hold` replaces."""

    def __init__(
        self, address: str, spec: Spec, observer: Observer, *, teacher: NamedTeacherSource, **options: Any
    ) -> None:
        super().__init__(address, spec, observer, teacher=teacher, **options)
        self._shares_prefixes = self._protocol.shares_prefixes and not spec.deterministic
        self._held: HeldWeights | None = None
        """None until a run has begun or is resumed: nothing that is scored before counts."""
        self._loads: dict[Replica, Load] = {}
        """The last load of each replica that was given weights."""
        self._patience = LEAST_PATIENCE_SECONDS
        """Seconds that a load may take before others no longer wait for it: twice what the quickest has taken."""
        self._headers = {"Content-Type": "application/json", **bearer(admin_key())}

    async def hold(self, version: int, folder: Path) -> None:
        """Give all servers the student's weights of `version`, from a folder that they see, and return once one has
        them and the others have had as long again. A server that takes them later scores nothing before.

        Raises TeacherUnreachable if none takes them.
        """
        self._held = HeldWeights.of(version, folder)
        self._admission.reset()
        self._affinity = PrefixAffinity(self._replicas, share=self._shares_prefixes)
        begin = time.monotonic()
        while not await self._load_all():
            if time.monotonic() - begin > self._limit:
                raise TeacherUnreachable(
                    f"no teacher at {self._endpoint.title} has taken the weights of step {version} for "
                    f"{self._limit:.0f} s; see the log of the teacher's server"
                )
            await asyncio.sleep(min(1.0, self._limit / 4))

    async def close(self) -> None:
        for load in self._loads.values():
            load.task.cancel()
        await super().close()

    async def _send(
        self, replica: Replica, request: TeacherRequest, tokens: int, timeout: float, own_connection: bool = False
    ) -> Any:
        """As TeacherPool._send, with an answer by the weights that are held when it comes."""
        load = self._loads.get(replica)
        if load is not None and not load.succeeded:
            await self._wait_for_load(replica)
        try:
            return await super()._send(replica, request, tokens, timeout, own_connection)
        except OtherWeights:
            await self._wait_for_load(replica)
        return await super()._send(replica, request, tokens, timeout, own_connection)

    def _check_weights(self, answer: Any) -> None:
        if self._held is not None and not self._held.are(name := weights_name(answer)):
            raise OtherWeights(f"it answers by the weights {name}, and should have those of step {self._held.version}")

    async def _load_all(self) -> bool:
        """Have all replicas load the weights that are held; return whether one has them."""
        await self._replicas.resolve(again=True)
        self._loads = {replica: self._load_of(replica) for replica in self._replicas.all()}
        loads = list(self._loads.items())
        begin, self._patience = time.monotonic(), math.inf
        pending = {load.task for _, load in loads}
        while pending and (left := begin + self._patience - time.monotonic()) > 0:
            timeout = None if left == math.inf else left
            _, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if self._patience == math.inf and any(load.succeeded for _, load in loads):
                self._patience = max(LEAST_PATIENCE_SECONDS, 2 * (time.monotonic() - begin))
        for replica, load in loads:
            if not load.succeeded:
                log.warning(
                    "teacher %s: replica %s is yet to get weights: %s", self.teacher.name, replica.address, load.state()
                )
        return any(load.succeeded for _, load in loads)

    def _load_of(self, replica: Replica) -> Load:
        """Return the load that a replica is at, or a new one."""
        load = self._loads.get(replica)
        if load is None or load.task.done():
            load = self._loads[replica] = Load(asyncio.create_task(self._load(replica)), time.monotonic())
        return load

    async def _wait_for_load(self, replica: Replica) -> None:
        """Return once a replica has the weights that are held. Raises NotReached if that takes long, or fails."""
        begin, load = time.monotonic(), self._load_of(replica)
        patience = LEAST_PATIENCE_SECONDS if self._patience == math.inf else self._patience
        await asyncio.wait({load.task}, timeout=max(0.0, load.begun + patience - begin))
        if not load.succeeded:
            replica.failed(begin)
            raise NotReached(f"it lacks the teacher's weights: {load.state()}")

    async def _load(self, replica: Replica) -> None:
        """Give a server the weights that are held, unless it has them. Raises NotAnswered."""
        held = None
        while held is not self._held:  # others may have come meanwhile
            held = self._held
            assert held is not None, "hold() comes first"
            info = await self._administer(replica, "GET", "/model_info", INFO_SECONDS)
            try:
                name = str(info["weight_version"])
            except (LookupError, TypeError):
                raise NotAnswered(f"/model_info names no weight_version: {str(info)[:300]}") from None
            if held.are(name):
                continue
            body = {"model_path": str(held.folder), "weight_version": held.name, "flush_cache": True}
            await self._administer(replica, "POST", "/update_weights_from_disk", LOAD_SECONDS, body)
            log.info(
                "teacher %s: replica %s has the weights of step %d", self.teacher.name, replica.address, held.version
            )

    async def _administer(self, replica: Replica, method: str, path: str, seconds: float, body: Any = None) -> Any:
        assert self._session is not None, "start() comes first"
        try:
            async with self._session.request(
                method,
                self._endpoint.url(replica.address, path),
                json=body,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=seconds),
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise NotAnswered(f"{path} answered {answer.status}: {(await answer.text())[:300]}")
                return await answer.json(content_type=None)
        except TimeoutError:
            raise NotAnswered(f"{path} was not answered within {seconds:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NotAnswered(f"{path}: {type(error).__name__}: {error}") from None
