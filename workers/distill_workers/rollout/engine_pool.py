"""The fleet of rollout engines: hands out work, pushes weights, brings back what died.

An engine that fails is fenced off at once: what it was drawing is drawn again elsewhere, a restart runs in the
background, and it serves again only after a full push of the current weights. The job goes on with the others
meanwhile.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

from distill_api.job import DistillationJob
from distill_api.protocol import Variable
from distill_api.spec import WeightSync
from distill_workers.engine.ray_connection import RayConnection, RayUnreachable
from distill_workers.engine.ray_engine import RayEngine
from distill_workers.engine.request import EngineRefused, EngineUnavailable, Request, Response
from distill_workers.failures import EnginesLost
from distill_workers.metrics import Metrics
from distill_workers.rollout.live_spec import rollout_replicas
from distill_workers.rollout.request_batching import RequestBatcher
from distill_workers.rollout.scheduler import SlotScheduler
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.serving.server import ServerFailed, concurrency
from distill_workers.weight_sync.base import EngineLost, PushIncomplete, Sync
from distill_workers.weight_sync.broadcast import DistributedSync
from distill_workers.weight_sync.buckets import WeightSource
from distill_workers.weight_sync.disk import DiskSync
from distill_workers.weight_sync.shared_memory import SharedMemorySync, bucket_bytes

log = logging.getLogger(__name__)

HEALTH_SECONDS = 15.0
HEALTH_TIMEOUT_SECONDS = 20.0
LOST_SECONDS = 1800.0
"""Without any engine for so long, the attempt is given up."""
RETRY_SECONDS, MOST_RETRY_SECONDS = 5.0, 600.0
CATCH_UP_SECONDS, CATCH_UP_RATIO = 20.0, 3.0
"""Training waits while an engine that came back gets the weights: for so long, or so many times as long as the last
push to all took, if that is more."""
CLOSE_SECONDS = 20.0
"""For engines to end in; a pod that is asked to go has not for ever."""


class EnginePool:
    """All engines of a job, by number."""

    def __init__(self, job: DistillationJob, folder: RunFolder, metrics: Metrics) -> None:
        self._job, self._folder, self._metrics = job, folder, metrics
        self._ray = RayConnection(os.environ.get(Variable.RAY))
        self._wanted = job.spec.rollout.replicas
        """Engines that the job asks for by now."""
        self._numbers = itertools.count()
        self._engines: dict[int, RayEngine] = {}
        self._batchers: dict[int, RequestBatcher] = {}
        for _ in range(self._wanted):
            self._make()
        self._scheduler = SlotScheduler(concurrency(job.spec, job.spec.rollout.max_concurrent_requests))
        self._deserted_since: float | None = None
        """time.monotonic since which no engine serves."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._source: WeightSource | None = None
        self._version = 0
        self._push_seconds = 0.0
        """That the last push to all engines took."""
        # Held while weights change or are pushed: a restarted engine must not be given half a step.
        self._weights_lock = asyncio.Lock()
        self._model = ""

    def _make(self) -> int:
        """One engine more, not started. A number is never used again."""
        number = next(self._numbers)
        logs = str(self._folder.root / "logs") if self._ray.private else "/tmp"
        self._engines[number] = RayEngine(number, self._job, local=self._ray.private, log_folder=logs)
        self._batchers[number] = RequestBatcher(self._engines[number])
        return number

    async def start(self, model: str) -> None:
        """Attaches to Ray and starts every engine. They serve after the first `push`."""
        self._model = model
        spec = self._job.spec
        try:
            await self._ray.open()
        except RayUnreachable as error:
            raise EnginesLost(str(error)) from None
        self._sync: Sync
        if spec.trainer.weight_sync is WeightSync.DISTRIBUTED:
            self._sync = DistributedSync(spec, os.environ.get(Variable.POD_IP, "127.0.0.1"))
        elif self._ray.private and (size := bucket_bytes(Path(model))):
            self._sync = SharedMemorySync(bucket_bytes=size)
        else:
            self._sync = DiskSync(self._folder.sync, Path(model))
        begin = time.monotonic()
        results = await asyncio.gather(*(e.start(model) for e in self._engines.values()), return_exceptions=True)
        for number, result in zip(self._engines, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("engine %d did not start: %s", number, result)
        if all(isinstance(r, BaseException) for r in results):
            raise EnginesLost(f"no engine started; the first said: {results[0]}")
        for number, result in zip(self._engines, results, strict=True):
            if isinstance(result, BaseException):
                self._spawn(self._recover(number))
            else:
                self._scheduler.add(number)
        log.info("%d of %d engines up after %.1f s", len(self._scheduler.open), len(results), time.monotonic() - begin)
        self._spawn(self._watch())

    def count_placed(self) -> int:
        """Engines that hold accelerators: all but those that Ray has had no place for yet."""
        return sum(engine.placed for engine in self._engines.values())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_sync"):
            await self._sync.close()
        # Those that are lost end with the connection, at the latest.
        stopping = asyncio.gather(*(self._engines[n].stop() for n in self._scheduler.open), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping, CLOSE_SECONDS)
        await self._ray.close()

    async def sample(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, top_p: float, seeds: list[int]
    ) -> list[Response]:
        """One response for each seed, before those of `draw`: for what everything else waits for."""

        def one(seed: int) -> Awaitable[Response]:
            return self.generate(
                prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                urgent=True,
            )

        return await asyncio.gather(*map(one, seeds))

    async def generate(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        urgent: bool = False,
    ) -> Response:
        """One response, by the engine with least to do; by another if that one fails.

        Raises EngineRefused for a request that a living engine will not answer: another would not either.
        """
        request = Request(prompt_ids, seed, max_new_tokens, temperature, top_p)
        while True:
            number = await self._scheduler.acquire(urgent=urgent)
            engine = self._engines[number]
            incarnation = engine.incarnation
            try:
                return await self._batchers[number].generate(request)
            except EngineUnavailable as error:
                # A call that outlived a restart says nothing about the server that is there now.
                if engine.incarnation == incarnation:
                    self._lost(number, str(error))
            finally:
                self._scheduler.release(number)

    @asynccontextmanager
    async def updating_weights(self) -> AsyncIterator[None]:
        """Around an optimiser step and its push."""
        async with self._weights_lock:
            try:
                yield
            finally:
                self._scheduler.resume()

    async def drain(self) -> None:
        """Before a push: responses under way end under the weights they began with, unless they may be partial.
        No other begins until `weights_change` is left."""
        if not self._job.spec.rollout.partial:
            await self._scheduler.drain()

    async def push(self, source: WeightSource, version: int) -> None:
        """Gives all engines the weights `version`; inside `weights_change`. Those that come back later get them by
        another pass of `source`, which gives this version until the next `weights_change`."""
        self._source, self._version = source, version
        begin = time.monotonic()
        try:
            await self._sync.push(source, version, {n: self._engines[n] for n in self._scheduler.open})
        except EngineLost as error:
            for number, why in error.reasons.items():
                self._lost(number, why)
        self._push_seconds = time.monotonic() - begin

    def _lost(self, number: int, why: str) -> None:
        if number not in self._scheduler.open:
            return
        log.warning("engine %d is lost: %s", number, why)
        self._scheduler.remove(number)
        self._metrics.add("distill_engine_restarts")
        self._spawn(self._recover(number))

    async def _recover(self, number: int) -> None:
        """Starts an engine until it is up and has the current weights, or until it is one more than the job wants."""
        engine = self._engines[number]
        retry_seconds = RETRY_SECONDS
        while True:
            if len(self._engines) > self._wanted:
                log.info("engine %d goes: the job wants %d", number, self._wanted)
                del self._engines[number], self._batchers[number]
                return
            try:
                seconds = await engine.start(self._model)
            except (EngineUnavailable, EngineRefused, ServerFailed) as error:
                log.warning("engine %d did not start: %s", number, error)
                if not self._scheduler.open:
                    await self._ray.reconnect()
                await asyncio.sleep(RETRY_SECONDS)
                self._metrics.add("distill_engine_restarts")
                continue
            try:
                await self._catch_up(number)
                log.info("engine %d is back after %.1f s, with weights %d", number, seconds, self._version)
                return
            except (EngineLost, PushIncomplete, TimeoutError) as error:
                log.warning("engine %d did not get the weights: %s", number, error or "it hangs")
                # Each try may hold up training.
                await asyncio.sleep(retry_seconds)
                retry_seconds = min(2 * retry_seconds, MOST_RETRY_SECONDS)

    async def _catch_up(self, number: int) -> None:
        """Gives an engine that has started the current weights, and then requests. Raises EngineLost, Incomplete, and
        TimeoutError: the trainer, which can do nothing else meanwhile, is held up for a bounded time."""
        engines = {number: self._engines[number]}
        if self._source is None:
            self._scheduler.add(number)  # it takes part in the first push
            return
        async with self._sync.catch_up_channel(engines) as sync, self._weights_lock:
            async with asyncio.timeout(max(CATCH_UP_SECONDS, CATCH_UP_RATIO * self._push_seconds)):
                await sync.push(self._source, self._version, engines)
            self._scheduler.add(number)

    async def _watch(self) -> None:
        """A hung engine, or a lost head, shows in nothing else for a long time. One missed check may be mere load."""
        missed: Counter[int] = Counter()
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            self._count_deserted()
            if not self._ray.private:
                self._resize(await asyncio.to_thread(rollout_replicas, self._wanted))
            for number in self._scheduler.open.copy():
                try:
                    await self._engines[number].health(HEALTH_TIMEOUT_SECONDS)
                    missed[number] = 0
                except (EngineUnavailable, EngineRefused) as error:
                    missed[number] += 1
                    log.warning("engine %d, health check: %s", number, error)
                    if missed[number] == 2:
                        missed[number] = 0
                        self._lost(number, f"health check: {error}")

    def _resize(self, wanted: int) -> None:
        """New engines join once Ray has a place for them. Which of too many goes is KubeRay's choice: the one whose pod
        it takes is not started again."""
        self._wanted = wanted
        while len(self._engines) < wanted:
            number = self._make()
            log.info("engine %d joins: the job wants %d", number, wanted)
            self._spawn(self._recover(number))

    def _count_deserted(self) -> None:
        if self._scheduler.open:
            self._deserted_since = None
            return
        self._deserted_since = self._deserted_since or time.monotonic()
        if time.monotonic() - self._deserted_since > LOST_SECONDS:
            self._scheduler.fail(EnginesLost(f"no engine came back within {LOST_SECONDS:.0f} s"))

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine that returns None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
