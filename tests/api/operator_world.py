"""The operator as a real process against the real API server; the rest of the cluster is played here.

The API server of these tests has no controllers and no node, so `Kubelet` makes the pods of Deployments, RayClusters
and Jobs, sets their statuses, and collects what lost its owner. The operator runs as a ServiceAccount that holds
exactly the rights of rbac.py.
"""

import contextlib
import hashlib
import http.client
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distill_workers.serving.ports import reserve_port

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
JOBS = "/apis/distillation-operator.io/v1alpha1/namespaces/{ns}/distillationjobs"
TEACHERS = "/apis/distillation-operator.io/v1alpha1/namespaces/{ns}/teachers"
CHILDREN = {
    "Deployment": "/apis/apps/v1/namespaces/{ns}/deployments",
    "RayCluster": "/apis/ray.io/v1/namespaces/{ns}/rayclusters",
    "Job": "/apis/batch/v1/namespaces/{ns}/jobs",
    "ConfigMap": "/api/v1/namespaces/{ns}/configmaps",
    "Service": "/api/v1/namespaces/{ns}/services",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{ns}/networkpolicies",
}
RAY_CRD = "rayclusters.ray.io"
PODS = "/api/v1/namespaces/{ns}/pods"

IDLE_SECONDS = 30.0
"""Age of a connection after which another is made: the server closes one that is idle for 90 s."""
PATIENCE_SECONDS = 240.0
"""Only what hangs takes longer, also on a machine that is busy with other things."""


