"""`distill run` supervises its processes: what it hears, what it says in seconds, and that nothing outlives it."""

import asyncio
import contextlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import MODELS, REPO

from distill_api.protocol import ExitCode
from distill_workers import loopback
from distill_workers.failures import ConfigurationError
from distill_workers.local.evaluate import while_served
from distill_workers.serving.ports import reserve_port
from distill_workers.teacher.local_servers import TeacherServers

PROGRAM = """
import json, sys
from distill_cli.main import main
from distill_workers.local import run
from distill_workers.teacher import local_servers

trainer, teacher, *arguments = sys.argv[1:]
run.TRAINER = (sys.executable, "-c", trainer)
run.POLL_SECONDS = 0.05

class Server(local_servers.SGLangServer):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._command = ([sys.executable, "-c", teacher], {})

local_servers.SGLangServer = Server
sys.exit(main(arguments))
"""
"""`distill run` with other programs in place of the trainer and of each teacher's server."""

WAITS = "import time; time.sleep(600)"
TRAINER = """
import http.server, json, os, pathlib, signal, sys, threading, time

def stop(number, frame):
    report = json.dumps({"reason": "Stopped", "message": "asked"})
    pathlib.Path(os.environ["DISTILL_TERMINATION_LOG"]).write_text(report)
    os._exit(75)

class Progress(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"phase": "Training", "progress": {"step": 3, "totalSteps": 40}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): pass

signal.signal(signal.SIGTERM, stop)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["DISTILL_PORT"])), Progress)
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:  # a signal that comes just before one long sleep would be heard at its end
    time.sleep(0.1)
"""
"""A trainer that says it is at step 3, and stops when it is asked to."""


class Started:
    """A `distill run` whose output is collected."""

    def __init__(
        self, output: Path, trainer: str, teacher: str, *, before: tuple[str, ...] = (), **environment: str
    ) -> None:
        arguments = ["run", "-f", str(REPO / "examples" / "arithmetic-cpu.yaml"), "--volume", f"/models={MODELS}"]
        arguments += ["--volume", f"/output={output}", "--set", "metadata.name=supervised"]
        self.folder = output / "supervised"
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", PROGRAM, trainer, teacher, *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # These tests may themselves run under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    def children(self) -> set[int]:
        return descendants(self.process.pid)

    def wait_for(self, text: str) -> None:
        """Wait for a line of its output with this text."""
        assert self.process.stdout is not None
        assert any(text in line for line in self.process.stdout)

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, within so many seconds."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not end: {self.process.communicate()}") from None
        assert "Traceback" not in out + err
        return self.process.returncode, out, err


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # gone meanwhile
            for child in map(int, task.read_text().split()):
                found |= {child} | descendants(child)
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_process_outlives_a_distill_run_that_is_killed(tmp_path: Path) -> None:
    run = Started(tmp_path, TRAINER, WAITS)
    wait_until(lambda: len(run.children()) == 2)
    there = run.children()
    run.process.kill()
    run.end()
    wait_until(lambda: not any(map(runs, there)), 20)


def test_sighup_stops_a_run_as_sigterm_does_also_if_it_comes_twice(tmp_path: Path) -> None:
    run = Started(tmp_path, TRAINER, WAITS)
    run.wait_for("step 3/40")
    for _ in range(2):
        run.process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    code, _, err = run.end()
    assert code == ExitCode.TEMPORARY and "stopped before the first step" in err


def test_nohup_keeps_a_run_from_the_end_of_its_terminal(tmp_path: Path) -> None:
    run = Started(tmp_path, TRAINER, WAITS, before=("nohup",))
    run.wait_for("step 3/40")
    run.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert run.process.poll() is None
    run.process.terminate()
    assert run.end()[0] == ExitCode.TEMPORARY


@pytest.mark.parametrize(
    ("teacher", "code", "sentence"),
    [
        (
            "raise SystemExit('ValueError: no such architecture')",
            ExitCode.CONFIGURATION,
            "the teacher's server teacher-0 ended before it had served (exit code 1): see whether SGLang can serve",
        ),
        (
            "import os, traceback\ntry: 1 / 0\nexcept Exception: traceback.print_exc(); os.kill(os.getpid(), 9)",
            ExitCode.CONFIGURATION,
            "(signal 9): see whether SGLang can serve this model with these engineArgs",
        ),
        ("import os; os.kill(os.getpid(), 9)", ExitCode.TEMPORARY, "(signal 9): something killed it"),
    ],
)
def test_a_teacher_that_dies_at_once_ends_the_run_in_seconds_with_the_end_of_its_log(
    teacher: str, code: ExitCode, sentence: str, tmp_path: Path
) -> None:
    run = Started(tmp_path, WAITS, teacher)
    out, err = run.process.communicate(timeout=120)
    assert run.process.returncode == code, out + err
    assert sentence in err and f"the end of {tmp_path}/supervised/logs/teacher-0.log:" in err
    if "architecture" in teacher:
        assert err.endswith("ValueError: no such architecture\n\n")


