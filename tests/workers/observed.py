"""A real run that a real Prometheus scrapes, under the labels that the documented configuration gives a job's pods.

The trainer, the engine and the teacher are those of `distill run`; the operator's metrics are its own collector's, of
jobs that went through their phases. The scrape configuration is that of docs/monitoring.md, with the discovery of pods
replaced by a file of what it would have found.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import start_http_server
from runs import REPO, Run, arithmetic, servers_of

from distill_api.job import parse_job
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer

sys.path.append(str(REPO / "operator"))

from distill_api.status import Status
from distill_api.teacher.kind import TeacherStatus
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.kinds import Kind
from distill_operator.metrics import OperatorMetrics
from distill_operator.runtime.ownership import Key
from distill_operator.teacher.teacher_registry import TeacherRegistry, TeacherSnapshot
from distill_operator.teacher.view import view

NAMESPACE, JOB, WAITING_JOB, SHORT_JOB = "team", "watched", "queued", "short"
PHASES = ("Pending", "Starting", "Suspended", "Running", "Restarting", "Running")
RULES = REPO / "charts" / "distillation-operator" / "files" / "rules" / "distillation.yaml"


class Rewards(BaseHTTPRequestHandler):
    """Reward source http. One prompt of ten cannot be judged, so its samples fail."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = asked["response"].strip() == asked["answer"]
        self.send_response(500 if asked["answer"].endswith("7") else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"reward": float(right)}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def reward_service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rewards)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        thread.join()


def job(output: Path, reward_url: str) -> dict[str, Any]:
    """Two data sources, a reward, an evaluation of two responses and a guard: with these every metric has a value."""
    manifest = arithmetic(
        output,
        JOB,
        rollout={"promptsPerStep": 8, "samplesPerPrompt": 2},
        objective={"reward": {"source": "http", "url": reward_url, "retries": 0}},
        schedule={"steps": 1000, "checkpointEverySteps": 2, "evaluateEverySteps": 2},
        guards=[{"name": "short", "watch": "response-length", "below": 0.5}],
    )
    prompts = manifest["spec"]["data"]["prompts"]
    sources = [{"name": name, "prompts": prompts} for name in ("odd", "even")]
    manifest["spec"]["data"] = {"sources": sources}
    manifest["spec"]["evaluation"][0] |= {"samplesPerPrompt": 2, "maxPrompts": 16}
    return manifest


