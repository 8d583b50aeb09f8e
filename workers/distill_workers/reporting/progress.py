"""What the trainer tells the world while it runs: /progress, /samples, /metrics and /healthz of rank 0."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from distill_api.protocol import Phase, ProgressReport
from distill_api.status import Progress, TeacherRequests
from distill_workers.metrics import Metrics
from distill_workers.reporting.rollout_page import newest_lines
from distill_workers.reporting.trackers import Trackers
from distill_workers.run_folder.run_folder import RunFolder


def utc(seconds: float | None = None) -> str:
    """RFC 3339, as Kubernetes writes times."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Reporter:
    """Holds the newest report; every change is also written to the run folder, which outlives the pod."""

    def __init__(self, folder: RunFolder, metrics: Metrics, total_steps: int, trackers: Trackers | None = None) -> None:
        self.report = ProgressReport(phase=Phase.STARTING, progress=Progress(total_steps=total_steps))
        self.metrics = metrics
        self._folder, self._trackers = folder, trackers
        self._runner: web.AppRunner | None = None
        self.teachers: Callable[[], list[TeacherRequests]] = list
        """What they have to do at this moment."""

    def update(self, **changes: object) -> None:
        self.report = self.report.model_copy(update=changes)
        self._folder.replace("state.json", self.report.model_dump_json(by_alias=True, indent=1))

    def progress(self, **changes: object) -> None:
        self.update(progress=self.report.progress.model_copy(update=changes))

    def line(self, line: dict[str, Any]) -> None:
        """One more line of metrics.jsonl, and of what spec.tracking asks for."""
        self._folder.append("metrics.jsonl", line)
        if self._trackers is not None:
            self._trackers.put(line)

    async def serve(self, port: int) -> None:
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
        if self._trackers is not None:
            await asyncio.to_thread(self._trackers.close)

    async def _progress(self, _: web.Request) -> web.Response:
        now = self.report.progress.model_copy(update={"teachers": self.teachers()})
        report = self.report.model_copy(update={"progress": now})
        return web.Response(text=report.model_dump_json(by_alias=True), content_type="application/json")

    async def _samples(self, _: web.Request) -> web.Response:
        # In a thread: the volume may be slow, and the loop must not wait for who looks on.
        lines = await asyncio.to_thread(newest_lines, self._folder.root)
        return web.Response(body=lines, content_type="application/x-ndjson")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")
