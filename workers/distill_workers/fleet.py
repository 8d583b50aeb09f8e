"""The fleet of rollout engines: hands out work, pushes weights, brings back what died.

An engine that fails is fenced off at once: what it was drawing is drawn again elsewhere, a restart runs in the
background, and it serves again only after a full push of the current weights. The job goes on with the others
meanwhile.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from distill_api.job import DistillationJob
from distill_api.spec import WeightSync
from distill_api.wire import Variable
from distill_workers.attach import RayUnreachable, attach, detach, engine_actors, reattach
from distill_workers.engine import EngineRefused, EngineUnavailable, Response
from distill_workers.failures import EnginesLost
from distill_workers.metrics import Metrics
from distill_workers.runfolder import RunFolder
from distill_workers.server import ServerFailed
from distill_workers.weights import DiskSync, DistributedSync, EngineLost

log = logging.getLogger(__name__)

HEALTH_SECONDS = 15.0
HEALTH_TIMEOUT_SECONDS = 20.0
LOST_SECONDS = 1800.0
"""Without any engine for so long, the attempt is given up."""
RETRY_SECONDS = 5.0


class Fleet:
    """All engines of a job, by number."""

    def __init__(self, job: DistillationJob, folder: RunFolder, metrics: Metrics) -> None:
        self._job, self._folder, self._metrics = job, folder, metrics
        self._address = os.environ.get(Variable.RAY)
        self._engines = {
            n: engine
            for n, engine in enumerate(
                engine_actors(
                    job.spec.rollout.replicas,
                    job,
                    local=self._address is None,
                    log_folder="/tmp" if self._address else str(folder.root / "logs"),
                )
            )
        }
        self._load = dict.fromkeys(self._engines, 0)
        self._serving: set[int] = set()
        self._change = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._attaching = asyncio.Lock()
        self._weights: Sequence[tuple[str, torch.Tensor]] = ()
        self._version = 0
        # Held while weights change or are pushed: a restarted engine must not be given half a step.
        self._weights_lock = asyncio.Lock()
        self._model = ""

    async def start(self, model: str) -> None:
        """Attaches to Ray and starts every engine. They serve after the first `push`."""
        self._model = model
        spec = self._job.spec
        try:
            await asyncio.to_thread(attach, self._address)
        except RayUnreachable as error:
            raise EnginesLost(str(error)) from None
        self._sync: DiskSync | DistributedSync
        if spec.trainer.weight_sync is WeightSync.DISK:
            self._sync = DiskSync(self._folder.sync, Path(model))
        else:
            self._sync = DistributedSync(spec, os.environ.get(Variable.POD_IP, "127.0.0.1"))
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
                self._serving.add(number)
        log.info("%d of %d engines up after %.1f s", len(self._serving), len(results), time.monotonic() - begin)
        self._spawn(self._watch())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_sync"):
            await self._sync.close()
        await asyncio.gather(*(e.stop() for e in self._engines.values()), return_exceptions=True)
        await asyncio.to_thread(detach)

    async def generate(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, top_p: float, seeds: list[int]
    ) -> list[Response]:
        """One response for each seed, by the engine with least to do; by another if that one fails.

        Raises EngineRefused for a request that a living engine will not answer: another would not either.
        """
        while True:
            number = await self._pick()
            self._load[number] += len(seeds)
            engine = self._engines[number]
            incarnation = engine.incarnation
            try:
                return await engine.generate(prompt_ids, seeds, max_new_tokens, temperature, top_p)
            except EngineUnavailable as error:
                # A call that outlived a restart says nothing about the server that is there now.
                if engine.incarnation == incarnation:
                    self._lost(number, str(error))
            finally:
                self._load[number] -= len(seeds)

    @asynccontextmanager
    async def weights_change(self) -> AsyncIterator[None]:
        """Around a train step and its push."""
        async with self._weights_lock:
            yield

    async def push(self, weights: Sequence[tuple[str, torch.Tensor]], version: int) -> None:
        """Gives all engines new weights; inside `weights_change`. The tensors are kept for engines that come back."""
        self._weights, self._version = weights, version
        await self._push(self._serving.copy())

    async def _push(self, numbers: Iterable[int]) -> None:
        engines = {n: self._engines[n] for n in numbers}
        if not engines:
            return
        try:
            await self._sync.push(self._weights, self._version, engines)
        except EngineLost as error:
            for number, why in error.reasons.items():
                self._lost(number, why)
        async with self._change:
            self._change.notify_all()

    async def _pick(self) -> int:
        async with self._change:
            try:
                # Not asyncio.wait_for: its extra task would let an engine be lost between the wake-up and the choice.
                async with asyncio.timeout(LOST_SECONDS):
                    await self._change.wait_for(lambda: bool(self._serving))
            except TimeoutError:
                raise EnginesLost(f"no engine came back within {LOST_SECONDS:.0f} s") from None
            return min(self._serving, key=lambda n: self._load[n])

    def _lost(self, number: int, why: str) -> None:
        if number not in self._serving:
            return
        log.warning("engine %d is lost: %s", number, why)
        self._serving.discard(number)
        self._spawn(self._recover(number))

    async def _recover(self, number: int) -> None:
        """Starts an engine until it is up, and gives it the current weights."""
        engine = self._engines[number]
        while True:
            self._metrics.add("distill_engine_restarts")
            try:
                seconds = await engine.start(self._model)
                break
            except (EngineUnavailable, EngineRefused, ServerFailed) as error:
                log.warning("engine %d did not start: %s", number, error)
                if not self._serving:
                    await self._reattach()
                await asyncio.sleep(RETRY_SECONDS)
        async with self._weights_lock:
            self._serving.add(number)
            await self._push([number])
        log.info("engine %d is back after %.1f s, with weights %d", number, seconds, self._version)

    async def _reattach(self) -> None:
        """Without any engine the head may be gone, and every actor with it."""
        if self._address is None or self._attaching.locked():
            return
        async with self._attaching:
            try:
                await asyncio.to_thread(reattach, self._address)
            except RayUnreachable as error:
                log.warning("%s", error)

    async def _watch(self) -> None:
        """A hung engine, or a lost head, shows in nothing else for a long time. One missed check may be mere load."""
        missed = dict.fromkeys(self._engines, 0)
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            for number in self._serving.copy():
                try:
                    await self._engines[number].health(HEALTH_TIMEOUT_SECONDS)
                    missed[number] = 0
                except (EngineUnavailable, EngineRefused) as error:
                    missed[number] += 1
                    log.warning("engine %d, health check: %s", number, error)
                    if missed[number] == 2:
                        missed[number] = 0
                        self._lost(number, f"health check: {error}")

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine that returns None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
