"""The CRD on a real API server: its verdicts, its defaults and its sentences are those of the models."""

import copy
import http.client
import json
import re
import ssl
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import TOKEN, ApiServer

from distill_api.base import GROUP, PLURAL, VERSION
from distill_api.generate.crd import crd
from distill_api.job import InvalidManifest, load_job, parse_job
from distill_api.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "tests" / "manifests"
EXAMPLES = [*sorted((ROOT / "examples").glob("*.yaml")), *sorted((ROOT / "examples" / "recipes").glob("*.yaml"))]
BAD = sorted((MANIFESTS / "bad").glob("*.yaml"))
GOOD = [*sorted((MANIFESTS / "good").glob("*.yaml")), *EXAMPLES]
GOOD = [path for path in GOOD if "kind: DistillationJob" in path.read_text()]
MINIMAL: dict[str, Any] = read_manifest((MANIFESTS / "good" / "minimal.yaml").read_text())


class Client:
    """One connection to the server: a kubectl for each of a thousand questions would take minutes."""

    def __init__(self, server: ApiServer) -> None:
        authority = server.kubeconfig.parent / "certificates" / "apiserver.crt"
        address = urlsplit(server.url)
        context = ssl.create_default_context(cafile=str(authority))
        self._connection = http.client.HTTPSConnection(str(address.hostname), address.port, context=context)

    def ask(self, method: str, path: str, body: Any, content: str = "application/json") -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": content}
        self._connection.request(method, path, json.dumps(body), headers)
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def create(self, namespace: str, manifest: Any, dry_run: bool = True) -> tuple[int, dict[str, Any]]:
        """The HTTP code, and the object or the Status that says why not; strict, as kubectl asks."""
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        return self.ask("POST", f"{jobs(namespace)}{query}", manifest)


def jobs(namespace: str) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"


@pytest.fixture(scope="module")
def client(crds_installed: ApiServer) -> Client:
    return Client(crds_installed)


def test_the_crd_is_established_and_has_no_warning(crds_installed: ApiServer) -> None:
    name = f"{PLURAL}.{GROUP}"
    found = json.loads(crds_installed.kubectl("get", "crd", name, "-o", "json").stdout)
    conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
    assert conditions["Established"] == "True"
    assert conditions.get("NonStructuralSchema", "False") == "False"


def test_a_second_apply_of_the_crd_changes_nothing(crds_installed: ApiServer) -> None:
    assert "unchanged" in crds_installed.kubectl("apply", "-f", str(ROOT / "crds")).stdout


def test_kubectl_explain_shows_the_descriptions(crds_installed: ApiServer) -> None:
    deadline = time.monotonic() + 120  # the server publishes the schema a while after it serves the kind
    while crds_installed.kubectl("explain", "djob.spec", check=False).returncode and time.monotonic() < deadline:
        time.sleep(0.5)
    shown = crds_installed.kubectl("explain", "djob.spec.objective.support").stdout
    assert "sampled-token: at the sampled token, as an advantage" in " ".join(shown.split())


@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.stem)
def test_a_good_manifest_is_accepted_and_gets_the_defaults_of_the_models(
    path: Path, crds_installed: ApiServer, namespace: str
) -> None:
    shown = crds_installed.kubectl("create", "-n", namespace, "--validate=strict", "-o", "json", "-f", str(path)).stdout
    expected = load_job(path).spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    served = json.loads(shown)["spec"]
    assert as_written(served) == as_written(expected)


