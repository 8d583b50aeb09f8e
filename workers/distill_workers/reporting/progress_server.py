"""What trainer rank 0 serves while it runs: /progress, /samples, /metrics and /healthz."""

import asyncio
from collections.abc import Callable

from aiohttp import web

from distill_api.status import TeacherRequests
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.samples_file import newest_lines
from distill_workers.run_folder.run_folder import RunFolder


class ProgressServer:
    """An HTTP server of the newest report, the newest samples and all metrics."""

    def __init__(self, reporter: ProgressReporter, folder: RunFolder) -> None:
        self._reporter, self._folder = reporter, folder
        self._runner: web.AppRunner | None = None
        self.teachers: Callable[[], list[TeacherRequests]] = list
        """Returns the requests that the teachers have now."""

    async def start(self, port: int) -> None:
        """Listen on all addresses of this machine. Raises OSError where the port is taken."""
        app = web.Application()
        app.router.add_get("/progress", self._progress)
        app.router.add_get("/samples", self._samples)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "0.0.0.0", port).start()

    async def close(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def _progress(self, _: web.Request) -> web.Response:
        report = self._reporter.report
        now = report.progress.model_copy(update={"teachers": self.teachers()})
        text = report.model_copy(update={"progress": now}).model_dump_json(by_alias=True)
        return web.Response(text=text, content_type="application/json")

    async def _samples(self, _: web.Request) -> web.Response:
        # In a thread: the volume may be slow, and the loop must not wait for who looks on.
        lines = await asyncio.to_thread(newest_lines, self._folder.root)
        return web.Response(body=lines, content_type="application/x-ndjson")

    async def _metrics(self, _: web.Request) -> web.Response:
        body = self._reporter.metrics.text()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")
