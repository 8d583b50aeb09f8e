"""What a run has come to, out of a real API server: the pod that reads it, its admission, rights and end.

The kubelet is played: it runs the command of an exec on a folder of this machine, and streams as a kubelet does.
"""

import base64
import hashlib
import json
import os
import signal
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from operator_world import CHILDREN, JOBS, PODS, ROOT, Json, World, api_of

from distill_cli.diagnosis.observed import RIGHTS
from distill_cli.main import main

pytest_plugins = ["operator_fixtures"]
Distill = Callable[..., int]
ROLLOUT = {"kind": "rollout", "step": 3, "picked": "first", "source": "", "reward": 1.0, "response_tokens": 2}
ROLLOUT |= {"prompt": "1+1=", "tokens": ["2", "!"], "kl": [0.1, 2.5]}
WEIGHTS = os.urandom(3_000_000)
"""More than a message, a buffer of a pipe or of the API server holds."""
MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


@dataclass
class Kubelet:
    """A node that runs reader pods at once, and what it was asked for."""

    world: World
    output: Path
    node: str
    execs: list[list[str]] = field(default_factory=list)
    made: list[Json] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def play(self) -> None:
        """Bind and run pods, and let go those that are deleted."""
        while not self.over.wait(0.1):
            for pod in self.world.pods():
                meta, path = pod["metadata"], self.world.path(PODS, pod["metadata"]["name"])
                if "deletionTimestamp" in meta:
                    self.world.api.call("DELETE", path, {"gracePeriodSeconds": 0})
                elif not pod["spec"].get("nodeName"):
                    self.made.append(pod)
                    binding = {"metadata": {"name": meta["name"]}, "target": {"kind": "Node", "name": self.node}}
                    self.world.api.call("POST", f"{path}/binding", binding)
                    self.world.api.merge(f"{path}/status", {"status": {"phase": "Running"}})


def handler_of(kubelet: Kubelet) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Exec, over a WebSocket with the channels of v4.channel.k8s.io."""
            command = parse_qs(urlsplit(self.path).query)["command"]
            kubelet.execs.append(command)
            accept = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + MAGIC).encode()).digest()
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(accept).decode())
            self.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
            self.end_headers()
            words = [sys.executable, *(word.replace("/output", str(kubelet.output)) for word in command[1:])]
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                assert process.stdout and process.stderr
                while chunk := process.stdout.read(32_768):
                    self.frame(1, chunk)
                if said := process.stderr.read():
                    self.frame(2, said)
            self.frame(3, json.dumps({"status": "Failure" if process.returncode else "Success"}).encode())
            self.wfile.write(b"\x88\x00")
            self.close_connection = True

        def frame(self, channel: int, content: bytes) -> None:
            size = len(content) + 1
            length = bytes([size]) if size < 126 else b"\x7e" + struct.pack("!H", size)
            self.wfile.write(b"\x82" + length + bytes([channel]) + content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def mine(crds_installed: Any, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A namespace that enforces Pod Security `restricted`, with a finished job: its trainer, its claim, no operator."""
    world = World(api_of(crds_installed.kubeconfig), namespace, crds_installed.kubeconfig, tmp_path)
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    world.api.merge(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": label}})
    world.claim()
    meta = world.submit("sums")["metadata"]
    container = {"name": "trainer", "image": "registry.example.com/workers:1"}
    owner = {"apiVersion": "distillation-operator.io/v1alpha1", "kind": "DistillationJob", "name": "sums"}
    trainer = {
        "metadata": {
            "name": "sums-trainer-1",
            "labels": {"distillation-operator.io/job": "sums", "distillation-operator.io/attempt": "1"},
            "ownerReferences": [owner | {"uid": meta["uid"], "controller": True}],
        },
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }
    world.api.call("POST", world.path(CHILDREN["Job"]), trainer)
    monkeypatch.setenv("KUBECONFIG", str(world.kubeconfig))
    yield world
    world.clear()


@pytest.fixture
def distill(mine: World) -> Distill:
    return lambda *arguments: main([*arguments, "-n", mine.namespace])


@pytest.fixture
def kubelet(mine: World, tmp_path: Path) -> Iterator[Kubelet]:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=node"]
    command = ["openssl", *made, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    found = Kubelet(mine, tmp_path / "volume", f"node-{mine.namespace}")
    run = found.output / "sums"
    (run / "model").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "samples.jsonl").write_text(json.dumps(ROLLOUT) + "\n")
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "model.safetensors").write_bytes(WEIGHTS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mine.api.call("POST", "/api/v1/nodes", {"metadata": {"name": found.node}})
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": server.server_port}},
    }
    mine.api.merge(f"/api/v1/nodes/{found.node}/status", {"status": status})
    playing = threading.Thread(target=found.play, daemon=True)
    playing.start()
    yield found
    mine.until("no pod is left", lambda: not mine.pods())
    found.over.set()
    playing.join()
    mine.api.call("DELETE", f"/api/v1/nodes/{found.node}")
    server.shutdown()


