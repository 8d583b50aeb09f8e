"""A push of weights by broadcast: one process group of the trainer's rank 0 and all ranks of the engines.

The backend is NCCL, or gloo without accelerators. The trainer alone sees the answers of all engines, so it aborts a
group in which one fails.
"""

import asyncio
import contextlib
import datetime
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from distill_api.spec.job_spec import Spec
from distill_workers.engine.engine import EngineHandle, EngineRefused, EngineUnavailable
from distill_workers.serving.server import CLEAN_UP_ONLY, NCCL_ERRORS
from distill_workers.weight_sync.base import Engines, PushIncomplete, Sync, on_each
from distill_workers.weight_sync.buckets import BUCKET_BYTES, Bucket, Buffers, WeightSource

log = logging.getLogger(__name__)

PATIENCE_SECONDS, PATIENCE_RATIO = 30.0, 10.0
"""An engine may take so many seconds for its part in a broadcast, or so many times the longest before, if more."""
RELEASE_SECONDS = 10.0
"""An engine notices within so long that its group was aborted."""


LEAVE_SECONDS = 30.0
"""The members of a group leave it within so long, or it is aborted."""


@contextlib.contextmanager
def nccl_errors_end_the_group_alone() -> Iterator[None]:
    """Have a group that is created in the body end by itself, and not the process, when its NCCL fails.

    By default torch's watchdog ends a process whose peer is gone, which is right among the trainer's ranks: so the
    variable, which each group reads as it is made, is set for this one alone. The engines have it in their environment
    (serving/server.py).
    """
    before = os.environ.get(NCCL_ERRORS)
    os.environ[NCCL_ERRORS] = CLEAN_UP_ONLY
    try:
        yield
    finally:
        if before is None:
            del os.environ[NCCL_ERRORS]
        else:
            os.environ[NCCL_ERRORS] = before


