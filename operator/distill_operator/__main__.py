"""python -m distill_operator: joins the parts, ends cleanly on SIGTERM, and with an error when any part dies.

There is nothing to save at the end: whatever was being done is found again in the cluster. With leader election a
process answers /healthz and /metrics, and does nothing else until the lease is its own; one that loses it ends.
"""

import asyncio
import logging
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from distill_api.status import Status
from distill_operator.distillationjob.controller import OURS, JobController, managed_by
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind
from distill_operator.metrics import OperatorMetrics
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.model.status import read_status
from distill_operator.runtime import health_server, logs
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.client import KubernetesCluster, connect
from distill_operator.runtime.errors import ApiError
from distill_operator.runtime.events import EventRecorder, now_utc
from distill_operator.runtime.health_server import Heartbeat
from distill_operator.runtime.leader_election import Election
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.watcher import Watches
from distill_operator.runtime.work_queue import Retry, WorkQueue
from distill_operator.settings import InvalidSettings, Settings
from distill_operator.teacher.controller import TeacherController
from distill_operator.teacher.teacher_registry import TeacherRegistry

logger = logging.getLogger("distill_operator")

STOP_SECONDS = 3.0
"""How long the end waits for reconciles that are under way, and for the watches."""
TEACHER_SECONDS = 2.0
"""After a job was reconciled, until its Teachers are."""
AGAIN_SECONDS = 5.0
"""Between a resync that failed and the next."""


async def operate(settings: Settings) -> None:
    """Run the operator until SIGTERM or SIGINT. Raises what ended it otherwise."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    cluster = await connect(OWNERSHIP.field_manager)
    cache, listed = Cache(cluster, OWNERSHIP, settings.watch_namespaces), asyncio.Event()
    jobs, teachers, heartbeat = JobRegistry(), TeacherRegistry(), Heartbeat()

    async def handle(key: Key) -> float | None:
        began = time.perf_counter()
        try:
            again = await controllers[key.kind].reconcile(key)
        except Retry:
            raise
        except Exception:
            metrics.reconciles["error"] += 1
            raise
        finally:
            metrics.durations.observe(time.perf_counter() - began)
        for teacher in jobs.teachers_of(key):
            # How many requests its jobs have for it may have changed.
            queue.add_after(teacher, TEACHER_SECONDS)
        metrics.reconciles["ok"] += 1
        heartbeat.beat()
        return again

    queue = WorkQueue(handle, concurrency=settings.concurrency)
    progress = ProgressPoller(settings.progress_seconds, queue.add)
    reporter = f"{OWNERSHIP.group}/operator"
    events = EventRecorder(cluster, reporter, os.environ.get("HOSTNAME", "distillation-operator"))
    controllers: dict[Kind, JobController | TeacherController] = {
        Kind.DISTILLATION_JOB: JobController(cache, settings, events, progress, jobs, now_utc),
        Kind.TEACHER: TeacherController(cache, settings, events, jobs, teachers, queue.add, now_utc),
    }
    metrics = OperatorMetrics(
        jobs,
        teachers,
        queue_depth=lambda: queue.depth,
        queue_retries=lambda: queue.retries,
        api_requests=cluster.requests,
    )
    watches = Watches(settings, cache, queue.add)

    async def reconciling() -> None:
        # Not before everything was listed once: what is not known yet would be taken for gone.
        await listed.wait()
        await queue.run()

    election = _election(settings, cluster)
    work: dict[str, Callable[[], Awaitable[None]]] = {
        "queue": reconciling,
        "resync": lambda: resync(cache, listed, settings, queue, jobs, heartbeat),
        "progress": progress.run,
        "watches": watches.run,
    }
    tasks: dict[str, asyncio.Future[Any]] = {
        "health": asyncio.ensure_future(health_server.serve(settings, heartbeat, metrics.registry()))
    }
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    try:
        if election is not None:
            tasks["lease"] = asyncio.ensure_future(election.acquire(heartbeat.beat))
            await asyncio.wait([*tasks.values(), stopping], return_when=asyncio.FIRST_COMPLETED)
            if tasks["lease"].done() and tasks["lease"].exception() is None:
                tasks["lease"] = asyncio.ensure_future(election.hold())
        if not stop.is_set() and not _died(tasks):
            tasks |= {name: asyncio.ensure_future(part()) for name, part in work.items()}
            await asyncio.wait([*tasks.values(), stopping], return_when=asyncio.FIRST_COMPLETED)
        died = _died(tasks)
        logger.info("stopping: %s", f"{died[0]} ended" if died else "asked to")
        watches.stop()
        queue.stop()
        if ending := [tasks[name] for name in ("queue", "watches") if name in tasks]:
            await asyncio.wait(ending, timeout=STOP_SECONDS)
    finally:
        for task in (*tasks.values(), stopping):
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        if election is not None:
            # No part of ours works any more.
            await election.release()
        await cluster.close()
    for name in died:
        task = tasks[name]
        error = None if task.cancelled() else task.exception()
        raise error if isinstance(error, Exception) else RuntimeError(f"{name} ended by itself")


def _died(tasks: Mapping[str, asyncio.Future[Any]]) -> list[str]:
    return [name for name, task in tasks.items() if task.done()]


def _election(settings: Settings, cluster: KubernetesCluster) -> Election | None:
    if not settings.leader_election:
        return None
    # A pod's name stays when its container starts again, the process does not.
    identity = f"{os.environ.get('HOSTNAME', 'distillation-operator')}_{uuid.uuid4()}"
    return Election(cluster, settings.lease_namespace, settings.lease_name, identity)


def fill_registry(cache: Cache, jobs: JobRegistry) -> None:
    """Record the statuses of all jobs before the first is reconciled: with half of them a Teacher would seem idle."""
    for key in cache.store.owners():
        raw = cache.owner(key) if key.kind is Kind.DISTILLATION_JOB else None
        if raw is not None and managed_by(raw) == OURS:
            jobs.put(key, raw, read_status(raw, Status), now_utc())


async def resync(
    cache: Cache, listed: asyncio.Event, settings: Settings, queue: WorkQueue, jobs: JobRegistry, heartbeat: Heartbeat
) -> None:
    """List everything again and again; reconcile what changed at once, and all the rest before the next list."""
    while True:
        seconds = settings.resync_seconds
        try:
            changed = await cache.sync()
            if not listed.is_set():
                fill_registry(cache, jobs)
            listed.set()
            for key in cache.store.owners() | set(jobs.snapshots()) | changed:
                # Spread, or a thousand jobs would be reconciled while one waits that has changed.
                queue.add_after(key, 0.0 if key in changed else random.random() * seconds)
            heartbeat.beat()
        except ApiError as error:
            logger.warning("resync failed: %s", error)
            seconds = min(seconds, AGAIN_SECONDS)
        await asyncio.sleep(seconds)


def main() -> None:
    try:
        settings = Settings.from_environment(os.environ)
    except InvalidSettings as error:
        sys.exit(f"distill-operator: {error}")
    logs.configure(settings)
    logger.info("starting: %s", settings)
    try:
        asyncio.run(operate(settings))
    except Exception:
        logger.exception("the operator ends")
        code = 1
    else:
        logger.info("stopped")
        code = 0
    logging.shutdown()
    # kopf's thread may be in a system call that nothing interrupts; there is nothing left to save.
    os._exit(code)


if __name__ == "__main__":
    main()
