"""python -m distill_operator: joins the parts, ends cleanly on SIGTERM, and with an error when any part dies.

There is nothing to save at the end: whatever was being done is found again in the cluster.
"""

import asyncio
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable

from distill_operator import health, logs
from distill_operator.cache import Cache
from distill_operator.cluster import ApiError, connect
from distill_operator.events import EventRecorder, now_utc
from distill_operator.health import Heart
from distill_operator.jobs import Jobs
from distill_operator.metrics import OperatorMetrics
from distill_operator.progress import ProgressPoller
from distill_operator.queue import Key, Retry, WorkQueue
from distill_operator.reconcile import Reconciler
from distill_operator.settings import InvalidSettings, Settings
from distill_operator.shared_reconcile import SharedReconciler
from distill_operator.watch import Watches

logger = logging.getLogger("distill_operator")

STOP_SECONDS = 3.0
"""For reconciles that are under way, and then for the watches."""
AGAIN_SECONDS = 5.0
"""After a resync that failed."""


async def operate(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises what ended it otherwise."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    cluster = await connect()
    cache, listed = Cache(cluster, settings.watch_namespaces), asyncio.Event()
    jobs, heart = Jobs(), Heart()

    async def handle(key: Key) -> float | None:
        began = time.perf_counter()
        try:
            again = await (reconciler if key.teacher is None else teachers).reconcile(key)
        except Retry:
            raise
        except Exception:
            metrics.reconciles["error"] += 1
            raise
        finally:
            metrics.durations.observe(time.perf_counter() - began)
        metrics.reconciles["ok"] += 1
        heart.beat()
        return again

    queue = WorkQueue(handle, concurrency=settings.concurrency)
    progress = ProgressPoller(settings.progress_seconds, queue.add)
    events = EventRecorder(cluster, os.environ.get("HOSTNAME", "distillation-operator"))
    reconciler = Reconciler(cache, settings, events, progress, jobs, now_utc)
    teachers = SharedReconciler(cache, settings, jobs, now_utc)
    metrics = OperatorMetrics(
        jobs, queue_depth=lambda: queue.depth, queue_retries=lambda: queue.retries, api_requests=cluster.requests
    )
    watches = Watches(settings, cache, queue.add)

    async def work() -> None:
        # Not before everything was seen once: what is not known yet would look like what is gone.
        await listed.wait()
        await queue.run()

    parts: dict[str, Callable[[], Awaitable[None]]] = {
        "queue": work,
        "resync": lambda: resync(cache, listed, settings, queue, jobs, heart),
        "progress": progress.run,
        "health": lambda: health.serve(settings, heart, metrics.registry()),
        "watches": watches.run,
    }
    tasks = [asyncio.ensure_future(part()) for part in parts.values()]
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        died = [(name, task) for name, task in zip(parts, tasks, strict=True) if task.done()]
        logger.info("stopping: %s", f"{died[0][0]} ended" if died else "asked to")
        watches.stop()
        queue.stop()
        await asyncio.wait([tasks[0], tasks[-1]], timeout=STOP_SECONDS)
    finally:
        for task in (*tasks, stopping):
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        await cluster.close()
    if died:
        error = ends[list(parts).index(died[0][0])]
        raise error if isinstance(error, Exception) else RuntimeError(f"{died[0][0]} ended by itself")


async def resync(
    cache: Cache, listed: asyncio.Event, settings: Settings, queue: WorkQueue, jobs: Jobs, heart: Heart
) -> None:
    """Lists everything again and again, looks at once at what that tells, and at all the rest before the next time."""
    while True:
        seconds = settings.resync_seconds
        try:
            news = await cache.sync()
            listed.set()
            for key in cache.store.owners() | set(jobs.all()) | news:
                # Spread, or a thousand jobs would be looked at while one waits that has changed.
                queue.add_after(key, 0.0 if key in news else random.random() * seconds)
            heart.beat()
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
