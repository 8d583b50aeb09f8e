"""The pool of rollout engines: it schedules requests, pushes weights, and restarts engines that fail.

An engine that fails is fenced off at once: its requests are sent to others, a restart runs in the background, and it
serves again only after a full push of the current weights. The job goes on with the others meanwhile.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from distill_api.job import DistillationJob
from distill_api.protocol import Variable
from distill_workers.engine.ray_connection import RayConnection, RayUnreachable
from distill_workers.engine.ray_engine import RayEngine
from distill_workers.engine.request import EngineRefused, EngineUnavailable, Request, Response
from distill_workers.failures import EnginesLost
from distill_workers.metrics import Metrics
from distill_workers.rollout.live_spec import rollout_replicas
from distill_workers.rollout.request_batching import RequestBatcher
from distill_workers.rollout.scheduler import EngineAffinity, SlotScheduler
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.serving.server import ServerFailed, concurrency
from distill_workers.weight_sync.base import EngineLost, PushIncomplete, Sync
from distill_workers.weight_sync.buckets import WeightSource
from distill_workers.weight_sync.transport import choose_transport

T = TypeVar("T")
log = logging.getLogger(__name__)

HEALTH_SECONDS, HEALTH_TIMEOUT_SECONDS = 15.0, 20.0
LOST_SECONDS = 1800.0
"""The attempt is given up after so long without any engine."""
RETRY_SECONDS, MOST_RETRY_SECONDS = 5.0, 600.0
CATCH_UP_SECONDS, CATCH_UP_RATIO = 20.0, 3.0
"""Training waits while a restarted engine gets the weights: at most for the seconds, or for the ratio times what the
last push without a lost engine took, if that is more."""
CLOSE_SECONDS = 20.0
"""Engines have so long to stop: Kubernetes kills a pod that takes longer than its grace period."""


class EnginePool:
    """A pool of all engines of a job, which are known by their numbers."""

    stop_token_ids: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    """Ids that end a response: those besides the student's own files', and all."""

    def __init__(self, job: DistillationJob, folder: RunFolder, metrics: Metrics) -> None:
        self._job, self._folder, self._metrics = job, folder, metrics
        self._ray = RayConnection(os.environ.get(Variable.RAY))
        self._wanted = job.spec.rollout.replicas  # engines that the job asks for now (live_spec.py)
        self._numbers = itertools.count()
        self._engines: dict[int, RayEngine] = {}
        self._batchers: dict[int, RequestBatcher] = {}
        for _ in range(self._wanted):
            self._create_engine()
        self._scheduler = SlotScheduler(concurrency(job.spec, job.spec.rollout.max_concurrent_requests))
        self._no_engine_since: float | None = None
        """time.monotonic since when no engine serves; None while one does."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._source: WeightSource | None = None
        self._version, self._model, self._push_seconds = 0, "", 0.0  # of the last push without a lost engine
        # Held while weights change or are pushed: a restarted engine must not get the weights of half a step.
        self._weights_lock = asyncio.Lock()

    def _create_engine(self) -> int:
        """Add an engine that is not started, and return its number, which is never used again."""
        number, local = next(self._numbers), self._ray.private
        logs = str(self._folder.root / "logs") if local else "/tmp"
        self._engines[number] = RayEngine(number, self._job, local=local, log_folder=logs)
        self._batchers[number] = RequestBatcher(self._engines[number])
        return number

    async def start(self, model: str) -> None:
        """Connect to Ray and start every engine; they serve after the first `push`. Raises EnginesLost."""
        self._model, spec = model, self._job.spec
        try:
            await self._ray.open()
        except RayUnreachable as error:
            raise EnginesLost(str(error)) from None
        address = os.environ.get(Variable.POD_IP, "127.0.0.1")
        self._sync: Sync = choose_transport(
            spec, Path(model), self._folder.sync, address=address, one_machine=self._ray.private
        )
        begin = time.monotonic()
        results = await asyncio.gather(*(e.start(model) for e in self._engines.values()), return_exceptions=True)
        failed = {n: r for n, r in zip(self._engines, results, strict=True) if isinstance(r, BaseException)}
        for number, why in failed.items():
            log.warning("engine %d did not start: %s", number, why)
        if len(failed) == len(results):
            raise EnginesLost(f"no engine started; the error of the first: {results[0]}")
        for number in self._engines:
            if number in failed:
                self._spawn(self._recover(number))
            else:
                self._scheduler.add(number)
        log.info("%d of %d engines up after %.1f s", len(self._scheduler.open), len(results), time.monotonic() - begin)
        self._spawn(self._check_health())

    @property
    def serving(self) -> list[int]:
        """The numbers of the engines that are given requests."""
        return sorted(self._scheduler.open)

    def count_placed(self) -> int:
        """Return the number of engines that hold accelerators: all that Ray has placed on a worker."""
        return sum(engine.placed for engine in self._engines.values())

    async def close(self) -> None:
        """Stop all engines and disconnect from Ray."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_sync"):
            await self._sync.close()
        # Engines that are lost end with the connection, at the latest. A request that ends with its engine loses none.
        serving, self._scheduler.open = self._scheduler.open, set()
        stopping = asyncio.gather(*(self._engines[n].stop() for n in serving), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping, CLOSE_SECONDS)
        await self._ray.close()

    async def sample(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, top_p: float, seeds: list[int]
    ) -> list[Response]:
        """Return one response for each seed. The requests are urgent: they go before those of training."""
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        return await asyncio.gather(*(self.generate(prompt_ids, **how, seed=seed, urgent=True) for seed in seeds))

    async def generate(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        urgent: bool = False,
        affinity: EngineAffinity | None = None,
    ) -> Response:
        """Return one response of the least busy engine, or of the one of `affinity`; of another if that one fails.
        Raises EngineRefused for a request that a running engine will not answer: no other would."""
        request = Request(prompt_ids, seed, max_new_tokens, temperature, top_p, self.stop_token_ids)
        return await self._call(lambda n: self._batchers[n].generate(request), urgent, affinity)

    async def answer(self, request: dict[str, Any], *, affinity: EngineAffinity | None = None) -> Any:
        """Return the JSON of the answer of SGLang's /generate to the body of a request, which is urgent: to a teacher's
        scoring, or for a response that the teacher writes. Engines are chosen, and fail, as in `generate`."""
        return await self._call(lambda n: self._engines[n].answer(request), True, affinity)

    async def _call(self, work: Callable[[int], Awaitable[T]], urgent: bool, affinity: EngineAffinity | None) -> T:
        """Return what `work` does in a slot of the engine of a number; it is done again if that engine fails."""
        while True:
            number = await self._scheduler.acquire(urgent=urgent, affinity=affinity)
            incarnation = (engine := self._engines[number]).incarnation
            try:
                return await work(number)
            except EngineUnavailable as error:
                # A call that was made before a restart says nothing about the server that runs now.
                if engine.incarnation == incarnation:
                    self._mark_lost(number, str(error))
            finally:
                self._scheduler.release(number)

    @contextlib.asynccontextmanager
    async def updating_weights(self) -> AsyncIterator[None]:
        """Hold back restarted engines during an optimiser step and its push."""
        async with self._weights_lock:
            try:
                yield
            finally:
                self._scheduler.resume()

    async def drain(self) -> None:
        """Wait, before a push, until responses in flight have ended under the weights that they began with.

        No other response begins until `updating_weights` is left. Does nothing with rollout.partial.
        """
        if not self._job.spec.rollout.partial:
            await self._scheduler.drain()

    async def push(self, source: WeightSource, version: int) -> None:
        """Push the weights `version` to all engines; called inside `updating_weights`.

        An engine that restarts later gets them by another pass of `source`, which yields this version until the next
        `updating_weights`.
        """
        self._source, self._version = source, version
        begin = time.monotonic()
        try:
            await self._sync.push(source, version, {n: self._engines[n] for n in self._scheduler.open})
        except EngineLost as error:
            for number, why in error.reasons.items():
                self._mark_lost(number, why)
        else:  # the time that a lost engine took is no measure of a push
            self._push_seconds = time.monotonic() - begin

    def _mark_lost(self, number: int, why: str) -> None:
        if number not in self._scheduler.open:
            return
        log.warning("engine %d is lost: %s", number, why)
        self._scheduler.remove(number)
        self._metrics.add("distill_engine_restarts")
        self._spawn(self._recover(number))

    async def _recover(self, number: int) -> None:
        """Restart an engine until it runs and has the current weights, or remove it if the job wants fewer engines."""
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
                await asyncio.sleep(retry_seconds)  # training may wait for each try
                retry_seconds = min(2 * retry_seconds, MOST_RETRY_SECONDS)

    async def _catch_up(self, number: int) -> None:
        """Push the current weights to an engine that has started, and open it for requests.

        Raises EngineLost, PushIncomplete, and TimeoutError: training waits meanwhile, so the time is bounded.
        """
        engines = {number: self._engines[number]}
        if self._source is None:
            self._scheduler.add(number)  # the first push is yet to come, and includes it
            return
        async with self._sync.catch_up_channel(engines) as sync, self._weights_lock:
            async with asyncio.timeout(max(CATCH_UP_SECONDS, CATCH_UP_RATIO * self._push_seconds)):
                await sync.push(self._source, self._version, engines)
            self._scheduler.add(number)

    async def _check_health(self) -> None:
        """Check every engine for ever: a hung engine, or a lost Ray head, may show in nothing else for a long time."""
        missed: Counter[int] = Counter()
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            self._fail_without_engines()
            if not self._ray.private:
                self._resize(await asyncio.to_thread(rollout_replicas, self._wanted))
            # Beside each other, as the timeouts of several that hang would add up.
            await asyncio.gather(*(self._check_engine(number, missed) for number in self._scheduler.open.copy()))

    async def _check_engine(self, number: int, missed: Counter[int]) -> None:
        """One missed check may be due to load; the second in a row makes the engine lost."""
        try:
            await self._engines[number].health(HEALTH_TIMEOUT_SECONDS)
            missed[number] = 0
        except (EngineUnavailable, EngineRefused) as error:
            missed[number] += 1
            log.warning("engine %d, health check: %s", number, error)
            if missed[number] % 2 == 0:
                self._mark_lost(number, f"health check: {error}")

    def _resize(self, wanted: int) -> None:
        """Set the number of engines that the job wants.

        New engines join once Ray has a worker for them. KubeRay chooses which of too many goes: the engine whose pod it
        takes is not restarted.
        """
        self._wanted = wanted
        while len(self._engines) < wanted:
            number = self._create_engine()
            log.info("engine %d joins: the job wants %d", number, wanted)
            self._spawn(self._recover(number))

    def _fail_without_engines(self) -> None:
        """Fail all waiting requests once no engine has served for LOST_SECONDS."""
        if self._scheduler.open:
            self._no_engine_since = None
            return
        self._no_engine_since = self._no_engine_since or time.monotonic()
        if time.monotonic() - self._no_engine_since > LOST_SECONDS:
            self._scheduler.fail(EnginesLost(f"no engine came back within {LOST_SECONDS:.0f} s"))

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine that returns None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
