"""Polls GET /progress of the trainers of running jobs on a timer of its own, and wakes a job whose answer changed.

So a reconcile never waits for a pod, and a job's status changes at most once per interval.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError

from distill_api.protocol import TRAINER_PORT, ProgressReport
from distill_operator.runtime.health_server import Heart, no_heart
from distill_operator.runtime.ownership import Key

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 2.0
MAX_ANSWER_BYTES = 256 * 1024
AT_ONCE = 32
"""Polls that are under way at one time."""
SILENCE_SECONDS = 60.0
"""For so long a trainer that does not answer is taken to have as many requests to its teachers as it reported last."""
PER_SECOND = 100
"""Polls a second; with more trainers than that, each is polled less often."""


@dataclass
class _Watched:
    pod: str
    """uid of the pod: another pod at the same address is another trainer."""
    url: str
    asking: bool = False
    body: bytes = b""
    """Body of the last answer, which often comes again."""
    report: ProgressReport | None = None
    silent_since: float | None = None


class ProgressPoller:
    """Polls one pod of each job: the one that was named last."""

    def __init__(
        self,
        interval_seconds: float,
        wake: Callable[[Key], None],
        clock: Callable[[], float] = time.monotonic,
        heart: Heart = no_heart,
    ) -> None:
        self._interval = interval_seconds
        self._wake = wake
        self._heart = heart
        self._clock = clock
        self._watched: dict[Key, _Watched] = {}
        self._fresh: asyncio.Queue[Key] = asyncio.Queue()
        self._slots = asyncio.Semaphore(AT_ONCE)

    def follow(self, key: Key, pod_uid: str, ip: str) -> None:
        """Poll this pod from now on; at once the first time, so that its answer is written with what woke the job."""
        known = self._watched.get(key)
        host = f"[{ip}]" if ":" in ip else ip
        url = f"http://{host}:{TRAINER_PORT}/progress"
        if known is None or (known.pod, known.url) != (pod_uid, url):
            self._watched[key] = _Watched(pod_uid, url)
            self._fresh.put_nowait(key)

    def pause(self, key: Key) -> None:
        """Stop to poll, but keep the last answer: the pod has ended, and its job may be read a little later."""
        if known := self._watched.get(key):
            known.url = ""

    def forget(self, key: Key) -> None:
        """Stop to poll a job that is gone."""
        self._watched.pop(key, None)

    def latest(self, key: Key, pod_uid: str) -> ProgressReport | None:
        """Return the last answer of a pod; None where it has not answered, or is another by now."""
        known = self._watched.get(key)
        return known.report if known and known.pod == pod_uid else None

    def is_silent(self, key: Key, pod_uid: str) -> bool:
        """Return whether a pod was asked, and has not answered for SILENCE_SECONDS."""
        known = self._watched.get(key)
        since = known.silent_since if known and known.pod == pod_uid else None
        return since is not None and self._clock() - since >= SILENCE_SECONDS

    async def run(self) -> None:
        """Poll until cancelled."""
        timeout, beat = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS), self._heart("progress")
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ask_new(session, tasks))
            while True:
                beat()
                due = [key for key, watched in self._watched.items() if watched.url]
                seconds = max(self._interval, len(due) / PER_SECOND)
                # Spread: a thousand answers at one moment would hold up everything else.
                for key in due:
                    await asyncio.sleep(seconds / len(due))
                    self._begin(session, tasks, key)
                if not due:
                    await asyncio.sleep(self._interval)

    async def _ask_new(self, session: aiohttp.ClientSession, tasks: asyncio.TaskGroup) -> None:
        while True:
            self._begin(session, tasks, await self._fresh.get())

    def _begin(self, session: aiohttp.ClientSession, tasks: asyncio.TaskGroup, key: Key) -> None:
        watched = self._watched.get(key)
        if watched and watched.url and not watched.asking:
            watched.asking = True
            tasks.create_task(self._ask(session, key, watched))

    async def _ask(self, session: aiohttp.ClientSession, key: Key, watched: _Watched) -> None:
        url = watched.url
        async with self._slots:
            body = await _fetch(session, url)
        watched.asking = False
        report = watched.report if body and body == watched.body else _read(body)
        if report is None:
            if watched.silent_since is None:
                logger.info("trainer of %s does not answer at %s", key, url)
                watched.silent_since = self._clock()
            if self._clock() - watched.silent_since < SILENCE_SECONDS or watched.report is None:
                return
            report, body = _idle(watched.report), None
        else:
            watched.silent_since = None
        watched.body = body or b""
        if report != watched.report:
            watched.report = report
            self._wake(key)


def _idle(report: ProgressReport) -> ProgressReport:
    """Return the report without requests to teachers: a Teacher must not keep servers for a trainer that hangs."""
    progress = report.progress.model_copy(update={"teachers": []})
    return report.model_copy(update={"progress": progress})


def _read(body: bytes | None) -> ProgressReport | None:
    try:
        # Trainers of a later release may say more.
        return ProgressReport.model_validate_json(body or b"", extra="ignore")
    except ValidationError:
        return None


async def _fetch(session: aiohttp.ClientSession, url: str) -> bytes | None:
    try:
        async with session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                return None
            body = await response.content.read(MAX_ANSWER_BYTES)
            while chunk := await response.content.read(MAX_ANSWER_BYTES - len(body) + 1):
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    return None
        return body
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None
