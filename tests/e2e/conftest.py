"""The embedded cluster with everything installed, for the tests of whole jobs; made as `make demo` makes it."""

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_cli.cluster import ApiError, Cluster, connect
from run_evidence import steps_of

REPO = Path(__file__).resolve().parents[2]
DEV = REPO / "dev"
CACHE = Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache" / "distillation-operator"))
pytest_plugins = ["failures_last"]
LABEL_JOB = "distillation-operator.io/job"
LABEL_ROLE = "distillation-operator.io/role"
SYSTEM = "distillation-system"
ORDER = ("test_job", "test_faults")
"""Modules that begin: the first wants a cluster that has no operator yet."""
CHILDREN = ("deployments", "rayclusters", "jobs", "services", "configmaps", "secrets", "networkpolicies")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long it took, also where it fails."""
    begin = time.monotonic()
    try:
        yield
    finally:
        print(f"\n{what}: {time.monotonic() - begin:.0f} s", end="", flush=True)


def run(*command: str | Path, timeout: float = 900) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@dataclass
class Jobs:
    """One namespace, PodSecurity restricted, with the claims `models` and `output`."""

    namespace: str
    output: Path

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        command = ["kubectl", "-n", self.namespace, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0 or not check, f"{arguments}: {done.stderr}"
        return done.stdout

    def get(self, kind: str, name: str) -> dict[str, Any]:
        text = self.kubectl("get", kind, name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else {}

    def names(self, kind: str, selector: str = "") -> list[str]:
        return self.kubectl("get", kind, "-l", selector, "-o", "name").split()

    def arithmetic(self, name: str, example: str = "examples/arithmetic-cpu", **changes: Any) -> None:
        """Applies an example under a name; `changes` are merged into spec, two levels deep."""
        manifest = yaml.safe_load((REPO / f"{example}.yaml").read_text())
        manifest["metadata"]["name"] = name
        manifest["spec"]["output"]["volume"]["claimName"] = "output"
        for key, value in changes.items():
            old = manifest["spec"].get(key)
            manifest["spec"][key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def status(self, name: str) -> dict[str, Any]:
        """By distill's own client: kubectl takes a quarter of a second of a processor, and this is polled."""
        try:
            return dict(self._cluster.get(self._cluster.job_path(name)).get("status", {}))
        except ApiError as error:
            if error.status == 404:
                return {}
            raise

    @cached_property
    def _cluster(self) -> Cluster:
        return connect(self.namespace, None, None)

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def step(self, name: str) -> int:
        return int(self.status(name).get("progress", {}).get("step", 0))

    def trains(self, name: str, steps: int = 3, seconds: float = 480) -> None:
        """Wait until the status tells of so many steps more than have been done by now, which it may not know yet."""
        target = max([self.step(name), *steps_of(self.output / name)]) + steps
        self.wait(f"step {target} of {name} in the status", lambda: self.step(name) >= target, seconds)

    def suspend(self, name: str, value: bool) -> None:
        patch = json.dumps({"spec": {"suspend": value}})
        self.kubectl("patch", "djob", name, "--type=merge", "-p", patch)

    def kill(self, selector: str) -> None:
        """Delete pods without a grace period, and do not wait for it."""
        self.kubectl("delete", "pod", "-l", selector, "--grace-period=0", "--force", "--wait=false")

    def of_job(self, kinds: str, name: str) -> list[dict[str, Any]]:
        """The objects of these kinds that are a job's."""
        found = json.loads(self.kubectl("get", kinds, "-l", f"{LABEL_JOB}={name}", "-o", "json"))
        return list(found["items"])

    def wait(self, what: str, true: Callable[[], Any], seconds: float = 300) -> Any:
        end = time.monotonic() + seconds
        while not (value := true()):
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.picture()}")
            time.sleep(0.5)
        return value

    def finish(self, name: str, seconds: float = 600) -> dict[str, Any]:
        """The Succeeded condition, once it is True or False."""
        self.wait(
            f"{name} finishes", lambda: self.condition(name, "Succeeded").get("status") in ("True", "False"), seconds
        )
        return self.condition(name, "Succeeded")

    def picture(self) -> str:
        logs = [path.read_text()[-2500:] for path in self.output.glob("*/logs/rank-0.log")]
        return "\n".join([self.kubectl("get", "djob,pods,events", "-o", "wide", check=False)[-6000:], *logs])

    def pods_of(self, job: str) -> list[str]:
        return self.names("pods", f"{LABEL_JOB}={job}")

    def delete(self, job: str) -> None:
        self.kubectl("delete", "djob", job, "--wait")
        for kind in ("pods", *CHILDREN):
            self.wait(f"no {kind} of {job} is left", lambda k=kind: not self.names(k, f"{LABEL_JOB}={job}"), 120)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster without our operator, left as it was found: up, or down again."""
    os.environ["KUBECONFIG"] = str(CACHE / "cluster" / "pki" / "admin.conf")
    os.environ["PATH"] = f"{CACHE / 'bin'}:{os.environ['PATH']}"
    probe = ["kubectl", "get", "--raw", "/readyz", "--request-timeout=3s"]
    was_up = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    for command in (
        (DEV / "cluster" / "up.sh",),
        (DEV / "images.sh", "all"),
        (DEV / "cluster" / "kuberay.sh",),
        (DEV / "cluster" / "prometheus.sh", "start"),
    ):
        with timed(" ".join((command[0].name, *command[1:]))):
            run(*command, timeout=1800)
    yield
    if not was_up:
        run(DEV / "cluster" / "prometheus.sh", "stop")
        run(DEV / "cluster" / "down.sh")


@pytest.fixture(scope="session")
def operator(cluster: None) -> None:
    """The chart as it is here, with the images built here."""
    with timed("operator chart"):
        run(DEV / "install.sh")


@pytest.fixture(scope="session")
def namespace(cluster: None) -> Iterator[Jobs]:
    """The namespace of the tests' jobs. Whoever asks for it alone installs an operator."""
    found = Jobs("distill-e2e", CACHE / "e2e-output")
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": found.namespace, "labels": label}}
    run("kubectl", "delete", "namespace", found.namespace, "--ignore-not-found", "--wait")
    found.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    shutil.rmtree(found.output, ignore_errors=True)
    run(DEV / "cluster" / "volume.sh", found.namespace, "models", CACHE / "models")
    run(DEV / "cluster" / "volume.sh", found.namespace, "output", found.output)
    yield found
    run("kubectl", "delete", "namespace", found.namespace, "--wait")
    shutil.rmtree(found.output, ignore_errors=True)


@pytest.fixture(scope="session")
def jobs(namespace: Jobs, operator: None) -> Jobs:
    return namespace


def prometheus(query: str) -> list[dict[str, Any]]:
    url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url, timeout=10) as answer:
        return list(json.load(answer)["data"]["result"])
