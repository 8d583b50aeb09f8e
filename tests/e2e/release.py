"""The release before, as tests/releases keeps it, installed in place of the present chart; and what is installed."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

from conftest import DEV, REPO, SYSTEM, Jobs, run

[RELEASE] = (REPO / "tests" / "releases").glob("*.tar.gz")
BEFORE = RELEASE.name.removesuffix(".tar.gz")
CRD = "distillationjobs.distillation-operator.io"
OPERATOR, WORKERS = "local.test/distillation-operator", "local.test/distillation-workers"

Pods = dict[str, tuple[str, list[int], list[str]]]


def present_version() -> str:
    found = re.search(r'^version = "(.*)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def tag(image: str, version: str) -> None:
    """Give the image that was built here a version, as if it had been pushed to a registry of the cluster."""
    run("bash", "-c", f'. "{DEV}/cluster/lib.sh" && ctrk images tag --force {image}:dev {image}:{version}')


def install_release(folder: Path) -> None:
    """Install chart and operator of the release; today's workers under its tag, as an upgrade changes no pod's code."""
    with tarfile.open(RELEASE) as archive:
        archive.extractall(folder, filter="data")
    run(DEV / "images.sh", f"operator@{BEFORE}")
    tag(WORKERS, BEFORE)
    values = f"image.repository={OPERATOR},image.tag={BEFORE},workersImage={WORKERS}:{BEFORE}"
    chart = folder / "charts" / "distillation-operator"
    options = ("--namespace", SYSTEM, "--create-namespace", "--take-ownership", "--set", values, "--wait")
    run("helm", "upgrade", "--install", "distillation-operator", chart, *options, "--timeout", "3m")
    run("kubectl", "wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=60s")


def installed() -> tuple[str, str, Any]:
    """Return version of the chart, image of the operator that runs, schema that the API server serves for jobs."""
    [release] = json.loads(run("helm", "list", "--namespace", SYSTEM, "-o", "json"))
    label = "app.kubernetes.io/name=distillation-operator"
    pods = json.loads(run("kubectl", "-n", SYSTEM, "get", "pods", "-l", label, "-o", "json"))["items"]
    [image] = {p["spec"]["containers"][0]["image"] for p in pods if "deletionTimestamp" not in p["metadata"]}
    crd = json.loads(run("kubectl", "get", "crd", CRD, "-o", "json"))
    return release["chart"], image, crd["spec"]["versions"][0]["schema"]


def pods_of(jobs: Jobs, name: str) -> Pods:
    """Return uid, restarts and images of each pod of a job."""
    return {
        pod["metadata"]["name"]: (
            pod["metadata"]["uid"],
            [c["restartCount"] for c in pod["status"].get("containerStatuses", [])],
            [c["image"] for c in pod["spec"]["containers"]],
        )
        for pod in jobs.of_job("pods", name)
    }


def images_of(pods: Pods) -> set[str]:
    return {image for _, _, images in pods.values() for image in images}


def children_of(jobs: Jobs, name: str) -> dict[str, tuple[str, int]]:
    """Return uid and generation of what has pods; resourceVersion of what has none."""
    kinds = {"deployments": "generation", "rayclusters": "generation", "jobs": "generation"}
    kinds |= dict.fromkeys(("configmaps", "services", "networkpolicies"), "resourceVersion")
    return {
        f"{kind}/{item['metadata']['name']}": (item["metadata"]["uid"], item["metadata"][field])
        for kind, field in kinds.items()
        for item in jobs.of_job(kind, name)
    }
