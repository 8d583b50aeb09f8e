"""The examples for Kueue, judged by the CRDs of Kueue and of AppWrapper; and the job's half of the contract."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_world import JOBS, Kubelet, World

from go_modules import downloaded

pytest_plugins = ["operator_fixtures"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "kueue"
CACHE = Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distillation-operator")
MODULES = {
    "sigs.k8s.io/kueue@v0.19.2": (
        "h1:mPNzr37u0nwI7ikST5QQl5gg6EgtYOAvC9ZbTgywdN8=",
        "config/components/crd/bases",
        ("workloads", "clusterqueues", "localqueues", "resourceflavors"),
    ),
    "github.com/project-codeflare/appwrapper@v1.1.2": (
        "h1:iEEyYGSDXOxMXc/AZEvTDDXy1DNi+cWUQ93uM6XAXJc=",
        "config/crd/bases",
        ("appwrappers",),
    ),
}
"""Module and version, its checksum, where its CRDs are, which of them are wanted. All are Apache-2.0."""


def crd_files(module: str) -> list[Path]:
    """In the cache, filled on first use from the Go module proxy."""
    checksum, folder, plurals = MODULES[module]
    kept = CACHE / "crds" / module.replace("/", "_")
    if not kept.exists():
        told = downloaded(module, Path("/"))
        assert told["Sum"] == checksum, f"{module} is not what it was"
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        aside.mkdir(parents=True)
        for path in (Path(told["Dir"]) / folder).glob("*.yaml"):
            if path.stem.rpartition("_")[2] in plurals:
                shutil.copyfile(path, aside / path.name)
        aside.rename(kept)
    files = sorted(kept.glob("*.yaml"))
    assert len(files) == len(plurals)
    return files


@pytest.fixture(scope="module")
def kueue(crds_installed: Any) -> Iterator[Any]:
    """The server, with the CRDs of Kueue and AppWrapper, and without their webhooks."""
    files = [path for module in MODULES for path in crd_files(module)]
    names = []
    for path in files:
        found = yaml.safe_load(path.read_text())
        # No webhook runs here to convert; each object is written in the version that is stored.
        found["spec"]["conversion"] = {"strategy": "None"}
        names.append(found["metadata"]["name"])
        crds_installed.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(found))
    for name in names:
        crds_installed.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{name}")
    shutil.rmtree(crds_installed.kubeconfig.parent / "kubectl-cache", ignore_errors=True)
    yield crds_installed
    crds_installed.kubectl("delete", "crd", *names, "--wait=false")


def submit(server: Any, namespace: str, path: Path) -> Any:
    """Every document of an example, strictly; those of a namespace in that of the test."""
    for document in yaml.safe_load_all(path.read_text()):
        if "namespace" in document["metadata"]:
            document["metadata"]["namespace"] = namespace
        server.kubectl("create", "--validate=strict", "-f", "-", stdin=json.dumps(document))


def test_the_examples_are_what_kueue_takes(kueue: Any, namespace: str) -> None:
    for name in ("queues", "job", "workload", "appwrapper"):
        submit(kueue, namespace, EXAMPLES / f"{name}.yaml")
    found = json.loads(kueue.kubectl("get", "workload", "distillationjob-queued", "-n", namespace, "-o", "json").stdout)
    assert [p["name"] for p in found["spec"]["podSets"]] == ["teacher", "head", "engine", "trainer"]
    broken = yaml.safe_load((EXAMPLES / "workload.yaml").read_text())
    broken["metadata"] = {"name": "broken", "namespace": namespace}
    broken["spec"]["podSets"][0]["count"] = -1
    refused = kueue.kubectl("create", "-f", "-", stdin=json.dumps(broken), check=False)
    assert "spec.podSets[0].count" in refused.stderr


def test_what_the_wrapper_makes_is_what_the_server_takes(kueue: Any, namespace: str) -> None:
    wrapper = yaml.safe_load((EXAMPLES / "appwrapper.yaml").read_text())
    for component in wrapper["spec"]["components"]:
        body = component["template"]
        kueue.kubectl("create", "--validate=strict", "-n", namespace, "-f", "-", stdin=json.dumps(body))


@pytest.mark.usefixtures("kuberay")
def test_a_queued_job_makes_no_pod_until_it_is_admitted_and_none_after_its_eviction(
    world: World, kubelet: Kubelet
) -> None:
    world.claim()
    world.operator()
    world.submit(suspend=True)
    world.until_condition("Suspended", "Suspended", "True")
    time.sleep(0.5)
    assert not world.children() and not world.pods()
    assert world.job()["status"].get("attempts", 0) == 0
    path = world.path(JOBS, "job")
    world.api.merge(path, {"spec": {"suspend": False}})
    world.until_condition("Succeeded", "Running")
    world.api.merge(path, {"spec": {"suspend": True}})
    world.until("no pods", lambda: not world.pods())
    for child in world.children().values():
        assert not [k for k in child["metadata"].get("labels", {}) if "kueue" in k]