def test_the_model_of_a_finished_job_comes_whole_through_the_api_server(
    mine: World, distill: Distill, kubelet: Kubelet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("export", "sums", str(tmp_path / "here")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'here'}: the model that the run exported\n"
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in tmp_path.iterdir() if "here" in path.name) == ["here"], "nothing is left aside"
    [pod] = kubelet.made
    assert pod["spec"]["containers"][0]["image"] == "registry.example.com/workers:1"
    assert pod["metadata"]["ownerReferences"][0]["uid"] == mine.job("sums")["metadata"]["uid"]
    mine.until("the pod is gone", lambda: not mine.pods())
    assert distill("export", "sums", str(tmp_path / "here")) == 1
    assert "is not empty" in capsys.readouterr().err and len(kubelet.made) == 1


def test_samples_of_a_finished_job_are_read_from_its_volume(
    distill: Distill, kubelet: Kubelet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("samples", "sums") == 0
    assert "step 3, first, 2 tokens, 1.300 nats per token, reward 1" in capsys.readouterr().out
    assert distill("samples", "sums", "--step", "9") == 1
    assert "samples.jsonl of job sums has no rollout of step 9" in capsys.readouterr().err


def test_what_the_pod_says_is_what_the_user_reads(
    distill: Distill, kubelet: Kubelet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("export", "sums", str(tmp_path / "here"), "--step", "7") == 1
    said = capsys.readouterr().err
    assert "has no model and no complete checkpoint yet: wait for the first" in said and said.count("\n") == 1
    assert not (tmp_path / "here").exists()


def test_the_rights_that_doctor_asks_for_are_enough(
    mine: World, kubelet: Kubelet, crds_installed: Any, tmp_path: Path
) -> None:
    # Not at the top: it is one of pytest's plugins, which are imported later.
    from operator_fixtures import account, grant, kubeconfig_of

    rules = [
        {"apiGroups": [r.group], "resources": [f"{r.resource}/{r.subresource}".rstrip("/")], "verbs": [r.verb]}
        for r in RIGHTS
    ]
    name = f"reads-{mine.namespace}"
    account(crds_installed, name)
    grant(crds_installed, {"kind": "Role", "metadata": {"name": name, "namespace": mine.namespace}, "rules": rules})
    crds_installed.kubectl(
        *("create", "rolebinding", name, f"--role={name}", f"--serviceaccount=default:{name}", "-n", mine.namespace)
    )
    user = ["-n", mine.namespace, "--kubeconfig", str(kubeconfig_of(crds_installed, name, tmp_path))]
    assert main(["export", "sums", str(tmp_path / "here"), *user]) == 0
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_interrupted_leaves_no_pod(number: signal.Signals, mine: World, tmp_path: Path) -> None:
    """There is no node: the pod waits for one."""
    command = [sys.executable, "-m", "distill_cli", "export", "sums", str(tmp_path / "here"), "-n", mine.namespace]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        mine.until("its pod", mine.pods)
        process.send_signal(number)
        assert process.wait(60) == 130
    assert mine.pods() == []
    assert not (tmp_path / "here").exists() and not list(tmp_path.glob(".here*"))


def test_a_deleted_job_has_nothing_to_read(mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]) -> None:
    mine.api.call("DELETE", mine.path(JOBS, "sums"))
    assert distill("report", "sums") == 1
    assert "has no DistillationJob sums" in capsys.readouterr().err
