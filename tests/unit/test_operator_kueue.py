"""Kueue: what a job takes is what its pods will ask for, and nothing of Kueue's reaches the children."""

from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from operator_fakes import SETTINGS, job, manifest

from distill_api.job import DistillationJob, load_job, parse_job
from distill_operator.kueue import workload
from distill_operator.resources import rendering
from distill_operator.settings import Settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kueue"
UNITS = {"m": Decimal("0.001"), "Gi": Decimal(2**30), "Mi": Decimal(2**20)}


def amount(quantity: Any) -> Decimal:
    text = str(quantity)
    unit = next((u for u in UNITS if text.endswith(u)), "")
    return Decimal(text.removesuffix(unit)) * UNITS.get(unit, Decimal(1))


def asked(containers: list[dict[str, Any]], count: int) -> Counter[str]:
    """As Kueue counts: a limit stands for a request that is missing."""
    found: Counter[str] = Counter()
    for container in containers:
        resources = container["resources"]
        for name, quantity in {**resources.get("limits", {}), **resources.get("requests", {})}.items():
            found[name] += amount(quantity) * count  # type: ignore[assignment]
    return found


def takes(of: DistillationJob) -> Counter[str]:
    found: Counter[str] = Counter()
    for pod_set in workload.pod_sets(of, SETTINGS):
        found += asked(pod_set["template"]["spec"]["containers"], pod_set["count"])
    return found


def test_a_pod_set_for_each_kind_of_pod() -> None:
    of = job(
        teacher={"model": "/models/teacher", "replicas": 2},
        rollout={"replicas": 4},
        trainer={"nodes": 3},
    )
    found = workload.pod_sets(of, SETTINGS)
    assert [(p["name"], p["count"]) for p in found] == [("teacher", 2), ("head", 1), ("engine", 4), ("trainer", 3)]


def test_pod_sets_are_the_templates_of_the_children_themselves() -> None:
    teacher, ray = rendering.serving(job(), SETTINGS)
    trainer = rendering.training(job(), SETTINGS, 1)
    assert [p["template"] for p in workload.pod_sets(job(), SETTINGS)] == [
        teacher["spec"]["template"],
        ray["spec"]["headGroupSpec"]["template"],
        ray["spec"]["workerGroupSpecs"][0]["template"],
        trainer["spec"]["template"],
    ]


def test_no_label_or_annotation_of_kueue_is_on_a_child() -> None:
    """Kueue would take the child for a job of its own, and admit the engines without the trainer."""
    raw = manifest(scheduling={"gang": "volcano", "scope": "job"})
    raw["metadata"] |= {
        "labels": {"kueue.x-k8s.io/queue-name": "research", "kueue.x-k8s.io/priority-class": "high"},
        "annotations": {"kueue.x-k8s.io/prebuilt-workload-name": "mine"},
    }
    of = parse_job(raw)
    made = [
        *rendering.lasting(of, SETTINGS),
        *rendering.group(of, SETTINGS),
        *rendering.serving(of, SETTINGS),
        rendering.training(of, SETTINGS, 1),
    ]
    assert "kueue" not in yaml.safe_dump_all(made)
    assert workload.workload(of, SETTINGS)["spec"]["queueName"] == "research"


def test_the_workload_of_the_examples_is_that_of_its_job() -> None:
    settings = Settings(workers_image="registry.example/distill-workers:1")
    shown = yaml.safe_load((EXAMPLES / "workload.yaml").read_text())
    assert shown == workload.workload(load_job(EXAMPLES / "job.yaml"), settings)


def test_the_wrapper_of_the_examples_asks_for_exactly_what_its_job_takes() -> None:
    wrapper = yaml.safe_load((EXAMPLES / "appwrapper.yaml").read_text())
    counted, wrapped = wrapper["spec"]["components"]
    (pod_set,) = counted["podSets"]
    assert pod_set["path"] == "template.template"
    of = parse_job(wrapped["template"])
    assert pod_set["replicas"] == of.spec.trainer.nodes, "it has succeeded when the trainer's pods have"
    containers = counted["template"]["template"]["spec"]["containers"]
    assert asked(containers, pod_set["replicas"]) == takes(of)
    label = {"workload.codeflare.dev/appwrapper": wrapper["metadata"]["name"]}
    labels = {p["name"]: p["template"]["metadata"]["labels"] for p in workload.pod_sets(of, SETTINGS)}
    assert [name for name, found in labels.items() if label.items() <= found.items()] == ["trainer"]
    queued = load_job(EXAMPLES / "job.yaml")
    assert takes(queued) == takes(of)
    assert queued.spec.suspend and not of.spec.suspend, "the wrapper is what waits"
