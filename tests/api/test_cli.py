"""`distill` against a real API server: what it writes there, and what it shows of what is there."""

import importlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from operator_world import JOBS, PODS, Json, World, api_of, manifest

from distill_api.protocol import TRAINER_PORT
from distill_cli.diagnosis.checks import CHECKS
from distill_cli.diagnosis.observed import RIGHTS
from distill_cli.main import main

pytest_plugins = ["operator_fixtures"]
Distill = Callable[..., int]


@pytest.fixture
def mine(crds_installed: Any, namespace: str, tmp_path: Path) -> World:
    """A namespace without an operator; the test says what a job's status is."""
    return World(api_of(crds_installed.kubeconfig), namespace, crds_installed.kubeconfig, tmp_path)


@pytest.fixture
def distill(mine: World, monkeypatch: pytest.MonkeyPatch) -> Distill:
    """Runs a command in the test's namespace, as an administrator."""
    monkeypatch.setenv("KUBECONFIG", str(mine.kubeconfig))
    monkeypatch.setattr("distill_cli.commands.watch.POLL_SECONDS", 0.05)
    return lambda *arguments: main([*arguments, "-n", mine.namespace])


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(manifest("sums")))
    return path


def set_status(world: World, name: str, reason: str, status: str = "Unknown", message: str = "", **more: Any) -> None:
    """As the operator would."""
    condition = {"type": "Succeeded", "status": status, "reason": reason, "message": message}
    condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    world.api.merge(f"{world.path(JOBS, name)}/status", {"status": {"conditions": [condition], **more}})


def progress(step: int) -> Json:
    return {"step": step, "totalSteps": 10, "percent": 10 * step, "reverseKL": f"0.{9 - step}0000", "reward": "0.50000"}