def as_written(spec: Any) -> Any:
    """cpu: 2 stays a number on the server, and is a string in the models."""
    if isinstance(spec, dict):
        quantities = {"requests", "limits"} & spec.keys()
        return {k: {n: str(q) for n, q in v.items()} if k in quantities else as_written(v) for k, v in spec.items()}
    return [as_written(item) for item in spec] if isinstance(spec, list) else spec


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_accepted_as_it_is(path: Path, crds_installed: ApiServer, namespace: str) -> None:
    crds_installed.kubectl("apply", "-n", namespace, "--validate=strict", "-f", str(path))


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.stem)
def test_a_bad_manifest_is_refused_with_a_sentence(path: Path, crds_installed: ApiServer, namespace: str) -> None:
    text = path.read_text()
    expected = re.search("^# expect: (.*)$", text, re.MULTILINE)
    assert expected, f"{path} lacks its expectation"
    *before, last = text.split("---\n")
    for document in before:
        crds_installed.kubectl("apply", "-n", namespace, "--validate=strict", "-f", "-", stdin=document)
    done = crds_installed.kubectl("apply", "-n", namespace, "--validate=strict", "-f", "-", stdin=last, check=False)
    assert done.returncode != 0, "it was accepted"
    assert re.search(expected[1], done.stderr, re.IGNORECASE), done.stderr


