"""The HTTP server of /healthz and /metrics. The process is healthy if each of its parts worked lately.

That the API server fails makes no part unhealthy: each tries again, and a new process could do no more.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from distill_operator.settings import Settings

Heart = Callable[[str], Callable[[], None]]
"""Takes the name of a part that begins. Returns what the part is to call again and again while it works."""


def no_heart(part: str) -> Callable[[], None]:
    """Return a heart that nobody listens to."""
    return lambda: None


class Hearts:
    """When each part of the process last showed that it works."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ages: dict[str, Callable[[], float]] = {}

    def heart(self, part: str) -> Callable[[], None]:
        """Return what a part is to call again and again from now on."""
        last = self._clock()

        def beat() -> None:
            nonlocal last
            last = self._clock()

        self.measure(part, lambda: self._clock() - last)
        return beat

    def measure(self, part: str, seconds: Callable[[], float]) -> None:
        """Add a part that knows itself for how long it has done nothing of what it should."""
        self._ages[part] = seconds

    def end(self, part: str) -> None:
        """Leave out a part that has ended as it should."""
        self._ages.pop(part, None)

    def ages_seconds(self) -> dict[str, float]:
        """Return by part the seconds since it last worked."""
        return {part: seconds() for part, seconds in self._ages.items()}


async def serve(settings: Settings, hearts: Hearts, registry: CollectorRegistry) -> None:
    """Serve until cancelled."""

    async def healthz(_: web.Request) -> web.Response:
        ages = hearts.ages_seconds()
        healthy = all(age < settings.unhealthy_after_seconds for age in ages.values())
        text = "".join(f"{part}: last success {age:.0f} s ago\n" for part, age in ages.items())
        return web.Response(text=text, status=200 if healthy else 503)

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