class Operator:
    """Its collector, as a reconciler would tell it: a job that runs, one that waits, and one that is soon over."""

    def __init__(self) -> None:
        self._jobs, self._turn = JobRegistry(), 0
        api = {("list", "200"): 10, ("patch", "200"): 3}
        self._teachers = TeacherRegistry()
        self.metrics = OperatorMetrics(
            self._jobs, self._teachers, queue_depth=lambda: 0, queue_retries=lambda: 1, api_requests=api
        )
        self._api = api
        self._made = datetime.now(UTC)
        self._tell(JOB, "Running")
        self._tell(WAITING_JOB, "Pending")
        self.port = reserve_port()
        self._server, self._thread = start_http_server(self.port, "127.0.0.1", self.metrics.registry())

    def _tell(self, name: str, reason: str) -> None:
        at = self._made.strftime("%Y-%m-%dT%H:%M:%SZ")
        stated = {"Succeeded": ("Unknown", reason), "Stalled": ("False", "Progressing"), "Ready": ("True", "Ready")}
        status = {
            "conditions": [
                {"type": type_, "status": status, "reason": why, "lastTransitionTime": at}
                for type_, (status, why) in stated.items()
            ],
            "restarts": int(name == JOB),
        }
        raw = {"metadata": {"uid": name, "creationTimestamp": at}, "spec": {}}
        now = self._made + timedelta(seconds=10 * self._turn)
        self._jobs.put(Key(Kind.DISTILLATION_JOB, NAMESPACE, name), raw, Status.model_validate(status), now)

    def _teach(self) -> None:
        """A Teacher that is scaled up at each turn."""
        ready = {"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        fields = {"conditions": [ready], "desiredReplicas": self._turn, "readyReplicas": 1, "jobs": 1, "requests": 40}
        shown = TeacherSnapshot("u", TeacherStatus.model_validate(fields), view("poet", None))
        self._teachers.put(Key(Kind.TEACHER, NAMESPACE, "poet"), shown, scaled=1)

    def work(self) -> None:
        self.metrics.reconciles["ok"] += 1
        self.metrics.durations.observe(0.05)
        self._api[("list", "200")] += 1
        self._turn += 1
        self._teach()
        self._tell(SHORT_JOB, PHASES[self._turn % len(PHASES)])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def pod(port: int, role: str, name: str, port_name: str = "metrics") -> dict[str, Any]:
    """A target as the discovery of pods describes it."""
    meta = {
        "namespace": NAMESPACE,
        "pod_name": name,
        "pod_container_port_name": port_name,
        "pod_label_app_kubernetes_io_part_of": "distillation-operator",
        "pod_label_distillation_operator_io_job": JOB,
        "pod_label_distillation_operator_io_role": role,
    }
    return {
        "targets": [f"127.0.0.1:{port}"],
        "labels": {f"__meta_kubernetes_{key}": value for key, value in meta.items()},
    }


def operator_pod(port: int) -> dict[str, Any]:
    meta = {
        "namespace": "distillation-system",
        "pod_name": "operator",
        "pod_container_port_name": "metrics",
        "pod_label_app_kubernetes_io_name": "distillation-operator",
    }
    return {
        "targets": [f"127.0.0.1:{port}"],
        "labels": {f"__meta_kubernetes_{key}": value for key, value in meta.items()},
    }


def engine_ports(folder: Path) -> tuple[int, int]:
    """SGLang's, and Ray's metrics: from the process whose output is the engine's log, and the raylet that it is of."""
    for process in servers_of(folder):
        with contextlib.suppress(OSError):  # gone meanwhile
            arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if b"--port" in arguments:
                return int(arguments[arguments.index(b"--port") + 1]), ray_metrics_port(process)
    raise AssertionError(f"no process writes the log of engine 0 in {folder}")


def ray_metrics_port(pid: int) -> int:
    """Of the Ray that a process descends from."""
    while pid > 1:
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if found := re.search(r"--session_dir=([^\0]+)", command):
            [port] = Path(found[1]).glob("metrics_export_port_*")
            return int(port.read_text())
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    raise AssertionError("no raylet is among its ancestors")


class Prometheus:
    """The documented configuration, with every target within the file."""

    def __init__(self, folder: Path, targets: list[dict[str, Any]], interval: str = "1s") -> None:
        blocks = re.findall(r"```yaml\n(.*?)```", (REPO / "docs" / "monitoring.md").read_text(), re.DOTALL)
        [config] = [loaded for loaded in map(yaml.safe_load, blocks) if "scrape_configs" in loaded]
        config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
        for scrape in config["scrape_configs"]:
            del scrape["kubernetes_sd_configs"]
            scrape.pop("scrape_interval", None)
            scrape["file_sd_configs"] = [{"files": [str(folder / "targets.json")]}]
        config["rule_files"] = [str(RULES)]
        (folder / "targets.json").write_text(json.dumps(targets))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        binary = shutil.which("prometheus")
        assert binary, "install the Debian package prometheus (`make setup`)"
        self.port = reserve_port()
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )
        self.log = folder / "prometheus.log"

    def get(self, path: str, **parameters: Any) -> Any:
        """`data` of an answer of its API. Raises OSError where it is not up, AssertionError where it refuses."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it reads its files still
                raise
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[float]:
        """Values of an instant query that are numbers."""
        found = self.get("query", query=expression)["result"]
        values = [float(one["value"][1]) for one in found if isinstance(one, dict)]
        return [value for value in values if value == value]

    def wait(self, expression: str, seconds: float = 60) -> None:
        assert self.answers(expression, seconds), f"no answer to {expression}\n{self.log.read_text()[-3000:]}"

    def answers(self, expression: str, seconds: float = 20) -> bool:
        """Whether there is an answer within the time: every series is stale after a scrape that took too long."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if self.query(expression):
                    return True
            assert self._process.poll() is None, self.log.read_text()
            if time.monotonic() > end:
                return False
            time.sleep(0.3)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@contextlib.contextmanager
def world(folder: Path, manifest_changes: dict[str, Any] | None = None, interval: str = "1s") -> Iterator[Prometheus]:
    """A run under way, from its first step on, and Prometheus."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(reward_service())
        manifest = job(folder / "output", url)
        manifest["spec"] |= manifest_changes or {}
        spec = parse_job(manifest).spec
        teacher = SGLangServer(spec.teacher.model, spec, "teacher", port=reserve_port(), log=folder / "teacher.log")
        teacher.start()
        stack.callback(teacher.stop)
        # Not forked: whose process an engine is, and its command line, tell the ports to ask.
        run = Run(manifest, f"127.0.0.1:{teacher.port}", folder, DISTILL_TEST_PRELOADED="")
        stack.callback(run.kill)
        operator = Operator()
        stack.callback(operator.close)
        run.wait_for_step(1)
        sglang, ray = engine_ports(run.folder)
        targets = [
            pod(run.port, "trainer", f"{JOB}-trainer-1-0"),
            pod(teacher.port, "teacher", f"{JOB}-teacher-0"),
            pod(sglang, "rollout", f"{JOB}-rollout-0"),
            pod(ray, "rollout", f"{JOB}-rollout-0", "ray-metrics"),
            operator_pod(operator.port),
        ]
        prometheus = Prometheus(folder, targets, interval)
        stack.callback(prometheus.close)
        over = threading.Event()
        worker = threading.Thread(target=lambda: [operator.work() for _ in iter(lambda: over.wait(0.5), True)])
        worker.start()
        stack.callback(worker.join)
        stack.callback(over.set)
        # A rate has no value before its target's second scrape, and each target has a second of its own.
        prometheus.wait(f"count(count_over_time(up[5m]) > 2) == {len(targets)}")
        yield prometheus
