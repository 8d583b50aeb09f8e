"""The NetworkPolicy of a job: its own pods reach each other on every port, anyone its metrics, nobody anything else.

gloo and NCCL listen on ports that cannot be pinned. Egress is left alone: models may come from a hub.
"""

from distill_api import names, wire
from distill_api.job import DistillationJob
from distill_operator.children.pod import Json, metadata

METRICS_PORTS = sorted({wire.SGLANG_PORT, wire.TRAINER_PORT, wire.RAY_METRICS_PORT})


def network_policy(job: DistillationJob) -> Json:
    own = {"matchLabels": {names.LABEL_JOB: job.metadata.name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job, names.network_policy(job.metadata.name)),
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": own}]},
                # Prometheus may be anywhere, and the operator reads the trainer's progress.
                {"ports": [{"protocol": "TCP", "port": port} for port in METRICS_PORTS]},
            ],
        },
    }