class DistributedSync(Sync):
    """A push by broadcast. The group lasts while its members do; a new member or a failure makes a new group."""

    def __init__(
        self, spec: Spec, address: str, *, timeout_seconds: float = 300.0, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """`address` is this host, as the engines reach it."""
        self._engine_ranks = spec.rollout.tensor_parallel_size
        self._backend = "gloo" if spec.on_cpu else "nccl"
        self._device = torch.device("cpu") if spec.on_cpu else torch.device("cuda", torch.cuda.current_device())
        self._spec, self._address, self._timeout = spec, address, timeout_seconds
        self._buffers = Buffers(bucket_bytes, self._device)
        self._stream: torch.cuda.Stream | None = None
        self._thread = self._new_thread()
        self._group: Any = None
        self._name = ""
        self._longest = 0.0
        """Seconds of the slowest bucket in this group."""
        self._members: dict[int, tuple[EngineHandle, int]] = {}

    async def close(self) -> None:
        engines = {n: e for n, (e, incarnation) in self._members.items() if e.incarnation == incarnation}
        await self._disband(engines)
        self._thread.shutdown(wait=False)

    @contextlib.asynccontextmanager
    async def catch_up_channel(self, engines: Engines) -> AsyncIterator[Sync]:
        sync = DistributedSync(self._spec, self._address, timeout_seconds=self._timeout)
        sync._buffers = self._buffers
        try:
            await sync._form(engines)
            yield sync
        except BaseException:
            sync._abandon()
            raise
        await sync.close()

    def _abandon(self) -> None:
        """Abort the group, and with it a broadcast that nobody receives; do not wait for its thread."""
        if self._group is not None:
            self._abort(self._group)
        self._thread.shutdown(wait=False)

    async def _once(self, source: WeightSource, version: int, engines: Engines) -> None:
        # The pass is begun first: its first buckets are filled while the engines pause.
        async with contextlib.aclosing(source(self._buffers)) as buckets, self._paused(version, engines):
            if self._members != {n: (e, e.incarnation) for n, e in engines.items()}:
                await self._form(engines)
            await on_each(engines, lambda e: e.begin_update())
            async for bucket in buckets:
                await self._send(bucket, version if bucket.last else None, engines)
            await on_each(engines, lambda e: e.end_update())

    async def _send(self, bucket: Bucket, version: int | None, engines: Engines) -> None:
        names, shapes = bucket.names, bucket.shapes
        dtypes = [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]
        begin, patience = time.monotonic(), self._patience()
        # The slack lets engines whose group is aborted below answer before their timeout.
        limit = patience + RELEASE_SECONDS
        receiving = {
            id(engine): asyncio.ensure_future(engine.receive(self._name, names, dtypes, shapes, version, limit))
            for engine in engines.values()
        }
        sending = asyncio.get_running_loop().run_in_executor(self._thread, self._broadcast, bucket.flat)
        everyone = {sending, *receiving.values()}
        try:
            _, waiting = await asyncio.wait(everyone, timeout=patience, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                self._abort(self._group)
            await on_each(engines, lambda engine: receiving[id(engine)])
            # A broadcast that does not end even when its group is aborted is abandoned.
            if error := sending.exception() if sending.done() else TimeoutError(f"not done after {patience:.0f} s"):
                raise PushIncomplete({}, f"the broadcast failed: {error}")
        finally:
            for future in everyone:
                future.cancel()
        self._longest = max(self._longest, time.monotonic() - begin)

    def _patience(self) -> float:
        """Return the seconds that one bucket may take: the whole timeout for the first, which connects the group."""
        known = max(PATIENCE_SECONDS, PATIENCE_RATIO * self._longest)
        return min(known, self._timeout) if self._longest else self._timeout

    def _abort(self, group: Any) -> None:
        """Abort a group at once. Otherwise one engine that dies or hangs in a broadcast makes the others, and this
        host, wait for their bytes until the group's timeout."""
        threading.Thread(target=group.abort, daemon=True).start()
        self._group = None
        self._thread.shutdown(wait=False)
        self._thread = self._new_thread()

    def _new_thread(self) -> ThreadPoolExecutor:
        """Return an executor of one thread: broadcasts run in order, beside the event loop."""
        return ThreadPoolExecutor(1, thread_name_prefix="weights", initializer=self._enter_thread)

    def _enter_thread(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            # Another stream than that on which the next bucket is filled meanwhile.
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(self._stream)

    def _broadcast(self, flat: torch.Tensor) -> None:
        dist.broadcast(flat, src=0, group=self._group)
        if self._stream is not None:
            self._stream.synchronize()  # the buffer is filled again after this

    async def _form(self, engines: Engines) -> None:
        await self._disband({n: e for n, (e, i) in self._members.items() if n in engines and e.incarnation == i})
        world = 1 + self._engine_ranks * len(engines)
        name = f"weights-{uuid.uuid4().hex[:12]}"
        # Port 0: the kernel picks a free one. The store does not wait for the engines; the new group does.
        limit = datetime.timedelta(seconds=self._timeout)
        store = TCPStore(self._address, 0, world, is_master=True, timeout=limit, wait_for_workers=False)
        ranks = {number: 1 + place * self._engine_ranks for place, number in enumerate(engines)}
        numbers = {id(engine): number for number, engine in engines.items()}
        joining = asyncio.ensure_future(
            on_each(
                engines,
                lambda e: e.join_group(
                    name,
                    self._address,
                    store.port,
                    ranks[numbers[id(e)]],
                    world,
                    self._backend,
                    self._timeout,
                ),
            )
        )
        loop = asyncio.get_running_loop()
        own = loop.run_in_executor(self._thread, self._new_group, name, store, world, limit)
        outcome = await asyncio.gather(own, joining, return_exceptions=True)
        if not isinstance(outcome[0], BaseException):
            self._group, self._name = outcome[0], name
        if isinstance(outcome[1], BaseException):
            raise outcome[1]
        if isinstance(outcome[0], BaseException):
            raise PushIncomplete({}, f"the weight group could not be created: {outcome[0]}")
        self._members = {n: (e, e.incarnation) for n, e in engines.items()}
        log.info("weight group %s of %d ranks", name, world)

    def _new_group(self, name: str, store: TCPStore, world: int, limit: datetime.timedelta) -> Any:
        # torch has no public function for a second group with ranks outside the trainer's own.
        with nccl_errors_end_the_group_alone():
            group, _ = _new_process_group_helper(
                world,
                0,
                [],
                Backend(self._backend),
                PrefixStore(name, store),
                group_name=GroupName(name),
                backend_options=None,
                timeout=limit,
            )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        return group

    async def _disband(self, engines: Engines) -> None:
        name, group = self._name, self._group
        self._group, self._name, self._members, self._longest = None, "", {}, 0.0
        if not name:
            return

        async def leave(engine: EngineHandle) -> None:
            with contextlib.suppress(EngineUnavailable, EngineRefused):
                await engine.leave_group(name)

        # All at once: on one host a member of a NCCL group waits there for the others.
        await asyncio.gather(*map(leave, engines.values()), self._destroy(group))

    async def _destroy(self, group: Any) -> None:
        """Leave a group on this host; abort it if its members do not leave too."""
        if group is None:
            return
        leaving = asyncio.get_running_loop().run_in_executor(self._thread, dist.destroy_process_group, group)
        try:
            with contextlib.suppress(RuntimeError, ValueError):
                await asyncio.wait_for(leaving, LEAVE_SECONDS)
        except TimeoutError:
            log.warning("a weight group is aborted: its members did not leave it within %.0f s", LEAVE_SECONDS)
            self._abort(group)

    async def _clean_up(self, engines: Engines) -> None:
        async def end(engine: EngineHandle) -> None:
            with contextlib.suppress(EngineUnavailable, EngineRefused):
                await engine.end_update()

        await asyncio.gather(*map(end, engines.values()))
        await self._disband(engines)
