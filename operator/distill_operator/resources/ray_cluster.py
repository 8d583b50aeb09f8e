"""The rollout engines: a RayCluster whose head does no work and each of whose workers holds one engine actor.

The actors are made by the trainer; KubeRay only keeps the pods.
"""

import json

from distill_api import names, protocol
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.pods import refusals
from distill_api.spec.job_spec import WeightSync
from distill_operator.resources.pod_template import Container, Json, metadata, pod_labels, pod_template
from distill_operator.settings import Settings

RAY_VERSION = "2.60.0"
"""Ray's version in the workers' image, by which KubeRay chooses flags and probes."""
OBJECT_STORE_BYTES = "100000000"
"""Samples are lists of a few kilobytes; Ray would otherwise take 30 % of the pod's memory."""
HEAD_PORTS = (
    # All that KubeRay would add by itself: it adds none once there is one.
    ("gcs-server", 6379),
    ("client", protocol.RAY_CLIENT_PORT),
    (protocol.METRICS_PORT_NAME, protocol.RAY_METRICS_PORT),
)


def ray_cluster(job: DistillationJob, settings: Settings) -> Json:
    """Return the RayCluster of a job."""
    rollout = job.spec.rollout
    own_labels = pod_labels(job, Role.ROLLOUT)
    head = Container(name=refusals.HEAD, ports=HEAD_PORTS)
    engine = Container(
        name=refusals.ENGINE,
        ports=[
            (protocol.METRICS_PORT_NAME, protocol.SGLANG_PORT),
            (protocol.RAY_METRICS_PORT_NAME, protocol.RAY_METRICS_PORT),
        ],
        accelerators=rollout.tensor_parallel_size,
        accelerator=rollout.accelerator,
        needs_output=job.spec.trainer.weight_sync is WeightSync.DISK,
    )
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": metadata(job, names.ray_cluster(job.metadata.name), Role.ROLLOUT),
        "spec": {
            "rayVersion": RAY_VERSION,
            "headGroupSpec": {
                "rayStartParams": {
                    # KubeRay would open it; its probes ask the node's agent, and people come by port-forward.
                    "dashboard-host": "127.0.0.1",
                    "num-cpus": "0",
                    "object-store-memory": OBJECT_STORE_BYTES,
                },
                "template": pod_template(
                    job, settings, rollout.head_template, head, own_labels, metrics_port=protocol.RAY_METRICS_PORT
                ),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "engine",
                    "replicas": rollout.replicas,
                    "minReplicas": rollout.replicas,
                    "maxReplicas": rollout.replicas,
                    "rayStartParams": {
                        "num-cpus": "1",
                        "object-store-memory": OBJECT_STORE_BYTES,
                        # KubeRay pastes it into a shell command, hence the inner quotes.
                        "resources": f"'{json.dumps({protocol.ENGINE_RESOURCE: 1})}'",
                    },
                    "template": pod_template(
                        job, settings, rollout.template, engine, own_labels, metrics_port=protocol.SGLANG_PORT
                    ),
                }
            ],
        },
    }
