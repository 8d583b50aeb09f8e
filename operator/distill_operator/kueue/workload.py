"""The Workload of a job, as Kueue counts quota: one pod set for each kind of pod. A command line tool (docs/kueue.md).

The operator does not call it, and keeps only Kueue's other half, spec.suspend. A controller for the external framework
`DistillationJob.v1alpha1.distillation-operator.io` owns the Workload: it makes the one of `workload()` for a suspended
job with a queue, unsuspends the job once that is admitted, suspends it when it is evicted, and writes Finished by the
job's condition Succeeded. `python -m distill_operator.kueue.workload JOB.yaml` prints the Workload.
"""

import os
import sys
from pathlib import Path

import yaml

from distill_api.job import DistillationJob, InvalidManifest, load_job
from distill_operator.kinds import Kind, kind_of
from distill_operator.resources import rendering
from distill_operator.resources.pod_template import Json
from distill_operator.settings import InvalidSettings, Settings

PLACEMENT = (
    "nodeSelector", "affinity", "tolerations", "priorityClassName", "schedulerName", "runtimeClassName",
    "restartPolicy", "topologySpreadConstraints", "resourceClaims", "hostNetwork", "overhead",
)  # fmt: skip
COUNTED = ("name", "image", "resources", "restartPolicy")
"""Fields of a container: by restartPolicy an init container is one that runs on beside the others."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def pod_sets(job: DistillationJob, settings: Settings) -> list[Json]:
    """Return name, count and template of each kind of pod: the teachers', the Ray head's, the engines', the trainer's.

    They are admitted together or not at all, as a job with some of them does nothing.
    """
    return [
        pod_set
        for child in (*rendering.serving(job, settings), rendering.training(job, settings, 1))
        for pod_set in _of_child(job, child)
    ]


def workload(job: DistillationJob, settings: Settings) -> Json:
    """Return the Workload (kueue.x-k8s.io/v1beta2) of a job that names its queue."""
    meta = job.metadata
    owner = {"apiVersion": job.api_version, "kind": job.kind, "name": meta.name, "uid": meta.uid, "controller": True}
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "Workload",
        "metadata": {
            "name": f"distillationjob-{meta.name}",
            "namespace": meta.namespace,
            **({"ownerReferences": [owner]} if meta.uid else {}),
        },
        "spec": {
            "queueName": meta.labels.get(QUEUE_LABEL, ""),
            "podSets": [{**p, "template": _as_counted(p["template"])} for p in pod_sets(job, settings)],
        },
    }


def _as_counted(template: Json) -> Json:
    """Return a template with what tells of place and amount alone: a Workload is kept for as long as its job."""
    spec = template["spec"]
    containers = {
        kind: [{key: c[key] for key in COUNTED if key in c} for c in spec[kind]]
        for kind in ("containers", "initContainers")
        if kind in spec
    }
    return {"spec": {**containers, **{key: spec[key] for key in PLACEMENT if key in spec}}}


def _of_child(job: DistillationJob, child: Json) -> list[Json]:
    spec = child["spec"]
    match kind_of(child):
        case Kind.RAY_CLUSTER:
            groups = [(group["groupName"], group["replicas"], group["template"]) for group in spec["workerGroupSpecs"]]
            return [_pod_set("head", 1, spec["headGroupSpec"]["template"]), *(_pod_set(*group) for group in groups)]
        case Kind.JOB:
            return [_pod_set("trainer", spec["completions"], spec["template"])]
        case _:
            name = child["metadata"]["name"].removeprefix(f"{job.metadata.name}-")
            return [_pod_set(name, spec["replicas"], spec["template"])]


def _pod_set(name: str, count: int, template: Json) -> Json:
    return {"name": name, "count": count, "template": template}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m distill_operator.kueue.workload JOB.yaml")
    try:
        found = workload(load_job(Path(sys.argv[1])), Settings.from_environment(os.environ))
    except (InvalidManifest, InvalidSettings) as error:
        sys.exit(str(error))
    yaml.safe_dump(found, sys.stdout, sort_keys=False, width=120)


if __name__ == "__main__":
    main()
