"""The NetworkPolicy of a job: its own pods reach each other on every port; others read the trainer's progress and Ray's
metrics, and only named namespaces reach the SGLang servers, whose metrics share a port with their administration.

gloo and NCCL listen on ports that cannot be pinned. Egress is left alone: models may come from a hub.
"""

from distill_api import names, wire
from distill_api.job import DistillationJob
from distill_operator.children.pod import Json, metadata
from distill_operator.settings import Settings

READ_ONLY_PORTS = sorted({wire.TRAINER_PORT, wire.RAY_METRICS_PORT})


def network_policy(job: DistillationJob, settings: Settings) -> Json:
    own = {"matchLabels": {names.LABEL_JOB: job.metadata.name}}
    ingress: list[Json] = [
        {"from": [{"podSelector": own}]},
        # Prometheus may be anywhere, and the operator reads the trainer's progress.
        {"ports": tcp(READ_ONLY_PORTS)},
    ]
    ingress += scraped(settings)
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job, names.network_policy(job.metadata.name)),
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    }


def scraped(settings: Settings) -> list[Json]:
    """The rule that lets Prometheus reach SGLang's servers."""
    if not settings.scrape_namespaces:
        return []
    names_in = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": list(settings.scrape_namespaces)}
    scrapers = {"namespaceSelector": {"matchExpressions": [names_in]}}
    return [{"from": [scrapers], "ports": tcp([wire.SGLANG_PORT])}]


def tcp(ports: list[int]) -> list[Json]:
    return [{"protocol": "TCP", "port": port} for port in ports]