class Api:
    """A dozen lines of REST; kubectl takes a quarter of a second each time.

    Each thread keeps its connection: a test asks tens of times a second, and the handshake costs both ends more than
    the answer.
    """

    def __init__(self, url: str, token: str, certificate: Path) -> None:
        self.url, self.token = url, token
        self._context = ssl.create_default_context(cafile=str(certificate))
        self._threads = threading.local()

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Json:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        status, reason, text = self._answer(method, path, data, headers)
        if status >= 400:
            raise urllib.error.HTTPError(self.url + path, status, reason, http.client.HTTPMessage(), io.BytesIO(text))
        found: Json = json.loads(text)
        return found

    def _answer(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Return status, reason and body."""
        connection, used = getattr(self._threads, "kept", (None, 0.0))
        if connection is None or time.monotonic() - used > IDLE_SECONDS:
            where = urllib.parse.urlsplit(self.url).netloc
            connection = http.client.HTTPSConnection(where, context=self._context, timeout=30)
        self._threads.kept = None, 0.0
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            found = answer.status, answer.reason, answer.read()
        except BaseException:
            connection.close()
            raise
        self._threads.kept = connection, time.monotonic()
        return found

    def find(self, path: str) -> Json | None:
        try:
            return self.call("GET", path)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def items(self, path: str) -> list[Json]:
        found = self.find(path)
        return found["items"] if found else []

    def merge(self, path: str, patch: Json) -> Json:
        return self.call("PATCH", path, patch, "application/merge-patch+json")


def api_of(kubeconfig: Path) -> Api:
    config = json.loads(kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    return Api(cluster["server"], config["users"][0]["user"]["token"], Path(cluster["certificate-authority"]))


@dataclass
class World:
    """One namespace of the server, and what happens in it."""

    api: Api
    namespace: str
    kubeconfig: Path
    """Of the operator's ServiceAccount."""
    folder: Path
    operators: list["Operator"] = field(default_factory=list)

    def path(self, template: str, name: str = "") -> str:
        return template.format(ns=self.namespace) + (f"/{name}" if name else "")

    def submit(self, name: str = "job", **spec: Any) -> Json:
        return self.api.call("POST", self.path(JOBS), manifest(name, **spec))

    def job(self, name: str = "job") -> Json:
        return self.api.call("GET", self.path(JOBS, name))

    def condition(self, kind: str, name: str = "job") -> Json:
        found = self.job(name).get("status", {}).get("conditions", [])
        return next((c for c in found if c["type"] == kind), {"status": "", "reason": "", "message": ""})

    def children(self) -> dict[tuple[str, str], Json]:
        return {
            (kind, item["metadata"]["name"]): {**item, "kind": kind}
            for kind, path in CHILDREN.items()
            for item in self.api.items(self.path(path))
            if item["metadata"]["name"] != "kube-root-ca.crt"
        }

    def pods(self) -> list[Json]:
        return self.api.items(self.path(PODS))

    def claim(self, name: str = "out") -> None:
        path = self.path("/api/v1/namespaces/{ns}/persistentvolumeclaims")
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
        self.api.call("POST", path, {"metadata": {"name": name}, "spec": spec})
        self.api.merge(f"{path}/{name}/status", {"status": {"phase": "Bound"}})

    def clear(self) -> None:
        """Leave nothing that an operator of all namespaces, in a test that comes later, would take up."""
        for kind in (JOBS, TEACHERS):
            self.api.call("DELETE", self.path(kind))

    def operator(self, **environment: str) -> "Operator":
        found = Operator(self, environment)
        self.operators.append(found)
        return found

    def until(self, what: str, true: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := true():
                return found
            time.sleep(0.1)
        status = json.dumps(self.job().get("status", {}), indent=1) if self.api.items(self.path(JOBS)) else "no job"
        log = self.operators[-1].log() if self.operators else ""
        raise AssertionError(f"not in {seconds} s: {what}\n{status}\n{log[-6000:]}")

    def until_quiet(self, seconds: float = 3.0) -> Json:
        """Return the job once nothing has written it for so long: the operator holds some of its status back."""
        job, since = self.job(), time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(0.1)
            if (now := self.job())["metadata"]["resourceVersion"] != job["metadata"]["resourceVersion"]:
                job, since = now, time.monotonic()
        return job

    def until_condition(
        self, kind: str, reason: str, status: str = "", name: str = "job", seconds: float = PATIENCE_SECONDS
    ) -> Json:
        def reached() -> Json | None:
            found = self.condition(kind, name)
            return found if found["reason"] == reason and status in ("", found["status"]) else None

        found: Json = self.until(f"{kind} {status} {reason}", reached, seconds)
        return found


def manifest(name: str, **spec: Any) -> Json:
    body = {
        "accelerator": "none",
        "student": {"model": "/models/student"},
        "teacher": {"model": "/models/teacher"},
        "data": {"prompts": {"path": "/data/train.jsonl"}},
        "schedule": {"steps": 10},
        "output": {"volume": {"claimName": "out"}},
    }
    return {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": name, "labels": {"kueue.x-k8s.io/priority-class": "must-not-be-copied"}},
        "spec": {**body, **spec},
    }


def teacher(name: str, **spec: Any) -> Json:
    return {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "Teacher",
        "metadata": {"name": name},
        "spec": {"model": "/models/poet", "accelerator": "none", **spec},
    }


class Operator:
    """`python -m distill_operator`, as in its image."""

    def __init__(self, world: World, environment: dict[str, str]) -> None:
        self.health_port, self.metrics_port = reserve_port(), reserve_port()
        self.log_path = world.folder / f"operator-{len(world.operators)}.log"
        settings = {
            "KUBECONFIG": str(world.kubeconfig),
            "DISTILL_WORKERS_IMAGE": "registry.test/workers:1",
            "DISTILL_WATCH_NAMESPACES": world.namespace,
            "DISTILL_RESYNC_SECONDS": "60",
            "DISTILL_PROGRESS_SECONDS": "0.3",
            "DISTILL_HEALTH_PORT": str(self.health_port),
            "DISTILL_METRICS_PORT": str(self.metrics_port),
            "DISTILL_LOG_FORMAT": "text",
            "PYTHONPATH": f"{ROOT}/crds:{ROOT}/operator",
            **environment,
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distill_operator"],
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=world.folder,
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> tuple[int, float]:
        """Exit code, and the seconds it took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"SIGTERM was ignored\n{self.log()}") from None
        return code, time.monotonic() - began

    def get(self, path: str) -> str:
        port = self.health_port if path == "/healthz" else self.metrics_port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return str(answer.read().decode())


@dataclass
class Trainer:
    """What the trainer pods of an attempt are to do."""

    exit_code: int | None = None
    """None runs on; 0 completes the Job."""
    message: str = ""
    """The termination message."""
    reason: str = "Error"
    """The runtime's word."""
    survivors: bool = False
    """The ranks but the first still run when the Job has failed."""
    disrupted: bool = False
    """The first rank is preempted, and the others end by that."""


class Kubelet(threading.Thread):
    """Scheduler, kubelet, KubeRay, Deployment and Job controller, and garbage collector of one namespace."""

    def __init__(self, world: World, *, run: bool = True) -> None:
        super().__init__(daemon=True)
        self.world, self.api = world, world.api
        self.trainers: dict[int, Trainer] = {}
        self.unschedulable: set[str] = set()
        """Roles whose pods get no node."""
        self.broken: dict[str, Json] = {}
        """State and lastState of the main container of a role's pods, which never get ready."""
        self.refused = ""
        """Why no pod of a trainer may be made, as the Job controller says it in an Event."""
        self.lingering = False
        """Trainer pods are on a node, which nobody hears of: they stay until end_trainers()."""
        self.grace_seconds = 120
        self.ending = False
        """Pods that are being deleted go at once."""
        self.seen_trainer_jobs: set[tuple[str, str]] = set()
        """Name and uid."""
        self.stopping = threading.Event()
        digest = hashlib.sha256(world.namespace.encode()).digest()
        self.ip = f"127.{1 + digest[0] % 250}.{digest[1]}.{1 + digest[2] % 250}"
        self.progress: Json | None = None
        if run:
            self.start()

    def run(self) -> None:
        while not self.stopping.wait(0.1):
            # Objects may vanish between a list and a write, and a connection break, as for the real controllers.
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.once()

    def stop(self) -> None:
        self.stopping.set()
        if self.is_alive():
            self.join()

    def once(self) -> None:
        if self.ending:
            self._end_deleted()
        children = self.world.children()
        pods = {p["metadata"]["name"]: p for p in self.world.pods()}
        owners = {child["metadata"]["uid"] for child in children.values()}
        for name, pod in pods.items():
            if pod["metadata"].get("annotations", {}).get("owner", "nobody") in {*owners, "nobody"}:
                continue
            if not pod["spec"].get("nodeName"):
                self.api.call("DELETE", self.world.path(PODS, name), {"gracePeriodSeconds": 0})
            elif "deletionTimestamp" not in pod["metadata"]:
                self.api.call("DELETE", self.world.path(PODS, name), {"gracePeriodSeconds": self.grace_seconds})
        for (kind, name), child in children.items():
            if kind == "Deployment":
                count = child["spec"]["replicas"]
                for pod_name, pod in pods.items():
                    of_it = pod["metadata"].get("annotations", {}).get("owner") == child["metadata"]["uid"]
                    if of_it and int(pod_name.rpartition("-")[2]) >= count:
                        self.api.call("DELETE", self.world.path(PODS, pod_name), {"gracePeriodSeconds": 0})
                ready = self._pods(child, pods, count, "teacher", child["spec"]["template"])
                self._status(kind, child, {"replicas": count, "updatedReplicas": count, "readyReplicas": ready})
            if kind == "RayCluster":
                self._ray_cluster(child, pods)
            if kind == "Job":
                self.seen_trainer_jobs.add((name, child["metadata"]["uid"]))
                self._job(child, pods)

    def _ray_cluster(self, child: Json, pods: dict[str, Json]) -> None:
        spec = child["spec"]
        head = self._pods(child, pods, 1, "head", spec["headGroupSpec"]["template"], {"ray.io/node-type": "head"})
        group = spec["workerGroupSpecs"][0]
        ready = self._pods(child, pods, group["replicas"], "engine", group["template"], {"ray.io/node-type": "worker"})
        status = "True" if head else "False"
        condition = {"type": "HeadPodReady", "status": status, "reason": "X", "message": "", "lastTransitionTime": AGO}
        self._status("RayCluster", child, {"readyWorkerReplicas": ready, "conditions": [condition]})

    def _job(self, child: Json, pods: dict[str, Json]) -> None:
        if child["status"].get("conditions"):
            return
        attempt = int(child["metadata"]["labels"]["distillation-operator.io/attempt"])
        todo = self.trainers.get(attempt, Trainer())
        count = child["spec"]["completions"]
        if self.refused:
            self._say_refused(child["metadata"])
            return
        ready = self._pods(child, pods, count, "trainer", child["spec"]["template"], {})
        self._status("Job", child, {"active": count, "ready": ready, "startTime": AGO})
        if todo.exit_code is None or ready < count:
            return
        for index in range(1 if todo.survivors else count):
            name = f"{child['metadata']['name']}-{index}"
            ended = {"exitCode": todo.exit_code, "message": todo.message, "finishedAt": AGO, "startedAt": AGO}
            ended |= {"reason": todo.reason} if todo.exit_code else {}
            gone = PREEMPTED if todo.disrupted and index == 0 else []
            status = self._container("trainer", {"terminated": ended}, ready=False)
            phase = "Failed" if todo.exit_code else "Succeeded"
            self.api.merge(
                self.world.path(PODS, name) + "/status",
                {"status": {"phase": phase, "containerStatuses": [status], "conditions": SCHEDULED + gone}},
            )
        if todo.exit_code:
            message = f"Container trainer for pod x failed with exit code {todo.exit_code} matching FailJob rule"
            kinds, counts = ("FailureTarget", "Failed"), {"failed": count}
        else:
            message = "Reached expected number of succeeded pods"
            kinds, counts = ("SuccessCriteriaMet", "Complete"), {"succeeded": count, "completedIndexes": _range(count)}
        condition = {"status": "True", "lastProbeTime": AGO, "lastTransitionTime": AGO, "message": message}
        end = {"completionTime": NOW} if not todo.exit_code else {}
        terminal = {
            "active": 0,
            "ready": 0,
            **counts,
            **end,
            "conditions": [{**condition, "type": t, "reason": "PodFailurePolicy"} for t in kinds],
        }
        self._status("Job", child, terminal)

    def _say_refused(self, job: Json) -> None:
        meta = {"name": f"{job['name']}.refused", "namespace": self.world.namespace}
        involved = {"apiVersion": "batch/v1", "kind": "Job", **{key: job[key] for key in ("name", "namespace", "uid")}}
        event = {"reason": "FailedCreate", "message": self.refused, "type": "Warning", "lastTimestamp": NOW}
        event |= {"source": {"component": "job-controller"}}
        with contextlib.suppress(urllib.error.HTTPError):
            path = self.world.path("/api/v1/namespaces/{ns}/events")
            self.api.call("POST", path, {"metadata": meta, "involvedObject": involved, **event})

    def _pods(
        self, child: Json, pods: dict[str, Json], count: int, part: str, template: Json, labels: Json | None = None
    ) -> int:
        """Makes what is missing; how many are ready."""
        ready = 0
        role = template["metadata"]["labels"]["distillation-operator.io/role"]
        for index in range(count):
            separator = f"-{index}" if part == "trainer" else f"-{part}-{index}"
            name = child["metadata"]["name"] + separator
            uid = child["metadata"]["uid"]
            pod = pods.get(name)
            if pod is not None and pod["metadata"]["annotations"]["owner"] != uid:
                continue
            if pod is None:
                annotations = {"owner": uid, "batch.kubernetes.io/job-completion-index": str(index)}
                body = {
                    "metadata": {
                        "name": name,
                        "labels": {**template["metadata"]["labels"], **(labels or {})},
                        "annotations": annotations,
                        "ownerReferences": [_controller(child)],
                    },
                    "spec": {
                        **template["spec"],
                        **({"nodeName": "n1"} if part == "trainer" and self.lingering else {}),
                    },
                }
                self.api.call("POST", self.world.path(PODS), body)
                pod = {"status": {}}
            stuck = role in self.unschedulable
            broken = self.broken.get(role)
            if not stuck and not broken and pod["status"].get("phase") not in (None, "Pending"):
                ready += 1
                continue
            main = template["spec"]["containers"][0]["name"]
            if stuck:
                status: Json = {"conditions": UNSCHEDULABLE}
            elif broken:
                failing = {**self._container(main, broken["state"], ready=False), "restartCount": 4}
                failing |= {"lastState": broken.get("lastState", {})}
                status = {"phase": "Pending", "containerStatuses": [failing], "conditions": SCHEDULED}
            else:
                running = self._container(main, {"running": {"startedAt": AGO}}, ready=True)
                conditions = [*SCHEDULED, {"type": "Ready", "status": "True"}]
                status = {"phase": "Running", "containerStatuses": [running], "conditions": conditions}
                status |= {"podIP": self.ip, "podIPs": [{"ip": self.ip}]} if part == "trainer" else {}
                ready += 1
            self.api.merge(self.world.path(PODS, name) + "/status", {"status": status})
        return ready

    @staticmethod
    def _container(name: str, state: Json, *, ready: bool) -> Json:
        return {"name": name, "image": "x", "imageID": "x", "ready": ready, "restartCount": 0, "state": state}

    def end_trainers(self) -> None:
        """Let the trainer pods that are being deleted go, and from now on others at once."""
        self.ending = True
        self._end_deleted()

    def _end_deleted(self) -> None:
        for pod in self.world.pods():
            if "deletionTimestamp" in pod["metadata"]:
                self.api.call("DELETE", self.world.path(PODS, pod["metadata"]["name"]), {"gracePeriodSeconds": 0})

    def _status(self, kind: str, child: Json, status: Json) -> None:
        before = child.get("status", {})
        if all(before.get(key) == value for key, value in status.items()):
            return
        path = self.world.path(CHILDREN[kind], child["metadata"]["name"])
        self.api.merge(f"{path}/status", {"status": status})

    def serve_progress(self) -> ThreadingHTTPServer:
        """What rank 0 of the trainer would answer."""
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(kubelet.progress).encode()
                self.send_response(200 if kubelet.progress else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer((self.ip, 8080), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def _controller(child: Json) -> Json:
    """What controls the pods of a child: itself, or a ReplicaSet of its name."""
    kind, name, version = child["kind"], child["metadata"]["name"], "batch/v1"
    if kind == "Deployment":
        kind, name, version = "ReplicaSet", f"{name}-5f7d", "apps/v1"
    if kind == "RayCluster":
        version = "ray.io/v1"
    return {"apiVersion": version, "kind": kind, "name": name, "uid": child["metadata"]["uid"], "controller": True}


def _range(count: int) -> str:
    return "0" if count == 1 else f"0-{count - 1}"


AGO = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 60))
NOW = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
SCHEDULED = [{"type": "PodScheduled", "status": "True"}]
PREEMPTED = [
    {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "preempted by another pod of higher priority",
        "lastTransitionTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 5)),
    }
]
UNSCHEDULABLE = [
    {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
]
