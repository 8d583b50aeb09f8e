"""The HTTP server of /healthz and /metrics. The process is healthy if a reconcile or a resync succeeded lately."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from distill_operator.settings import Settings


class Heartbeat:
    """The time of the last reconcile or resync that succeeded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def beat(self) -> None:
        """Record a success."""
        self._last = self._clock()

    def age_seconds(self) -> float:
        """Return the seconds since the last success."""
        return self._clock() - self._last


async def serve(settings: Settings, heartbeat: Heartbeat, registry: CollectorRegistry) -> None:
    """Serve until cancelled."""

    async def healthz(_: web.Request) -> web.Response:
        age = heartbeat.age_seconds()
        healthy = age < settings.unhealthy_after_seconds
        return web.Response(text=f"last success {age:.0f} s ago\n", status=200 if healthy else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async with AsyncExitStack() as stack:
        for path, handler, port in (
            ("/healthz", healthz, settings.health_port),
            ("/metrics", metrics, settings.metrics_port),
        ):
            app = web.Application()
            app.router.add_get(path, handler)
            runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            # None: IPv4 and IPv6, as a probe may come by either.
            await web.TCPSite(runner, None, port).start()
        await asyncio.Event().wait()