def test_submit_creates_a_job_with_the_values_of_set_and_says_what_to_do_next(
    mine: World, distill: Distill, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("submit", "-f", str(job_file), "--set", "spec.schedule.steps=7") == 0
    said = capsys.readouterr().out
    assert f"job sums created in namespace {mine.namespace}" in said
    assert f"distill watch sums -n {mine.namespace}" in said
    assert mine.job("sums")["spec"]["schedule"]["steps"] == 7


def test_submit_with_watch_ends_as_the_job_does(
    mine: World, distill: Distill, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def play() -> None:
        mine.until("the job", lambda: mine.api.items(mine.path(JOBS)))
        set_status(mine, "sums", "InvalidSpec", "Unknown", "no such volume")

    threading.Thread(target=play).start()
    assert distill("submit", "-f", str(job_file), "--watch") == 78
    assert capsys.readouterr().err == "job sums is not started, InvalidSpec: no such volume\n"


def test_kubectl_has_the_commands_and_their_completion(
    mine: World, crds_installed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.submit("sums")
    for name, module, function in (
        ("kubectl-distill", "distill_cli.main", "main"),
        ("kubectl_complete-distill", "distill_cli.kubectl_completion", "for_kubectl"),
    ):
        program = tmp_path / name
        program.write_text(f"#!{sys.executable}\nfrom {module} import {function}\nraise SystemExit({function}())\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("KUBECONFIG", str(mine.kubeconfig))

    def kubectl(*words: str) -> str:
        command = [str(crds_installed.kubectl_binary), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert kubectl("distill", "list", "-n", mine.namespace).splitlines()[1].startswith("sums   New")
    assert "suspend\t" in kubectl("__complete", "distill", "su")
    assert kubectl("__complete", "distill", "watch", "-n", mine.namespace, "s").startswith("sums\n:4")


def test_submit_again_changes_what_may_change_and_tells_what_may_not(
    mine: World, distill: Distill, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill("submit", "-f", str(job_file))
    assert distill("submit", "-f", str(job_file), "--set", "spec.backoffLimit=9") == 0
    assert "its spec is of generation 2" in capsys.readouterr().out
    assert distill("submit", "-f", str(job_file), "--set", "spec.student.model=/models/other") == 1
    err = capsys.readouterr().err
    assert err.startswith("distill: ") and "immutable" in err and err.count("\n") == 1
    assert mine.job("sums")["spec"]["backoffLimit"] == 9


def test_submit_leaves_nothing_of_a_job_that_the_server_refuses(
    mine: World, distill: Distill, job_file: Path, crds_installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quota, which no check of a manifest can know of."""
    hard = {"count/distillationjobs.distillation-operator.io": "0"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": hard}}
    path = mine.path("/api/v1/namespaces/{ns}/resourcequotas")
    mine.api.call("POST", path, quota)
    mine.api.merge(f"{path}/none/status", {"status": {"hard": hard, "used": dict.fromkeys(hard, "0")}})

    def counts() -> bool:
        try:
            mine.api.call("POST", mine.path(JOBS) + "?dryRun=All", manifest("another"))
        except urllib.error.HTTPError as error:
            return error.code == 403
        return False

    mine.until("the quota", counts)
    assert distill("submit", "-f", str(job_file)) == 1
    assert "exceeded quota" in capsys.readouterr().err
    assert mine.api.items(mine.path(JOBS)) == []


def test_list_shows_every_job_in_columns_and_as_json(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("list") == 0
    assert f"no jobs in namespace {mine.namespace}" in capsys.readouterr().err
    mine.submit("one")
    mine.submit("two")
    set_status(mine, "two", "Running", progress=progress(3), restarts=1)
    assert distill("list") == 0
    head, one, two = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "STATE", "STEP", "KL", "REWARD", "RESTARTS", "AGE"]
    assert one.split()[:3] == ["one", "New", "0/10"]
    assert two.split()[:6] == ["two", "Running", "3/10", "0.60000", "0.50000", "1"]
    assert distill("list", "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(j["name"], j["state"], j["progress"]["step"]) for j in found] == [("one", "New", 0), ("two", "Running", 3)]
    assert main(["list", "-A"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["NAMESPACE", "NAME"]


def after_a_snapshot(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    """Have something happen to a job that is watched, instead of the pauses between two looks at it."""
    instead = SimpleNamespace(sleep=lambda seconds: change(), monotonic=time.monotonic)
    monkeypatch.setattr(importlib.import_module("distill_cli.commands.watch"), "time", instead)


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [("Completed", "True", 0), ("BackoffLimitExceeded", "False", 1), ("ConfigurationError", "False", 78)],
)
def test_watch_follows_a_job_to_its_end_and_ends_as_it_did(
    reason: str,
    status: str,
    code: int,
    mine: World,
    distill: Distill,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine.submit("sums")
    roles = [{"name": "rollout", "desired": 2, "ready": 1, "reason": "Unschedulable"}]
    set_status(mine, "sums", "Running", progress=progress(2), roles=roles)
    event = {
        "metadata": {"name": "sums.1"},
        "regarding": {"apiVersion": "distillation-operator.io/v1alpha1", "kind": "DistillationJob", "name": "sums"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "test",
        "reportingInstance": "test",
        "action": "Reconcile",
        "type": "Warning",
        "reason": "Restarting",
        "note": "a trainer was lost",
    }
    event["regarding"]["namespace"] = mine.namespace
    mine.api.call("POST", mine.path("/apis/events.k8s.io/v1/namespaces/{ns}/events"), event)

    after_a_snapshot(
        monkeypatch,
        lambda: set_status(mine, "sums", reason, status, "as the test wants", progress=progress(5), roles=[]),
    )
    assert distill("watch", "sums") == code
    said = capsys.readouterr()
    for line in ("step 2/10, reverse KL 0.70000, reward 0.50000", "rollout 1/2 Unschedulable", "step 5/10"):
        assert said.out.count(line) == 1
    assert "Restarting: a trainer was lost" in said.out
    assert ("job sums is complete" in said.out) == (code == 0)
    assert (f"job sums failed, {reason}: as the test wants" in said.err) == (code != 0)


def test_watch_writes_an_object_for_each_change(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.submit("sums")
    set_status(mine, "sums", "Completed", "True", progress=progress(5))
    assert distill("watch", "sums", "-o", "json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(m["state"], m["progress"]["step"], m["end"]["code"]) for m in found] == [("Completed", 5, 0)]


def test_a_job_that_is_deleted_ends_its_watch(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.submit("sums")
    after_a_snapshot(monkeypatch, lambda: mine.api.call("DELETE", mine.path(JOBS, "sums")))
    assert distill("watch", "sums") == 1
    assert "job sums was deleted while it was watched" in capsys.readouterr().err


def test_a_job_that_is_not_there_is_told_with_those_that_are(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.submit("sums")
    for command in (["watch", "some"], ["suspend", "some"], ["logs", "some", "trainer"]):
        assert distill(*command) == 1
        said = capsys.readouterr().err
        assert said == f"distill: namespace {mine.namespace} has no DistillationJob some: it has sums\n"


def test_suspend_and_resume_change_the_spec_once(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.submit("sums")
    for command, wanted, first, again in (
        ("suspend", True, "is being suspended; `distill resume sums", "is suspended already"),
        ("resume", False, "goes on; `distill watch sums", "is not suspended"),
    ):
        assert distill(command, "sums") == 0
        assert first in capsys.readouterr().out
        generation = mine.job("sums")["metadata"]["generation"]
        assert mine.job("sums")["spec"]["suspend"] is wanted
        assert distill(command, "sums") == 0
        assert again in capsys.readouterr().out
        assert mine.job("sums")["metadata"]["generation"] == generation
    set_status(mine, "sums", "Completed", "True")
    assert distill("suspend", "sums") == 0
    assert "nothing to do: job sums is complete" in capsys.readouterr().out
    assert mine.job("sums")["spec"]["suspend"] is False


def test_logs_without_a_pod_say_how_the_job_stands(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.submit("sums")
    set_status(mine, "sums", "Pending", message="VolumeNotBound: claim out")
    assert distill("logs", "sums", "teacher") == 1
    assert "job sums has no teacher pod now; it is Pending: VolumeNotBound: claim out." in capsys.readouterr().err


LAST = "last, without an end"


@pytest.fixture
def kubelet(mine: World, tmp_path: Path) -> Iterator[list[str]]:
    """A node whose kubelet answers for the logs of its pods; what it was asked for."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=node"]
    command = ["openssl", *made, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    asked: list[str] = []
    both = threading.Barrier(2)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"first of {self.path.split('/')[3]}\n".encode())
            self.wfile.flush()
            if "follow" in self.path:
                both.wait(60)
            self.wfile.write(LAST.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    node = f"node-{mine.namespace}"
    mine.api.call("POST", "/api/v1/nodes", {"metadata": {"name": node}})
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": server.server_port}},
    }
    mine.api.merge(f"/api/v1/nodes/{node}/status", {"status": status})
    yield asked
    mine.api.call("DELETE", f"/api/v1/nodes/{node}")
    server.shutdown()


def pod(world: World, name: str, role: str, attempt: int | None = None) -> None:
    labels = {"distillation-operator.io/job": "sums", "distillation-operator.io/role": role}
    labels |= {} if attempt is None else {"distillation-operator.io/attempt": str(attempt)}
    containers = [{"name": role, "image": "x"}, {"name": "users", "image": "x"}]
    spec = {"nodeName": f"node-{world.namespace}", "containers": containers}
    world.api.call("POST", world.path(PODS), {"metadata": {"name": name, "labels": labels}, "spec": spec})


def test_logs_of_several_pods_are_told_apart_and_an_old_attempt_is_left_out(
    mine: World, distill: Distill, kubelet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, attempt in (("sums-trainer-1-0", 1), ("sums-trainer-2-0", 2), ("sums-trainer-2-1", 2)):
        pod(mine, name, "trainer", attempt)
    assert distill("logs", "sums", "trainer", "--tail", "5") == 0
    assert capsys.readouterr().out.splitlines() == [
        "sums-trainer-2-0: first of sums-trainer-2-0",
        "sums-trainer-2-0: last, without an end",
        "sums-trainer-2-1: first of sums-trainer-2-1",
        "sums-trainer-2-1: last, without an end",
    ]
    assert all("/trainer?" in path and "tailLines=5" in path for path in kubelet)
    assert distill("logs", "sums", "trainer", "--follow") == 0
    # Each pod says its last only after both have been asked: they are followed side by side.
    parts = [f"sums-trainer-2-{i}: {part}" for i in (0, 1) for part in (f"first of sums-trainer-2-{i}", LAST)]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(parts)


def test_logs_of_one_pod_have_no_prefix_and_may_be_of_the_container_before(
    mine: World, distill: Distill, kubelet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pod(mine, "sums-teacher-0", "teacher")
    assert distill("logs", "sums", "teacher", "--previous") == 0
    assert capsys.readouterr().out.splitlines() == ["first of sums-teacher-0", "last, without an end"]
    assert "previous=true" in kubelet[0]


ROLLOUT = {"kind": "rollout", "step": 3, "picked": "first", "source": "", "reward": 1.0, "response_tokens": 2}
ROLLOUT |= {"prompt": "1+1=", "tokens": ["2", "!"], "kl": [0.1, 2.5]}


@pytest.fixture
def trainer() -> Iterator[list[str]]:
    """What a trainer's rank 0 serves, at the port where the API server looks for it; what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                (json.dumps(ROLLOUT) + "\n" + json.dumps({"kind": "evaluation", "step": 3}) + "\n").encode()
            )

        def log_message(self, *_: Any) -> None:
            pass

    # Not on the loopback, to which an API server proxies nobody.
    server = ThreadingHTTPServer((own_address(), TRAINER_PORT), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield asked
    server.shutdown()
    server.server_close()


def own_address() -> str:
    """Of this machine, towards others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.connect(("192.0.2.1", 9))
        return str(found.getsockname()[0])


def runs(world: World, name: str, address: str) -> None:
    """As a kubelet says it of a pod."""
    ip = {"podIP": address, "podIPs": [{"ip": address}]}
    world.api.merge(f"{world.path(PODS, name)}/status", {"status": {"phase": "Running", **ip}})


def test_samples_of_a_running_job_come_from_its_trainer_through_the_api_server(
    mine: World, distill: Distill, trainer: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mine.submit("sums")
    for attempt in (1, 2):
        pod(mine, f"sums-trainer-{attempt}-0", "trainer", attempt)
        runs(mine, f"sums-trainer-{attempt}-0", own_address())
    assert distill("samples", "sums") == 0
    said = capsys.readouterr().out
    assert "step 3, first, 2 tokens, 1.300 nats per token, reward 1" in said
    assert "1+1=\n2!\nfurthest from the teacher: '!' 2.50" in said
    assert trainer == ["/samples"]
    assert distill("samples", "sums", "--step", "3", "--source", "other") == 1
    said = capsys.readouterr().err
    assert "claim out, which holds the run folder, does not exist" in said, "the volume may have what is not served"


def test_samples_of_a_job_without_a_trainer_ask_for_an_image_to_read_them_with(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.submit("sums")
    set_status(mine, "sums", "Completed", "True", progress=progress(10))
    assert distill("samples", "sums") == 1
    said = capsys.readouterr().err
    assert said.startswith("distill: job sums has no trainer to take the image from") and "--image" in said
    assert said.count("\n") == 1 and mine.pods() == []


def restricted(server: Any, world: World, folder: Path, rules: list[Json]) -> list[str]:
    """Options of an account that has these rights in the test's namespace, and no others."""
    # Not at the top: it is one of pytest's plugins, which are imported later.
    from operator_fixtures import account, grant, kubeconfig_of

    name = f"restricted-{world.namespace}"
    account(server, name)
    grant(server, {"kind": "Role", "metadata": {"name": name, "namespace": world.namespace}, "rules": rules})
    server.kubectl(
        *("create", "rolebinding", name, f"--role={name}", f"--serviceaccount=default:{name}", "-n", world.namespace)
    )
    return ["-n", world.namespace, "--kubeconfig", str(kubeconfig_of(server, name, folder))]


def finding(found: list[Json], check: str) -> Json:
    return next(f for f in found if f["check"] == check)


@pytest.mark.usefixtures("kuberay")
def test_doctor_tells_what_is_there_and_what_to_do_about_the_rest(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("doctor", "-o", "json") == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len(CHECKS)
    for check in ("api", "crd", "namespace", "permissions"):
        assert finding(found, check)["level"] == "ok", found
    assert "is the one of this program" in finding(found, "crd")["message"]
    assert (finding(found, "operator")["level"], finding(found, "kuberay")["level"]) == ("fail", "warn")
    assert finding(found, "monitoring")["level"] == finding(found, "storage")["level"] == "warn"
    assert all(f["remedy"] for f in found if f["level"] != "ok")
    assert distill("doctor") == 1
    assert "fail operator      no operator is installed: jobs stay New; install the chart" in capsys.readouterr().out


def deployment(name: str, image: str) -> Json:
    labels = {"app.kubernetes.io/name": name}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "main", "image": image}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec}


@pytest.mark.usefixtures("kuberay")
def test_doctor_finds_nothing_to_mend_in_a_cluster_that_has_it_all(
    mine: World, distill: Distill, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {"distillation-operator": "operator:1", "kuberay-operator": "quay.io/kuberay/operator:v1.6.1"}
    path, node = mine.path("/apis/apps/v1/namespaces/{ns}/deployments"), f"/api/v1/nodes/node-{mine.namespace}"
    for name, image in images.items():
        mine.api.call("POST", path, deployment(name, image))
        mine.api.merge(f"{path}/{name}/status", {"status": {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1}})
    mine.api.call("POST", "/api/v1/nodes", {"metadata": {"name": f"node-{mine.namespace}"}})
    capacity = {"status": {"allocatable": {"nvidia.com/gpu": "8", "cpu": "4"}, "capacity": {"nvidia.com/gpu": "8"}}}
    try:
        mine.api.merge(f"{node}/status", capacity)
        assert distill("doctor", "-o", "json") == 0
        found = json.loads(capsys.readouterr().out)
    finally:
        for made in (node, *(f"{path}/{name}" for name in images)):
            mine.api.call("DELETE", made)
    assert finding(found, "operator")["level"] == "ok"
    assert "KubeRay v1.6.1 is ready" in finding(found, "kuberay")["message"]
    assert "nvidia.com/gpu 8 (at most 8 on a node)" in finding(found, "accelerators")["message"]


def test_doctor_asks_for_the_rights_that_a_user_lacks_and_needs_none_to_say_so(
    mine: World, crds_installed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user = restricted(crds_installed, mine, tmp_path, [])
    assert main(["doctor", "-o", "json", *user]) == 1
    found = json.loads(capsys.readouterr().out)
    lacking = finding(found, "permissions")
    assert lacking["level"] == "fail" and "create distillationjobs" in lacking["message"]
    assert {finding(found, c)["level"] for c in ("operator", "accelerators", "storage", "namespace")} == {"warn"}
    assert main(["list", *user]) == 1
    assert "not allowed: " in capsys.readouterr().err


def test_the_rights_that_doctor_asks_for_are_enough_for_every_command(
    mine: World, crds_installed: Any, tmp_path: Path, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but pods/proxy, without which `watch` shows no stage times, and `samples` says what to ask for."""
    rules = [
        {"apiGroups": [r.group], "resources": [f"{r.resource}/{r.subresource}".rstrip("/")], "verbs": [r.verb]}
        for r in RIGHTS
        if r.subresource != "proxy"
    ]
    user = restricted(crds_installed, mine, tmp_path, rules)
    for command in (["submit", "-f", str(job_file)], ["suspend", "sums"], ["resume", "sums"], ["list"]):
        assert main([*command, *user]) == 0
    set_status(mine, "sums", "Completed", "True", progress=progress(5))
    assert main(["watch", "sums", *user]) == 0
    pod(mine, "sums-trainer-1-0", "trainer", 1)
    runs(mine, "sums-trainer-1-0", "192.0.2.1")
    assert main(["samples", "sums", *user]) == 1
    assert "not allowed: " in capsys.readouterr().err
    main(["doctor", "-o", "json", *user])
    lacking = finding(json.loads(capsys.readouterr().out), "permissions")
    assert (
        lacking["level"] == "warn"
        and "get pods/proxy (for samples, and the stage times of watch)" in lacking["message"]
    )
