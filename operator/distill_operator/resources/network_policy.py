"""The NetworkPolicy of a job: its own pods reach each other on every port, the operator reads the trainer's progress,
and the namespaces of Prometheus read metrics. Nobody else gets in.

gloo and NCCL listen on ports that cannot be pinned, hence every port between the job's own. SGLang's metrics share a
port with its API and with its administration, which needs the job's key. What the pods may reach is the installation's
choice.
"""

from distill_api import names
from distill_api import protocol as wire
from distill_api.job import DistillationJob
from distill_operator.resources.pod_template import Json, metadata
from distill_operator.settings import Egress, Settings

METRICS_PORTS = sorted({wire.TRAINER_PORT, wire.RAY_METRICS_PORT, wire.SGLANG_PORT})
DNS_PORT = 53
ANYWHERE = (("0.0.0.0/0", "169.254.169.254/32"), ("::/0", "fd00:ec2::254/128"))
"""All addresses, and among them the one at which clouds give a node's credentials to whoever asks."""


def network_policy(job: DistillationJob, settings: Settings) -> Json:
    """Return the NetworkPolicy of a job."""
    own = {"podSelector": {"matchLabels": {names.LABEL_JOB: job.metadata.name}}}
    ingress: list[Json] = [{"from": [own]}, {**_operator(settings), "ports": ports_of("TCP", wire.TRAINER_PORT)}]
    ingress += scraped(settings, *METRICS_PORTS)
    spec: Json = {"podSelector": own["podSelector"], "policyTypes": ["Ingress"], "ingress": ingress}
    if settings.job_egress is not Egress.OPEN:
        spec |= {"policyTypes": ["Ingress", "Egress"], "egress": _egress(own, settings.job_egress)}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job, names.network_policy(job.metadata.name)),
        "spec": spec,
    }


def scraped(settings: Settings, *metrics_ports: int) -> list[Json]:
    """Return the rule that lets Prometheus read metrics on these ports; none where no namespace is scraped."""
    if not settings.scrape_namespaces:
        return []
    scrapers = {"namespaceSelector": _in_namespaces(*settings.scrape_namespaces)}
    return [{"from": [scrapers], "ports": ports_of("TCP", *metrics_ports)}]


def _operator(settings: Settings) -> Json:
    """Return the operator's pods as peers; everybody where it does not know its namespace, as outside a cluster."""
    if not settings.namespace:
        return {}
    pods = {"matchLabels": names.OPERATOR_LABELS}
    return {"from": [{"namespaceSelector": _in_namespaces(settings.namespace), "podSelector": pods}]}


def _egress(own: Json, allowed: Egress) -> list[Json]:
    shared = {"podSelector": {"matchExpressions": [{"key": names.LABEL_SHARED_TEACHER, "operator": "Exists"}]}}
    found: list[Json] = [{"to": [own, shared]}, {"ports": [*ports_of("UDP", DNS_PORT), *ports_of("TCP", DNS_PORT)]}]
    if allowed is Egress.NO_METADATA:
        blocks = [{"ipBlock": {"cidr": every, "except": [metadata]}} for every, metadata in ANYWHERE]
        # To some network plugins an address block is what is outside the cluster only.
        found.append({"to": [{"namespaceSelector": {}}, *blocks]})
    return found


def _in_namespaces(*namespaces: str) -> Json:
    label = "kubernetes.io/metadata.name"
    return {"matchExpressions": [{"key": label, "operator": "In", "values": list(namespaces)}]}


def ports_of(protocol: str, *ports: int) -> list[Json]:
    """Return the ports of a rule."""
    return [{"protocol": protocol, "port": port} for port in ports]
