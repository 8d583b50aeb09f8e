"""How far a run is: its newest report, for whoever asks, and the lines of its metrics."""

import asyncio
import time
from typing import Any

from distill_api.protocol import Phase, ProgressReport
from distill_api.status import Progress
from distill_workers.metrics import Metrics
from distill_workers.reporting.trackers import Trackers
from distill_workers.run_folder.run_folder import RunFolder


def utc(seconds: float | None = None) -> str:
    """Return a Unix time, by default now, as Kubernetes writes times (RFC 3339)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class ProgressReporter:
    """Holds the newest report; every change is also written to the run folder, which outlives the pod."""

    def __init__(self, folder: RunFolder, metrics: Metrics, total_steps: int, trackers: Trackers | None = None) -> None:
        self.report = ProgressReport(phase=Phase.STARTING, progress=Progress(total_steps=total_steps))
        self.metrics = metrics
        self._folder, self._trackers = folder, trackers

    def update(self, **changes: object) -> None:
        """Change fields of the report."""
        self.report = self.report.model_copy(update=changes)
        self._folder.replace("state.json", self.report.model_dump_json(by_alias=True, indent=1))

    def progress(self, **changes: object) -> None:
        """Change fields of the report's progress."""
        self.update(progress=self.report.progress.model_copy(update=changes))

    def line(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and to what spec.tracking asks for."""
        self._folder.append("metrics.jsonl", line)
        if self._trackers is not None:
            self._trackers.put(line)

    async def close(self) -> None:
        """Wait, but not for long, until the trackers have written what they were given."""
        if self._trackers is not None:
            await asyncio.to_thread(self._trackers.close)
