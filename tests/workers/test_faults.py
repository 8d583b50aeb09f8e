"""One run that everything happens to: teachers fail, crawl and die, an engine hangs. It goes on, and counts once."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from runs import Run, arithmetic, servers_of

from distill_api.job import parse_job
from distill_api.protocol import ExitCode, ExitReason, Variable
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer

STEPS, PROMPTS, SIBLINGS = 12, 8, 4
DEVICE_FULL = Path("/dev/full")
"""Whatever is written to it fails for lack of space."""


class Weather:
    """A proxy before a real teacher: it can refuse with 503, or be slow."""

    def __init__(self, upstream: int) -> None:
        self.port, self.storm, self.delay_seconds = reserve_port(), False, 0.0
        self.refused = self.answered = 0
        self._upstream = f"http://127.0.0.1:{upstream}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)

    async def _serve(self) -> None:
        self._session = ClientSession()
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/generate", self._forward)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _forward(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.storm:
            self.refused += 1
            return web.Response(status=503, text="overloaded")
        await asyncio.sleep(self.delay_seconds)
        async with self._session.post(
            f"{self._upstream}/generate", data=body, headers={"Content-Type": "application/json"}
        ) as answer:
            self.answered += 1
            return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")

    def close(self) -> None:
        async def end() -> None:
            await self._runner.cleanup()
            await self._session.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@pytest.fixture
def teachers(tmp_path: Path) -> Iterator[list[SGLangServer]]:
    spec = parse_job(arithmetic(tmp_path, "teachers")).spec
    servers = [
        SGLangServer(spec.teacher.model, spec, "teacher", port=reserve_port(), log=tmp_path / f"teacher-{n}.log")
        for n in range(2)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(300)
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.mark.timeout(600)
def test_a_run_outlives_its_teachers_troubles_and_a_hung_engine(teachers: list[SGLangServer], tmp_path: Path) -> None:
    weather = Weather(teachers[0].port)
    run = Run(
        arithmetic(
            tmp_path,
            "faults",
            rollout={"replicas": 2, "promptsPerStep": PROMPTS, "samplesPerPrompt": SIBLINGS},
            schedule={"steps": STEPS},
            evaluation=[],
        ),
        f"127.0.0.1:{weather.port},127.0.0.1:{teachers[1].port}",
        tmp_path,
    )
    try:
        run.wait_for_step(1)
        weather.storm = True
        run.wait_for_step(3)
        assert weather.refused, "the storm has hit nobody"
        weather.storm, weather.delay_seconds = False, 2.0
        run.wait_for_step(4)
        weather.delay_seconds = 0.0
        teachers[1].stop()  # SIGKILL of its whole process group
        answered = weather.answered
        run.wait_for_step(7)
        assert weather.answered >= answered + 2 * PROMPTS * SIBLINGS, "two whole steps are the other teacher's alone"
        hung = servers_of(tmp_path / "faults", engine=1)
        assert hung
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        outcome = run.wait(240)
        print(f"\nthe last steps, an engine hung, took {time.monotonic() - stopped:.0f} s")
    finally:
        weather.close()
        if run.process.poll() is None:
            run.kill()
    assert outcome.code == ExitCode.DONE, outcome.log
    # By its health check, or by a push if that is what it hangs in.
    assert "engine 1 is lost: " in (outcome.folder / "logs" / "rank-0.log").read_text()
    steps = outcome.lines("step")
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    assert [s["samples"] for s in steps] == [PROMPTS * SIBLINGS] * STEPS, "a lost sample is made again, once"


def test_a_volume_without_room_ends_the_attempt_by_its_name_and_is_worth_another(tmp_path: Path) -> None:
    """The exit report as well cannot be written there: that changes nothing."""
    folder = tmp_path / "full"
    folder.mkdir()
    for file in ("run.json", "exit.json"):
        (folder / f"{file}.tmp").symlink_to(DEVICE_FULL)
    outcome = Run(arithmetic(tmp_path, "full"), "127.0.0.1:1", tmp_path).wait(300)
    assert outcome.code == ExitCode.TEMPORARY, outcome.log
    assert outcome.report is not None and outcome.report.reason is ExitReason.VOLUME_FULL, outcome.log
    said = outcome.report.message
    assert said.startswith("the output volume is full: [Errno 28] No space left on device; remove what nobody needs")
    assert f"under {tmp_path} (" in said and "goes on from the last whole checkpoint" in said


def test_a_trainer_that_waits_for_ray_ends_at_once_when_it_is_asked_to(tmp_path: Path) -> None:
    """As the first process of its container it would not hear a signal that nothing handles."""
    run = Run(arithmetic(tmp_path, "early"), "127.0.0.1:1", tmp_path, **{Variable.RAY: "ray://127.0.0.1:1"})
    log = tmp_path / "early" / "logs" / "rank-0.log"
    end = time.monotonic() + 300
    while not log.exists():
        assert run.process.poll() is None and time.monotonic() < end, run.log()
        time.sleep(0.1)
    run.process.terminate()
    outcome = run.wait(20)
    assert outcome.code == ExitCode.TEMPORARY, outcome.log
    assert outcome.report is not None and outcome.report.reason is ExitReason.STOPPED
