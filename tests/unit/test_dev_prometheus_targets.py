"""The target file of the embedded cluster's Prometheus: which pods are in it, and under which labels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEV = Path(__file__).parents[2] / "dev"


@pytest.fixture(scope="module")
def discovery() -> ModuleType:
    """The script, which is in no package."""
    spec = importlib.util.spec_from_file_location("prometheus_targets", DEV / "cluster/prometheus_targets.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pod(name: str = "job-trainer-0", **changes: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "team", "labels": {"distillation-operator.io/job": "job"}}
    ports = [{"name": "http", "containerPort": 80}, {"name": "metrics", "containerPort": 9400}]
    return {
        "metadata": metadata | changes.get("metadata", {}),
        "spec": {"containers": [{"name": "main", "ports": changes.get("ports", ports)}, {"name": "without-ports"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.7"} | changes.get("status", {}),
    }


def test_a_running_pod_is_scraped_at_its_metrics_port(discovery: ModuleType) -> None:
    labels = {"namespace": "team", "pod": "job-trainer-0", "__metrics_path__": "/metrics", "distillation_job": "job"}
    assert discovery.targets([pod()]) == [{"targets": ["10.0.0.7:9400"], "labels": labels}]


def test_a_pod_of_an_engine_is_scraped_at_sglangs_port_and_at_rays(discovery: ModuleType) -> None:
    ports = [{"name": "metrics", "containerPort": 30000}, {"name": "ray-metrics", "containerPort": 8080}]
    found = [entry["targets"] for entry in discovery.targets([pod(ports=ports)])]
    assert found == [["10.0.0.7:30000"], ["10.0.0.7:8080"]]


def test_role_and_path_come_from_the_pod(discovery: ModuleType) -> None:
    metadata = {
        "labels": {"distillation-operator.io/role": "teacher"},
        "annotations": {"prometheus.io/path": "/engine_metrics"},
    }
    (entry,) = discovery.targets([pod(metadata=metadata)])
    assert entry["labels"]["role"] == "teacher"
    assert entry["labels"]["__metrics_path__"] == "/engine_metrics"


@pytest.mark.parametrize(
    "changes",
    [
        {"status": {"phase": "Pending"}},
        {"status": {"podIP": None}},
        {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
        {"ports": [{"name": "http", "containerPort": 80}]},
    ],
    ids=["pending", "without an address", "going", "without a metrics port"],
)
def test_a_pod_that_cannot_answer_is_no_target(discovery: ModuleType, changes: dict[str, Any]) -> None:
    assert discovery.targets([pod(**changes)]) == []


def test_the_order_of_the_list_does_not_matter(discovery: ModuleType) -> None:
    pods = [pod("b"), pod("a"), pod("c")]
    assert discovery.targets(pods) == discovery.targets(pods[::-1])


def test_the_file_is_replaced_only_when_something_changed(discovery: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    discovery.write_if_changed(file, discovery.targets([pod()]))
    before = file.stat().st_ino
    discovery.write_if_changed(file, discovery.targets([pod()]))
    assert file.stat().st_ino == before
    discovery.write_if_changed(file, [])
    assert file.read_text() == "[]"
