"""A served teacher whose weights are replaced while the job runs: the student's, every so many steps (teacher.student).

Each weights that it is given have a name of their own, and a server says in each answer by which weights it is. An
answer by others is not taken: that server, which was away when the others got theirs or has been started again, first
loads the right ones from their folder, and is asked again. A score in flight ends before its server loads others.
"""

import asyncio
import logging
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
from distill_workers.teacher.protocol import Observer, TeacherRequest
from distill_workers.teacher.replicas import NotAnswered, Replica
from distill_workers.teacher.sglang_protocol import SEPARATOR, weights_name

log = logging.getLogger(__name__)

START = "0"
"""Name of the weights that a server starts with, the student's own (serving/server.py)."""
LOAD_SECONDS = 1800.0
LOADS = 3
"""Times that a server is given the weights before a request to it has failed."""


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


class RefreshedTeacher(TeacherPool):
    """The TeacherPool of a teacher whose weights `hold` replaces."""

    def __init__(
        self, address: str, spec: Spec, observer: Observer, *, teacher: NamedTeacherSource, **options: Any
    ) -> None:
        super().__init__(address, spec, observer, teacher=teacher, **options)
        self._shares_prefixes = self._protocol.shares_prefixes and not spec.deterministic
        self._held: HeldWeights | None = None
        """None until a run has begun or is resumed: nothing that is scored before counts."""
        self._loading: dict[Replica, asyncio.Lock] = {}
        self._headers = {"Content-Type": "application/json", **bearer(admin_key())}

    async def hold(self, version: int, folder: Path) -> None:
        """Give all servers the student's weights of `version`, from a folder that they see. A server that does not take
        them now takes them before it scores again."""
        self._held = HeldWeights.of(version, folder)
        self._admission.reset()
        self._affinity = PrefixAffinity(self._replicas, share=self._shares_prefixes)
        await self._replicas.resolve(again=True)
        replicas = self._replicas.all()
        results = await asyncio.gather(*(self._load(replica) for replica in replicas), return_exceptions=True)
        for replica, result in zip(replicas, results, strict=True):
            if isinstance(result, NotAnswered):
                log.warning(
                    "teacher %s: replica %s is yet to get weights: %s", self.teacher.name, replica.address, result
                )
            elif isinstance(result, BaseException):
                raise result
        self._loading = {r: lock for r, lock in self._loading.items() if r in replicas}

    async def _send(
        self, replica: Replica, request: TeacherRequest, tokens: int, timeout: float, own_connection: bool = False
    ) -> Any:
        """As TeacherPool._send, with an answer by the weights that are held when it comes."""
        for _ in range(LOADS):
            answer = await super()._send(replica, request, tokens, timeout, own_connection)
            if self._held is None or self._held.are(weights_name(answer)):
                return answer
            try:
                await self._load(replica)
            except NotAnswered:
                replica.failed(time.monotonic())
                raise
        replica.failed(time.monotonic())
        raise NotAnswered(f"it answers by the weights {weights_name(answer)}, and should have {self._held}")

    async def _load(self, replica: Replica) -> None:
        """Give a server the weights that are held, unless it has them. Raises NotAnswered."""
        assert self._held is not None, "hold() comes first"
        async with self._loading.setdefault(replica, asyncio.Lock()):
            held = self._held
            if held.are(str((await self._administer(replica, "GET", "/model_info"))["weight_version"])):
                return
            body = {"model_path": str(held.folder), "weight_version": held.name, "flush_cache": True}
            await self._administer(replica, "POST", "/update_weights_from_disk", body)
            log.info(
                "teacher %s: replica %s has the weights of step %d", self.teacher.name, replica.address, held.version
            )

    async def _administer(self, replica: Replica, method: str, path: str, body: Any = None) -> Any:
        assert self._session is not None, "start() comes first"
        try:
            async with self._session.request(
                method,
                self._endpoint.url(replica.address, path),
                json=body,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=LOAD_SECONDS),
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise NotAnswered(f"{path} answered {answer.status}: {(await answer.text())[:300]}")
                return await answer.json(content_type=None)
        except TimeoutError:
            raise NotAnswered(f"{path} was not answered within {LOAD_SECONDS:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NotAnswered(f"{path}: {type(error).__name__}: {error}") from None