def test_a_teacher_that_dies_later_is_started_again(tmp_path: Path) -> None:
    run = Started(tmp_path, TRAINER, "import os, time; print('up', flush=True); time.sleep(600)")
    log = run.folder / "logs" / "teacher-0.log"
    wait_until(lambda: log.exists() and "up" in log.read_text())
    run.wait_for("step 3/40")
    [teacher] = [pid for pid in run.children() if "print('up'" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(teacher, signal.SIGKILL)
    wait_until(lambda: log.read_text().count("up") == 2)
    run.process.terminate()
    code, out, _ = run.end()
    assert code == ExitCode.TEMPORARY
    assert "the teacher's server teacher-0 ended (signal 9) and is started again; its log is " in out


class Talkative(http.server.BaseHTTPRequestHandler):
    """A proxy that answers everything itself."""

    def do_GET(self) -> None:
        self.server.asked = True  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Please log in</html>")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def proxy() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Talkative) as server:
        server.asked = False  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("talks", [True, False])
def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    talks: bool, proxy: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    port = proxy.server_port if talks else reserve_port()
    trainer = TRAINER.replace(
        "signal.signal(signal.SIGTERM", "import requests, urllib.request\nsignal.signal(signal.SIGTERM"
    ).replace(
        "while True:",
        "url = 'http://127.0.0.1:' + os.environ['DISTILL_PORT']\n"
        "assert requests.get(url).json()['phase'] == 'Training'\n"
        "assert json.loads(urllib.request.urlopen(url).read())['phase'] == 'Training'\n"
        "print('reached', flush=True)\n"
        "while True:",
    )
    environment = {name: f"http://127.0.0.1:{port}" for name in ("http_proxy", "HTTP_PROXY", "https_proxy")}
    run = Started(tmp_path, trainer, WAITS, **environment, no_proxy="", NO_PROXY="")
    log = run.folder / "logs" / "trainer.log"
    wait_until(lambda: log.exists() and "reached" in log.read_text())
    run.wait_for("step 3/40")
    run.process.terminate()
    assert run.end()[0] == ExitCode.TEMPORARY
    assert not proxy.asked  # type: ignore[attr-defined]


def test_what_no_proxy_names_already_stays() -> None:
    assert loopback.no_proxy({}) == {}
    found = loopback.no_proxy({"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".corp, localhost"})
    assert found == dict.fromkeys(("no_proxy", "NO_PROXY"), ".corp,localhost,127.0.0.1,::1")


def test_a_long_tmpdir_is_a_sentence_with_what_to_do(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    code, _, err = Started(tmp_path, WAITS, WAITS, TMPDIR=str(long)).end()
    assert code == ExitCode.CONFIGURATION
    assert err.startswith(f"distill: TMPDIR: {long} has ") and "such as /tmp" in err and err.count("\n") == 1


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A volume of 40 MiB."""
    folder = tmp_path / "volume"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a volume needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_volume_that_is_full_at_the_start_is_a_sentence_within_seconds(small: Path) -> None:
    with (small / "ballast").open("wb") as file:
        file.write(b"0" * (39 << 20))
    code, _, err = Started(small, WAITS, WAITS).end()
    assert code == ExitCode.TEMPORARY
    assert err.startswith(f"distill: spec.output.path: the volume of {small}/supervised is full (")
    assert "remove what nobody needs there" in err and err.count("\n") == 1


def test_the_reason_of_a_trainer_arrives_from_a_volume_that_has_filled_up(small: Path) -> None:
    says = "".join(
        (
            "import json, os, pathlib\n",
            f"folder = pathlib.Path({str(small)!r})\n",
            "try: (folder / 'ballast').open('wb', buffering=0).write(b'0' * (60 << 20))\n",
            "except OSError: pass\n",
            "report = {'reason': 'VolumeFull', 'message': 'the output volume is full: make room'}\n",
            "pathlib.Path(os.environ['DISTILL_TERMINATION_LOG']).write_text(json.dumps(report))\n",
            "os._exit(75)\n",
        )
    )
    code, _, err = Started(small, says, WAITS).end()
    assert code == ExitCode.TEMPORARY
    assert err == "failed: VolumeFull: the output volume is full: make room\n"


def test_an_output_that_cannot_be_written_is_permanent(tmp_path: Path) -> None:
    (tmp_path / "supervised").write_text("a file in its place")
    code, _, err = Started(tmp_path, WAITS, WAITS).end()
    assert code == ExitCode.CONFIGURATION
    assert err.startswith(f"distill: spec.output.path: {tmp_path}/supervised cannot be written (File exists)")


HANGS = """
import sys, time
from distill_workers import stacks
stacks.on_signal()
print("ready", flush=True)
def the_call_that_hangs():
    {block}
the_call_that_hangs()
"""


def test_sigusr1_writes_the_stacks_of_a_process_which_goes_on(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        code = HANGS.format(block="time.sleep(600)")
        process = subprocess.Popen([sys.executable, "-c", code], stderr=log, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "in the_call_that_hangs" in (tmp_path / "log").read_text())
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_call_that_takes_far_too_long_leaves_the_stacks_in_the_log() -> None:
    code = HANGS.format(block="\n    with stacks.dumped_after(0.3):\n        time.sleep(1)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "in the_call_that_hangs" in done.stderr
    quick = HANGS.format(block="\n    with stacks.dumped_after(0.3): pass\n    time.sleep(1)")
    assert subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, check=True).stderr == ""


async def test_an_evaluation_ends_with_its_teacher_in_place_of_waiting_for_it() -> None:
    class Ended(TeacherServers):
        def __init__(self) -> None: ...

        def restart_ended(self, *, served: bool) -> list[str]:
            raise ConfigurationError("the teacher's server teacher-0 ended")

    with pytest.raises(ConfigurationError, match="teacher-0 ended"):
        await while_served(asyncio.sleep(600), Ended())
    assert await while_served(asyncio.sleep(0, "done"), None) == "done"
