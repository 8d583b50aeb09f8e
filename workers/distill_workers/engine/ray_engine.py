"""A rollout engine as an actor of Ray.

Nothing here calls Ray's state API: after a restart of the head `ray.nodes()` aborts the process from C++. A lost head
shows only in calls that fail or hang, so every call has a timeout.
"""

import asyncio
import contextlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import ray
from ray.exceptions import RayTaskError

from distill_api.job import DistillationJob
from distill_api.protocol import ENGINE_RESOURCE, SGLANG_PORT
from distill_workers.engine.engine import (
    CONTROL_TIMEOUT_SECONDS,
    RESPONSE_TIMEOUT_SECONDS,
    START_TIMEOUT_SECONDS,
    Engine,
)
from distill_workers.engine.request import EngineRefused, EngineUnavailable, Request, Response
from distill_workers.serving.server import ServerFailed
from distill_workers.serving.server_devices import of_engine

log = logging.getLogger(__name__)

PLACE_SECONDS = 600.0
"""An actor must be placed on a worker within so long: a lost worker pod is made again meanwhile."""
LOCAL_PLACE_SECONDS, LOCAL_TRIES = 120.0, 4
"""On one machine there is no pod to wait for: an actor whose process did not come up, as was seen on a busy machine, is
created anew."""
PING_SECONDS = 20.0
CALL_SLACK_SECONDS = 15.0
"""Ray may add so much to the engine's own timeout."""

_CALLS = ThreadPoolExecutor(16, thread_name_prefix="ray-calls")


class RayEngine:
    """The EngineHandle of an actor. `start` creates the actor too, and creates it anew where the old one is lost.

    Local engines share this machine and need no resource of Ray.
    """

    def __init__(self, number: int, job: DistillationJob, *, local: bool, log_folder: str) -> None:
        self.number, self.incarnation = number, 0
        self.placed = False
        """Whether Ray has placed it on a worker. This stays true: a lost worker pod is made again at once."""
        self._job, self._local, self._log_folder = job, local, log_folder
        self._actor: Any = None

    async def start(self, model: str) -> float:
        self.incarnation += 1
        if self._actor is not None:
            try:
                await self._call("info", timeout_seconds=PING_SECONDS)
            except EngineUnavailable as error:
                log.warning("engine %d: its actor is lost, a new one is created: %s", self.number, error)
                await self._kill()
        if self._actor is None:
            await self._place()
        self.placed = True
        return float(await self._call("start", model, timeout_seconds=START_TIMEOUT_SECONDS))

    async def _place(self) -> None:
        """Create the actor, and wait until its process answers."""
        seconds, tries = (LOCAL_PLACE_SECONDS, LOCAL_TRIES) if self._local else (PLACE_SECONDS, 1)
        for left in reversed(range(tries)):
            try:
                self._actor = await asyncio.get_running_loop().run_in_executor(_CALLS, self._create_actor)
            except Exception as error:
                raise EngineUnavailable(f"no actor can be created: {type(error).__name__}: {error}") from None
            try:
                await self._call("info", timeout_seconds=seconds)
                return
            except EngineUnavailable as error:
                if not left:
                    raise
                log.warning("engine %d: its actor has no process, a new one is created: %s", self.number, error)
                await self._kill()

    async def stop(self) -> None:
        if self._actor is None:
            return
        with contextlib.suppress(EngineUnavailable, EngineRefused):
            await self._call("stop", timeout_seconds=PING_SECONDS)
        await self._kill()

    async def info(self) -> dict[str, Any]:
        return dict(await self._call("info", timeout_seconds=PING_SECONDS))

    async def health(self, timeout_seconds: float = 10.0) -> None:
        await self._call("health", timeout_seconds, timeout_seconds=timeout_seconds)

    async def generate(self, requests: list[Request]) -> list[Response]:
        return list(await self._call("generate", requests, timeout_seconds=RESPONSE_TIMEOUT_SECONDS))

    async def answer(self, request: dict[str, Any]) -> Any:
        return await self._call("answer", request, timeout_seconds=RESPONSE_TIMEOUT_SECONDS)

    async def pause(self) -> None:
        await self._call("pause")

    async def resume(self) -> None:
        await self._call("resume")

    async def join_group(
        self,
        name: str,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str,
        timeout_seconds: float,
    ) -> None:
        arguments = (name, address, port, rank, world_size, backend, timeout_seconds)
        await self._call("join_group", *arguments, timeout_seconds=timeout_seconds)

    async def leave_group(self, name: str) -> None:
        await self._call("leave_group", name)

    async def begin_update(self) -> None:
        await self._call("begin_update")

    async def receive(
        self,
        group: str,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        version: int | None,
        timeout_seconds: float,
    ) -> None:
        arguments = (group, names, dtypes, shapes, version, timeout_seconds)
        await self._call("receive", *arguments, timeout_seconds=timeout_seconds)

    async def end_update(self) -> None:
        await self._call("end_update")

    async def load_folder(self, folder: str, version: int, timeout_seconds: float) -> None:
        await self._call("load_folder", folder, version, timeout_seconds, timeout_seconds=timeout_seconds)

    async def load_shared(self, message: str, version: int | None, timeout_seconds: float) -> None:
        await self._call("load_shared", message, version, timeout_seconds, timeout_seconds=timeout_seconds)

    async def weight_version(self) -> int:
        return int(await self._call("weight_version"))

    async def _kill(self) -> None:
        actor, self._actor = self._actor, None
        with contextlib.suppress(Exception):
            await asyncio.get_running_loop().run_in_executor(_CALLS, ray.kill, actor)

    def _create_actor(self) -> Any:
        spec = self._job.spec
        # On a cluster the engine has a pod of its own, whose fixed port Prometheus scrapes.
        where: dict[str, Any] = {"host": "0.0.0.0", "port": SGLANG_PORT}
        if self._local:
            where = {"host": "127.0.0.1", "port": None, "devices": of_engine(self.number)}
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        if not self._local:
            options["resources"] = {ENGINE_RESOURCE: 1}
        remote = ray.remote(Engine).options(**options)
        return remote.remote(spec, self.number, log_folder=self._log_folder, **where)

    async def _call(self, method: str, *arguments: Any, timeout_seconds: float = CONTROL_TIMEOUT_SECONDS) -> Any:
        if self._actor is None:
            raise EngineUnavailable("the engine has not been started")
        try:
            limit = timeout_seconds + CALL_SLACK_SECONDS
            return await asyncio.wait_for(self._awaited(method, arguments), limit)
        except RayTaskError as error:
            # Unwrapped: Ray puts an error of its own around what the engine raised.
            if isinstance(error.cause, EngineUnavailable | EngineRefused | ServerFailed):
                raise error.cause from None
            raise EngineUnavailable(f"{method}: {error}") from None
        except TimeoutError:
            raise EngineUnavailable(f"{method} was not answered within {timeout_seconds:.0f} s") from None
        except Exception as error:
            # A lost connection is a bare Exception in Ray Client, a RayError elsewhere.
            why = " ".join(str(error).split())[:300]
            raise EngineUnavailable(f"{method}: {type(error).__name__}: {why}") from None

    async def _awaited(self, method: str, arguments: tuple[Any, ...]) -> Any:
        actor = self._actor

        def call() -> Future[Any]:
            return cast(Future[Any], getattr(actor, method).remote(*arguments).future())

        # Off the event loop: while Ray Client tries to reconnect, the mere call blocks for half a minute.
        future = await asyncio.get_running_loop().run_in_executor(_CALLS, call)
        return await asyncio.wrap_future(future)
