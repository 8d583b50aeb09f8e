"""The NetworkPolicy of a job: its own pods reach each other on every port, the operator reads the trainer's progress,
and the namespaces of Prometheus read metrics. Nobody else gets in.

gloo and NCCL listen on ports that cannot be pinned, hence every port between the job's own. SGLang's metrics share a
port with its API and with its administration, which needs the job's key. What the pods may reach is the installation's
choice; so it is of the servers of a Teacher.
"""

from ipaddress import ip_network

from distill_api import names
from distill_api import protocol as wire
from distill_api.job import DistillationJob
from distill_operator.resources.pod_template import Json, metadata
from distill_operator.settings import Egress, Settings

METRICS_PORTS = sorted({wire.TRAINER_PORT, wire.RAY_METRICS_PORT, wire.SGLANG_PORT})
ANYWHERE = {4: "0.0.0.0/0", 6: "::/0"}
"""All addresses, by version of the Internet Protocol."""


def network_policy(job: DistillationJob, settings: Settings) -> Json:
    """Return the NetworkPolicy of a job."""
    own = {"podSelector": {"matchLabels": {names.LABEL_JOB: job.metadata.name}}}
    ingress: list[Json] = [{"from": [own]}, {**_operator(settings), "ports": ports_of("TCP", wire.TRAINER_PORT)}]
    ingress += scraped(settings, *METRICS_PORTS)
    spec: Json = {"podSelector": own["podSelector"], "policyTypes": ["Ingress"], "ingress": ingress}
    beyond = egress(settings)
    if beyond is not None:
        shared = {"podSelector": {"matchExpressions": [{"key": names.LABEL_SHARED_TEACHER, "operator": "Exists"}]}}
        spec |= {"policyTypes": ["Ingress", "Egress"], "egress": [{"to": [own, shared]}, *beyond]}
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


def egress(settings: Settings) -> list[Json] | None:
    """Return the rules of what pods may reach besides their peers: DNS and, unless closed, all but cloud metadata.

    None where everything may be reached.
    """
    if settings.job_egress is Egress.OPEN:
        return None
    dns = settings.dns
    servers: list[Json] = [
        {"namespaceSelector": _in_namespaces(dns.namespace), "podSelector": {"matchLabels": dict(dns.pod_labels)}},
        *({"ipBlock": {"cidr": address}} for address in dns.addresses),
    ]
    # Port 53 of any other server would carry weights and data out of the cluster.
    found: list[Json] = [{"to": servers, "ports": [*ports_of("UDP", *dns.ports), *ports_of("TCP", *dns.ports)]}]
    if settings.job_egress is Egress.NO_METADATA:
        # To some network plugins an address block is what is outside the cluster only.
        found.append({"to": [{"namespaceSelector": {}}, *_all_but(settings.metadata_addresses)]})
    return found


def _all_but(closed: tuple[str, ...]) -> list[Json]:
    by_version = {version: [a for a in closed if ip_network(a).version == version] for version in ANYWHERE}
    return [{"ipBlock": {"cidr": ANYWHERE[version], "except": some}} for version, some in by_version.items()]


def _operator(settings: Settings) -> Json:
    """Return the operator's pods as peers; everybody where it does not know its namespace, as outside a cluster."""
    if not settings.namespace:
        return {}
    pods = {"matchLabels": names.OPERATOR_LABELS}
    return {"from": [{"namespaceSelector": _in_namespaces(settings.namespace), "podSelector": pods}]}


def _in_namespaces(*namespaces: str) -> Json:
    label = "kubernetes.io/metadata.name"
    return {"matchExpressions": [{"key": label, "operator": "In", "values": list(namespaces)}]}


def ports_of(protocol: str, *ports: int) -> list[Json]:
    """Return the ports of a rule."""
    return [{"protocol": protocol, "port": port} for port in ports]