def fields_of(schema: dict[str, Any], path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """The path of every field of a schema; of a list, in its first item."""
    for name, node in schema.get("properties", {}).items():
        here = (*path, name)
        yield here
        yield from fields_of(node, here)
        if "items" in node:
            yield (*here, 0)
            yield from fields_of(node["items"], (*here, 0))


def put(manifest: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with one value set, and what is missing on the way made."""
    made = copy.deepcopy(manifest)
    node: Any = made
    for part, following in pairwise(path):
        if isinstance(part, int):
            while len(node) <= part:
                node.append([] if isinstance(following, int) else {})
            node = node[part]
        else:
            node = node.setdefault(part, [] if isinstance(following, int) else {})
    if isinstance(path[-1], int):
        node[:] = [value]
    else:
        node[path[-1]] = value
    return made


SPEC = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
# Not "1e-6": the models must take it, as they cannot see whether the file had quotes around it.
VALUES = (None, "x", "", "3", 0, 1, -1, 0.5, 10**12, True, [], {}, ["x"], {"x": "y"}, {"x": None})


@pytest.mark.parametrize("block", sorted(SPEC["properties"]))
def test_the_server_and_the_models_agree_on_every_field_and_kind_of_value(
    block: str, client: Client, namespace: str
) -> None:
    """Every field of the spec set to each of some values, right and wrong: some thousand questions in all."""
    paths = [path for path in fields_of(SPEC, ("spec",)) if path[1] == block]
    differ = []
    for path in paths:
        for value in VALUES:
            manifest = put(MINIMAL, path, value)
            code, answer = client.create(namespace, manifest)
            output = manifest["spec"].get("output")
            if not (isinstance(output, dict) and output.get("volume")):
                assert code != 201, "a volume is needed on a cluster, and not for `distill run`"
                continue
            try:
                parse_job(manifest)
                problems = []
            except InvalidManifest as error:
                problems = error.problems
            if (code == 201) == bool(problems):
                differ.append((path, value, code, answer.get("message"), problems))
    assert differ == []


def test_the_status_is_written_only_through_its_subresource(client: Client, namespace: str) -> None:
    code, made = client.create(namespace, {**MINIMAL, "status": {"restarts": 7}}, dry_run=False)
    assert code == 201 and "status" not in made
    path = f"{jobs(namespace)}/minimal"
    patch = {"status": {"restarts": 1}, "spec": {"suspend": True}}
    code, patched = client.ask("PATCH", f"{path}/status", patch, "application/merge-patch+json")
    assert code == 200
    assert patched["status"] == {"restarts": 1}
    assert (patched["spec"]["suspend"], patched["metadata"]["generation"]) == (False, 1)
    code, patched = client.ask("PATCH", path, {"status": {"restarts": 5}}, "application/merge-patch+json")
    assert (code, patched["status"]) == (200, {"restarts": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"suspend": True},
        {"rollout": {"replicas": 3}},
        {"backoffLimit": 0},
        {"activeDeadlineSeconds": 60},
        {"preRunningDeadlineSeconds": 60},
        {"stallTimeoutSeconds": 60},
        {"ttlSecondsAfterFinished": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_may_change_can_be_set_and_unset_while_the_job_exists(
    change: dict[str, Any], client: Client, namespace: str
) -> None:
    client.create(namespace, MINIMAL, dry_run=False)
    path = f"{jobs(namespace)}/minimal"
    code, patched = client.ask("PATCH", path, {"spec": change}, "application/merge-patch+json")
    assert code == 200, patched
    name = next(iter(change))
    code, patched = client.ask("PATCH", path, {"spec": {name: None}}, "application/merge-patch+json")
    assert code == 200, patched


def test_the_replicas_of_each_teacher_may_change_while_the_job_exists(client: Client, namespace: str) -> None:
    client.create(namespace, MINIMAL, dry_run=False)
    several = read_manifest((ROOT / "tests" / "manifests" / "good" / "several-teachers.yaml").read_text())
    client.create(namespace, several, dry_run=False)
    teachers = several["spec"]["teachers"]
    teachers[0]["replicas"] = 5
    for name, change in (("minimal", {"teacher": {"replicas": 3}}), ("several-teachers", {"teachers": teachers})):
        path = f"{jobs(namespace)}/{name}"
        code, patched = client.ask("PATCH", path, {"spec": change}, "application/merge-patch+json")
        assert code == 200, patched


def test_the_printer_columns_show_where_the_job_is(crds_installed: ApiServer, client: Client, namespace: str) -> None:
    client.create(namespace, MINIMAL, dry_run=False)
    now = "2026-01-02T03:04:05Z"

    def condition(kind: str, status: str, reason: str) -> dict[str, Any]:
        return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": now, "message": ""}

    status = {
        "restarts": 2,
        "conditions": [
            condition("Succeeded", "Unknown", "Running"),
            condition("TeacherReady", "True", "Ready"),
            condition("RolloutReady", "False", "ImagePullFailed"),
            condition("TrainerReady", "False", "Unschedulable"),
        ],
        "roles": [{"name": "teacher", "desired": 1, "ready": 1}, {"name": "rollout", "desired": 4, "ready": 3}],
        "progress": {"step": 12, "reverseKL": "0.0312", "reward": "0.75", "tokensPerSecond": "812.5"},
    }
    path = f"{jobs(namespace)}/minimal/status"
    code, answer = client.ask("PATCH", path, {"status": status}, "application/merge-patch+json")
    assert code == 200, answer
    head, row = crds_installed.kubectl("get", "djob", "-n", namespace).stdout.splitlines()
    assert head.split() == ["NAME", "STATE", "STEP", "KL", "REWARD", "TEACHER", "ROLLOUT", "TRAINER", "RESTARTS", "AGE"]
    name, *values, _age = row.split()
    assert name == "minimal"
    assert values == ["Running", "12", "0.0312", "0.75", "Ready", "ImagePullFailed", "Unschedulable", "2"]
    head, row = crds_installed.kubectl("get", "distillation", "-n", namespace, "-o", "wide").stdout.splitlines()
    assert head.split()[-4:] == ["ENGINES", "TOKENS/S", "REMAINING", "STUDENT"]
    assert "3" in row.split() and row.split()[-1] == "/models/student"


def test_a_condition_is_merged_by_its_type_by_server_side_apply(client: Client, namespace: str) -> None:
    client.create(namespace, MINIMAL, dry_run=False)
    path = f"{jobs(namespace)}/minimal/status?fieldManager="

    def applied(kind: str) -> Any:
        condition = {"type": kind, "status": "True", "reason": "R", "lastTransitionTime": "2026-01-02T03:04:05Z"}
        head = {key: MINIMAL[key] for key in ("apiVersion", "kind")} | {"metadata": {"name": "minimal"}}
        body = {**head, "status": {"conditions": [condition]}}
        code, answer = client.ask("PATCH", path + kind, body, "application/apply-patch+yaml")
        assert code == 200, answer
        return [c["type"] for c in answer["status"]["conditions"]]

    assert applied("Ready") == ["Ready"]
    assert applied("Stalled") == ["Ready", "Stalled"]
