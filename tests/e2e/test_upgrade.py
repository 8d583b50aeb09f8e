"""`helm upgrade` from the release before, under a job that runs: nothing of it is touched, and the next job is new."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DEV, LABEL_JOB, REPO, Jobs, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

[RELEASE] = (REPO / "tests" / "releases").glob("*.tar.gz")
BEFORE = RELEASE.name.removesuffix(".tar.gz")
SYSTEM = "distillation-system"
CRD = "distillationjobs.distillation-operator.io"


def install_release(folder: Path) -> None:
    """The chart and the operator of the release; today's workers under its tag, as an upgrade changes no pod's code."""
    with tarfile.open(RELEASE) as archive:
        archive.extractall(folder, filter="data")
    run(DEV / "images.sh", f"operator@{BEFORE}")
    workers = "local.test/distillation-workers"
    run("bash", "-c", f'. "{DEV}/cluster/lib.sh" && ctrk images tag --force {workers}:dev {workers}:{BEFORE}')
    values = f"image.repository=local.test/distillation-operator,image.tag={BEFORE},workersImage={workers}:{BEFORE}"
    chart = folder / "charts" / "distillation-operator"
    options = ("--namespace", SYSTEM, "--take-ownership", "--set", values, "--wait", "--timeout", "3m")
    run("helm", "upgrade", "--install", "distillation-operator", chart, *options)


def installed() -> tuple[str, str, Any]:
    """Version of the chart, image of the operator that runs, schema that the API server serves for jobs."""
    [release] = json.loads(run("helm", "list", "--namespace", SYSTEM, "-o", "json"))
    label = "app.kubernetes.io/name=distillation-operator"
    pods = json.loads(run("kubectl", "-n", SYSTEM, "get", "pods", "-l", label, "-o", "json"))["items"]
    [image] = {p["spec"]["containers"][0]["image"] for p in pods if "deletionTimestamp" not in p["metadata"]}
    crd = json.loads(run("kubectl", "get", "crd", CRD, "-o", "json"))
    return release["chart"], image, crd["spec"]["versions"][0]["schema"]


Pods = dict[str, tuple[str, list[int], list[str]]]


def pods_of(jobs: Jobs, name: str) -> Pods:
    """uid, restarts and images of each pod of a job."""
    found = json.loads(jobs.kubectl("get", "pods", "-l", f"{LABEL_JOB}={name}", "-o", "json"))["items"]
    return {
        pod["metadata"]["name"]: (
            pod["metadata"]["uid"],
            [c["restartCount"] for c in pod["status"].get("containerStatuses", [])],
            [c["image"] for c in pod["spec"]["containers"]],
        )
        for pod in found
    }


def images_of(pods: Pods) -> set[str]:
    return {image for _, _, images in pods.values() for image in images}


def children_of(jobs: Jobs, name: str) -> dict[str, tuple[str, int]]:
    """uid and generation of what has pods; resourceVersion of what has none."""
    kinds = {"deployments": "generation", "rayclusters": "generation", "jobs": "generation"}
    kinds |= dict.fromkeys(("configmaps", "services", "networkpolicies"), "resourceVersion")
    return {
        f"{kind}/{item['metadata']['name']}": (item["metadata"]["uid"], item["metadata"][field])
        for kind, field in kinds.items()
        for item in json.loads(jobs.kubectl("get", kind, "-l", f"{LABEL_JOB}={name}", "-o", "json"))["items"]
    }


def test_a_running_job_goes_on_untouched_through_an_upgrade_and_the_next_is_of_the_new_version(
    jobs: Jobs, tmp_path: Path
) -> None:
    """Leaves the present chart installed."""
    name = "carries-on"
    version = re.search(
        r"^version: (.*)$", (REPO / "charts/distillation-operator/Chart.yaml").read_text(), re.MULTILINE
    )
    assert version
    try:
        install_release(tmp_path)
        chart, image, _ = installed()
        assert (chart, image.rpartition(":")[2]) == (f"distillation-operator-{BEFORE}", BEFORE)
        schedule = {"steps": 60, "checkpointEverySteps": 60}
        # As users had written it: the release does not know podTemplate.
        example = "tests/releases/examples-0.2.0/arithmetic-cpu"
        jobs.arithmetic(name, example, schedule=schedule, rollout={"promptsPerStep": 32}, evaluation=[])
        jobs.wait("the first steps", lambda: jobs.step(name) >= 2, 600)
        pods, children = pods_of(jobs, name), children_of(jobs, name)
        assert images_of(pods) == {f"local.test/distillation-workers:{BEFORE}"}
    finally:
        run(DEV / "install.sh")
    chart, image, schema = installed()
    assert (chart, image.rpartition(":")[2]) == (f"distillation-operator-{version[1]}", "dev")
    crd = yaml.safe_load((REPO / "charts/distillation-operator/files/crds/distillationjobs.yaml").read_text())
    assert schema == crd["spec"]["versions"][0]["schema"]

    step = jobs.step(name)
    assert step < 55, "the job must be in the middle when the new operator takes it up"
    jobs.wait("steps under the new operator", lambda: jobs.step(name) >= step + 5)
    assert (pods_of(jobs, name), children_of(jobs, name)) == (pods, children)
    assert jobs.finish(name)["status"] == "True", jobs.picture()
    status = jobs.status(name)
    assert (status["attempts"], status["restarts"], status["progress"]["step"]) == (1, 0, 60)
    lines = [json.loads(x) for x in (jobs.output / name / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "step"] == list(range(1, 61))
    jobs.delete(name)

    # That such a job succeeds is what every other test shows.
    jobs.arithmetic("is-new", schedule={"steps": 2, "checkpointEverySteps": 2}, evaluation=[])
    jobs.wait("its teacher and its engines have pods", lambda: len(jobs.pods_of("is-new")) >= 3)
    assert images_of(pods_of(jobs, "is-new")) == {"local.test/distillation-workers:dev"}
    # Also a trainer whose container has just been started receives its SIGTERM: else it would live for two minutes.
    jobs.wait("its trainer is being started", lambda: jobs.names("pods", f"{LABEL_JOB}=is-new,job-name"), 120)
    jobs.delete("is-new")
