"""python -m distill_operator: joins the parts, ends cleanly on SIGTERM, and with an error when any part dies.

There is nothing to save at the end: whatever was being done is found again in the cluster. With leader election a
process answers /healthz and /metrics, and does nothing else until the lease is its own; one that loses it to another
ends, and one that an outage cost it begins anew.
"""

import asyncio
import logging
import os
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
from distill_operator.model.ownership import OWNERSHIP, WITH_KUEUE
from distill_operator.model.status import read_status
from distill_operator.resync import Resync
from distill_operator.runtime import health_server, logs
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.client import KubernetesCluster, connect
from distill_operator.runtime.events import EventRecorder, now_utc
from distill_operator.runtime.health_server import Hearts
from distill_operator.runtime.leader_election import Election, LeaseNotRenewed
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.watcher import Watches
from distill_operator.runtime.work_queue import Retry, WorkQueue
from distill_operator.selected_namespaces import SelectedNamespaces
from distill_operator.settings import InvalidSettings, Settings
from distill_operator.teacher.controller import TeacherController
from distill_operator.teacher.teacher_registry import TeacherRegistry

logger = logging.getLogger("distill_operator")

IDENTITY = f"{os.environ.get('HOSTNAME', 'distillation-operator')}_{uuid.uuid4()}"
"""The holder of a lease: this process. A pod's name stays when its container starts again, whose old work may not have
ended; what an outage made a process begin anew has, so that it goes on with the lease that it has left."""
STOP_SECONDS = 3.0
"""How long the end waits for reconciles that are under way, and for the watches."""
TEACHER_SECONDS = 2.0
"""After a job was reconciled, until its Teachers are."""


async def operate(settings: Settings) -> None:
    """Run the operator until SIGTERM or SIGINT. Raises what ended it otherwise."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    cluster = await connect(OWNERSHIP.field_manager)
    cache = Cache(cluster, WITH_KUEUE if settings.kueue else OWNERSHIP, settings.watch_namespaces)
    jobs, teachers, hearts = JobRegistry(), TeacherRegistry(), Hearts()

    async def handle(key: Key) -> float | None:
        if not resync.may_reconcile(key):
            # Its namespace wakes it once it is listed.
            return None
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
        return again

    queue = WorkQueue(handle, concurrency=settings.concurrency)
    progress = ProgressPoller(settings.progress_seconds, queue.add, heart=hearts.heart)
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
        queue_conflicts=lambda: queue.conflicts,
        watch_restarts=lambda: watches.restarts,
        namespaces_failing=lambda: len(resync.failing) + (selected is not None and selected.failing),
        api_requests=cluster.requests,
    )
    watches = Watches(settings, cache, queue.add, heart=hearts.heart, excused=lambda: resync.all_failing)
    resync = Resync(
        cache,
        settings.resync_seconds,
        known=lambda: cache.store.owners() | set(jobs.snapshots()) | set(teachers.snapshots()),
        on_listed=lambda namespace: fill_registry(cache, jobs, namespace),
        wake=queue.add_after,
        renew_watches=watches.renew,
        heart=hearts.heart,
        end_heart=hearts.end,
    )
    election = _election(settings, cluster, hearts)
    work: dict[str, Callable[[], Awaitable[None]]] = {
        "queue": queue.run,
        "resync": resync.run,
        "progress": progress.run,
        "watches": watches.run,
    }
    selected: SelectedNamespaces | None = None
    if settings.watch_namespace_selector:
        cache.namespaces = settings.watch_namespaces
        selected = SelectedNamespaces(
            cluster,
            settings.watch_namespace_selector,
            settings.watch_namespaces,
            turn_to=resync.turn_to,
            heart=hearts.heart,
        )
        work["namespaces"] = selected.run
    tasks: dict[str, asyncio.Future[Any]] = {
        "health": asyncio.ensure_future(health_server.serve(settings, hearts, metrics.registry()))
    }
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    try:
        if election is not None:
            tasks["lease"] = asyncio.ensure_future(election.acquire())
            await asyncio.wait([*tasks.values(), stopping], return_when=asyncio.FIRST_COMPLETED)
            if tasks["lease"].done() and tasks["lease"].exception() is None:
                tasks["lease"] = asyncio.ensure_future(election.hold())
        if not stop.is_set() and not _died(tasks):
            hearts.measure("reconciles", lambda: queue.busy_seconds)
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


def _election(settings: Settings, cluster: KubernetesCluster, hearts: Hearts) -> Election | None:
    if not settings.leader_election:
        return None
    return Election(cluster, settings.lease_namespace, settings.lease_name, IDENTITY, heart=hearts.heart)


def fill_registry(cache: Cache, jobs: JobRegistry, namespace: str) -> None:
    """Record the statuses of a namespace's jobs, or of all without one, before the first of them is reconciled.

    With half of them a Teacher would seem idle.
    """
    for key in cache.store.owners():
        if key.kind is not Kind.DISTILLATION_JOB or namespace not in ("", key.namespace):
            continue
        raw = cache.owner(key)
        if raw is not None and managed_by(raw) == OURS:
            jobs.put(key, raw, read_status(raw, Status), now_utc())


def run(settings: Settings) -> int:
    """Run the operator, anew after each outage that cost it its lease. Return the exit code."""
    while True:
        try:
            asyncio.run(operate(settings))
        except LeaseNotRenewed as error:
            # Nothing of it is left that works; it begins as any other candidate.
            logger.warning("standing for election again: %s", error)
        except Exception:
            logger.exception("the operator ends")
            return 1
        else:
            logger.info("stopped")
            return 0


def main() -> None:
    try:
        settings = Settings.from_environment(os.environ)
    except InvalidSettings as error:
        sys.exit(f"distill-operator: {error}")
    logs.configure(settings)
    logger.info("starting: %s", settings)
    code = run(settings)
    logging.shutdown()
    # kopf's thread may be in a system call that nothing interrupts; there is nothing left to save.
    os._exit(code)


if __name__ == "__main__":
    main()
