"""A real kube-apiserver on a real etcd, alone: no scheduler, no controllers, no node: objects stay as they are written.

Two things follow. A deleted namespace or owner leaves its objects behind, as nothing collects them: take a fresh
namespace for each test. And a pod may be created without a ServiceAccount, whose controller is missing.
"""

import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill_workers.serving.ports import reserve_port

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distillation-operator")
START_SECONDS = 90
TOKEN = "throw-away"
AUDIT_LOG = "audit.log"
"""What ServiceAccounts asked for, a line of JSON each, beside the kubeconfig."""
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],  # a watch is there from ResponseStarted, not only when it ends
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}

Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class ApiServer:
    """Where it is, and how to speak to it as a cluster administrator."""

    url: str
    kubeconfig: Path
    kubectl_binary: Path

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl. With check, a failure raises AssertionError with what kubectl said."""
        command = [str(self.kubectl_binary), f"--kubeconfig={self.kubeconfig}", *arguments]
        # The discovery cache must not outlive the server: another one may get the same port.
        environment = {**os.environ, "KUBECACHEDIR": str(self.kubeconfig.parent / "kubectl-cache")}
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr}")
        return done

    def create(self, path: str, body: dict[str, Any]) -> None:
        """Create an object without kubectl, which takes a quarter of a second of a processor."""
        context = ssl.create_default_context(cafile=str(self.kubeconfig.parent / "certificates" / "apiserver.crt"))
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, context=context, timeout=60) as answer:
            answer.read()


def _binary(name: str) -> Path:
    """Of the cache that dev/ fills, else of the PATH. Without it the tests fail: skipping would look like passing."""
    cached = CACHE / "bin" / name
    found = str(cached) if cached.exists() else shutil.which(name)
    if not found:
        pytest.fail(f"{name} is neither in {cached.parent} nor on the PATH; run `make setup tools`", pytrace=False)
    return Path(found)


def _spawn(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """Starts a server that also ends when the tests are killed outright."""
    name = Path(command[0]).name
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "TERM", *command]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _etcd_command(folder: Path, client: str, peer: str) -> list[str]:
    return [
        str(_binary("etcd")),
        f"--data-dir={folder}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def _apiserver_command(folder: Path, etcd: str, port: int) -> list[str]:
    key = folder / "service-account.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens = folder / "tokens.csv"
    tokens.write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    policy = folder / "audit-policy.json"
    policy.write_text(json.dumps(AUDIT))
    return [
        str(_binary("kube-apiserver")),
        f"--etcd-servers={etcd}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={folder}/certificates",  # it makes its own certificate there
        f"--token-auth-file={tokens}",
        "--authorization-mode=RBAC",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--endpoint-reconciler-type=none",  # a loopback address is no valid endpoint
        "--disable-admission-plugins=ServiceAccount",  # nothing makes the `default` ServiceAccount
        # As on OpenShift: who sets blockOwnerDeletion must be allowed to change the owner's finalizers.
        "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
        f"--audit-policy-file={policy}",
        f"--audit-log-path={folder / AUDIT_LOG}",
    ]


def _write_kubeconfig(folder: Path, url: str) -> Path:
    path = folder / "kubeconfig"
    cluster = {"server": url, "certificate-authority": str(folder / "certificates" / "apiserver.crt")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
        "current-context": "tests",
    }
    path.write_text(json.dumps(config))
    return path


def _wait_until_ready(server: ApiServer, processes: list[subprocess.Popen[bytes]]) -> None:
    folder = server.kubeconfig.parent
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if any(p.poll() is not None for p in processes):
            break
        # The namespace `default` is made a moment after the server says that it is ready.
        ready = server.kubectl("get", "--raw", "/readyz", check=False).returncode == 0
        if ready and server.kubectl("get", "namespace", "default", check=False).returncode == 0:
            return
        time.sleep(0.3)
    logs = "\n".join(f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in folder.glob("*.log"))
    pytest.fail(f"the API server did not get ready in {START_SECONDS} s\n{logs}", pytrace=False)


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A kube-apiserver and etcd of our own, on free ports of the loopback; gone when the session ends."""
    folder = tmp_path_factory.mktemp("apiserver")
    client, peer, port = (reserve_port() for _ in range(3))
    url, etcd = f"https://127.0.0.1:{port}", f"http://127.0.0.1:{client}"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(_spawn(folder, _etcd_command(folder, etcd, f"http://127.0.0.1:{peer}")))
        processes.append(_spawn(folder, _apiserver_command(folder, etcd, port)))
        server = ApiServer(url, _write_kubeconfig(folder, url), _binary("kubectl"))
        _wait_until_ready(server, processes)
        yield server
    finally:
        for process in reversed(processes):
            _end(process)
        shutil.rmtree(folder / "etcd", ignore_errors=True)  # pytest keeps the folder, and a log of etcd has 64 MB


@pytest.fixture(scope="session")
def kubectl(api_server: ApiServer) -> Kubectl:
    """Runs kubectl against the server; see ApiServer.kubectl."""
    return api_server.kubectl


@pytest.fixture(scope="session")
def crds_installed(api_server: ApiServer) -> ApiServer:
    """The server, with our CRD applied as the README says, and served."""
    api_server.kubectl("apply", "-f", str(ROOT / "crds"))
    crds = [f"crd/{plural}.distillation-operator.io" for plural in ("distillationjobs", "teachers")]
    deadline = time.monotonic() + 30  # at first it has no conditions at all, and kubectl takes that for an error
    while api_server.kubectl("wait", "--for=condition=Established", "--timeout=30s", *crds, check=False).returncode:
        assert time.monotonic() < deadline, "the CRDs are not established"
    # What kubectl has learnt of the server before is out of date, and it would believe it for hours.
    shutil.rmtree(api_server.kubeconfig.parent / "kubectl-cache")
    return api_server


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    """The name of a namespace made for this test."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    api_server.create("/api/v1/namespaces", {"metadata": {"name": name}})
    return name
