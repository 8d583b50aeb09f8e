"""The operator's settings, read from the environment once, at start. The chart's values map one to one to them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_network
from typing import Self


class Egress(StrEnum):
    """What the pods of a job may reach besides each other and DNS."""

    NO_METADATA = "no-metadata"
    """Everything but the addresses at which clouds give out credentials."""
    CLOSED = "closed"
    """Nothing: models and data are on volumes."""
    OPEN = "open"
    """Everything."""


@dataclass(frozen=True)
class ClusterDns:
    """The DNS servers of the cluster: the only ones that pods whose egress is bounded may send requests to."""

    namespace: str = "kube-system"
    """DISTILL_DNS_NAMESPACE: namespace of the servers' pods."""
    pod_labels: tuple[tuple[str, str], ...] = (("k8s-app", "kube-dns"),)
    """DISTILL_DNS_POD_LABELS: KEY=VALUE, comma separated; labels of these pods. CoreDNS has kept kube-dns' label."""
    addresses: tuple[str, ...] = ("169.254.20.10/32",)
    """DISTILL_DNS_ADDRESSES: comma separated; servers that are no pods. The default is NodeLocal DNSCache's address."""
    ports: tuple[int, ...] = (53,)
    """DISTILL_DNS_PORTS: comma separated; of the servers themselves, behind their Service (OpenShift's is 5353)."""


METADATA_ADDRESSES = (
    "169.254.0.0/16",  # link-local: AWS, Azure, Google, Oracle, Tencent, Scaleway; ECS; EKS Pod Identity
    "168.63.129.16/32",  # Azure WireServer
    "100.100.100.200/32",  # Alibaba
    "192.0.0.192/32",  # Oracle Classic
    "fe80::/10",  # link-local: OpenStack, Linode
    "fd00:ec2::/32",  # AWS, EKS Pod Identity
    "fd20:ce::254/128",  # Google
    "fd00:c1::a9fe:a9fe/128",  # Oracle
    "fd00:42::42/128",  # Scaleway
    "fd00:a9fe:a9fe::1/128",  # Linode
    "fd00:100::100:200/128",  # Alibaba
)
"""The addresses at which clouds give out the credentials of a node or a pod to whoever sends a request."""


_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_DOMAIN = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_KEY = rf"(?:{_DOMAIN}(?:\.{_DOMAIN})*/)?{_WORD}"
_VALUES = rf"\((?!\s*\))\s*(?:{_WORD})?(?:\s*,\s*(?:{_WORD})?)*\s*\)"
_REQUIREMENT = rf"(?:!\s*{_KEY}|{_KEY}(?:\s*(?:==?|!=)\s*(?:{_WORD})?|\s+(?:not)?in\s*{_VALUES}|\s*[<>]\s*-?[0-9]+)?)"
_SELECTOR = re.compile(rf"{_REQUIREMENT}(?:\s*,\s*{_REQUIREMENT})*")
"""What the API server takes for labelSelector, its operators gt and lt included."""


class InvalidSettings(ValueError):
    """Raised when the environment is no valid configuration; the message says which variable and why."""


@dataclass(frozen=True)
class Settings:
    """Everything that may differ between two installations."""

    workers_image: str
    """DISTILL_WORKERS_IMAGE: image of every pod whose template names none."""
    workers_image_pull_policy: str = "IfNotPresent"
    """DISTILL_WORKERS_IMAGE_PULL_POLICY: of every pod whose template names none."""
    workers_image_pull_secrets: tuple[str, ...] = ()
    """DISTILL_WORKERS_IMAGE_PULL_SECRETS: comma separated; Secrets must exist in the namespace of the job."""
    watch_namespaces: tuple[str, ...] = ()
    """DISTILL_WATCH_NAMESPACES: comma separated; empty means every namespace, without a selector."""
    watch_namespace_selector: str = ""
    """DISTILL_WATCH_NAMESPACE_SELECTOR: a label selector, such as distillation=enabled; namespaces that have the label
    are watched too, from when they get it until they lose it."""
    scrape_namespaces: tuple[str, ...] = ()
    """DISTILL_SCRAPE_NAMESPACES: comma separated; Prometheus may read the metrics of jobs there. Empty: nowhere."""
    job_egress: Egress = Egress.NO_METADATA
    """DISTILL_JOB_EGRESS: no-metadata, closed or open."""
    metadata_addresses: tuple[str, ...] = METADATA_ADDRESSES
    """DISTILL_METADATA_ADDRESSES: comma separated; networks that no-metadata closes, as CIDR."""
    dns: ClusterDns = ClusterDns()
    """The cluster's DNS servers; it has variables of its own."""
    namespace: str = ""
    """DISTILL_NAMESPACE: the operator's own; jobs answer GET /progress to its pods there. Empty: to everybody."""
    allow_trust_remote_code: bool = False
    """DISTILL_ALLOW_TRUST_REMOTE_CODE: whether a job may set trustRemoteCode."""
    kueue: bool = False
    """DISTILL_KUEUE: whether jobs and Teachers may wait in a queue of Kueue. Without it those with a queue's label
    wait, and say so."""
    resync_seconds: float = 60.0
    """DISTILL_RESYNC_SECONDS: every job is reconciled again at least this often, whatever the watches say."""
    progress_seconds: float = 2.0
    """DISTILL_PROGRESS_SECONDS: how often the trainer of a running job is polled."""
    concurrency: int = 8
    """DISTILL_CONCURRENCY: jobs reconciled at the same time."""
    leader_election: bool = False
    """DISTILL_LEADER_ELECTION: true for more than one replica; only the one that holds the lease works."""
    lease_name: str = "distillation-operator"
    """DISTILL_LEASE_NAME: of the Lease; two installations in one namespace need two names."""
    lease_namespace: str = ""
    """DISTILL_LEASE_NAMESPACE: the operator's own namespace; needed with DISTILL_LEADER_ELECTION."""
    health_port: int = 8081
    """DISTILL_HEALTH_PORT: /healthz."""
    metrics_port: int = 8082
    """DISTILL_METRICS_PORT: /metrics."""
    log_level: str = "INFO"
    """DISTILL_LOG_LEVEL."""
    log_format: str = "json"
    """DISTILL_LOG_FORMAT: json or text."""

    @property
    def unhealthy_after_seconds(self) -> float:
        """For how long a part may not work before /healthz fails: three missed resyncs, at least three minutes."""
        return max(180.0, 3 * self.resync_seconds)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Return the settings of an environment. Raises InvalidSettings."""
        image = environment.get("DISTILL_WORKERS_IMAGE", "").strip()
        if not image:
            raise InvalidSettings("DISTILL_WORKERS_IMAGE is not set; name the workers' image (chart: workersImage)")
        leader_election = _one_of(environment, "DISTILL_LEADER_ELECTION", ("false", "true")) == "true"
        lease_namespace = environment.get("DISTILL_LEASE_NAMESPACE", "").strip()
        if leader_election and not lease_namespace:
            raise InvalidSettings(
                "DISTILL_LEASE_NAMESPACE is not set; DISTILL_LEADER_ELECTION needs it: the operator's own namespace"
            )
        return cls(
            workers_image=image,
            workers_image_pull_policy=_one_of(
                environment, "DISTILL_WORKERS_IMAGE_PULL_POLICY", ("IfNotPresent", "Always", "Never")
            ),
            workers_image_pull_secrets=_comma_separated(environment, "DISTILL_WORKERS_IMAGE_PULL_SECRETS"),
            watch_namespaces=_comma_separated(environment, "DISTILL_WATCH_NAMESPACES"),
            watch_namespace_selector=_selector(environment, "DISTILL_WATCH_NAMESPACE_SELECTOR"),
            scrape_namespaces=_comma_separated(environment, "DISTILL_SCRAPE_NAMESPACES"),
            job_egress=Egress(_one_of(environment, "DISTILL_JOB_EGRESS", tuple(Egress))),
            metadata_addresses=_networks(environment, "DISTILL_METADATA_ADDRESSES") or METADATA_ADDRESSES,
            dns=_dns(environment),
            namespace=environment.get("DISTILL_NAMESPACE", "").strip(),
            allow_trust_remote_code=_flag(environment, "DISTILL_ALLOW_TRUST_REMOTE_CODE"),
            kueue=_flag(environment, "DISTILL_KUEUE"),
            resync_seconds=_positive(environment, "DISTILL_RESYNC_SECONDS", cls.resync_seconds),
            progress_seconds=_positive(environment, "DISTILL_PROGRESS_SECONDS", cls.progress_seconds),
            concurrency=int(_positive(environment, "DISTILL_CONCURRENCY", cls.concurrency)),
            leader_election=leader_election,
            lease_name=environment.get("DISTILL_LEASE_NAME", "").strip() or cls.lease_name,
            lease_namespace=lease_namespace,
            health_port=int(_positive(environment, "DISTILL_HEALTH_PORT", cls.health_port)),
            metrics_port=int(_positive(environment, "DISTILL_METRICS_PORT", cls.metrics_port)),
            log_level=_one_of(environment, "DISTILL_LOG_LEVEL", ("INFO", "DEBUG", "WARNING", "ERROR")),
            log_format=_one_of(environment, "DISTILL_LOG_FORMAT", ("json", "text")),
        )


def _dns(environment: Mapping[str, str]) -> ClusterDns:
    usual = ClusterDns()
    return ClusterDns(
        namespace=environment.get("DISTILL_DNS_NAMESPACE", "").strip() or usual.namespace,
        pod_labels=_labels(environment, "DISTILL_DNS_POD_LABELS") or usual.pod_labels,
        addresses=_networks(environment, "DISTILL_DNS_ADDRESSES") or usual.addresses,
        ports=_ports(environment, "DISTILL_DNS_PORTS") or usual.ports,
    )


def _selector(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(name, "").strip()
    if text and not _SELECTOR.fullmatch(text):
        raise InvalidSettings(f"{name} is {text!r}; it must be a label selector, such as distillation=enabled")
    return text


def _networks(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    try:
        return tuple(str(ip_network(text)) for text in _comma_separated(environment, name))
    except ValueError:
        raise InvalidSettings(
            f"{name} is {environment[name]!r}; each must be an IP address or a network such as 10.0.0.0/8"
        ) from None


def _labels(environment: Mapping[str, str], name: str) -> tuple[tuple[str, str], ...]:
    found = [text.partition("=") for text in _comma_separated(environment, name)]
    if not all(key and equals for key, equals, _ in found):
        raise InvalidSettings(f"{name} is {environment[name]!r}; each must be KEY=VALUE, such as k8s-app=kube-dns")
    return tuple((key, value) for key, _, value in found)


def _ports(environment: Mapping[str, str], name: str) -> tuple[int, ...]:
    found = _comma_separated(environment, name)
    if not all(text.isdecimal() and 1 <= int(text) <= 65_535 for text in found):
        raise InvalidSettings(f"{name} is {environment[name]!r}; each must be a port number")
    return tuple(int(text) for text in found)


def _comma_separated(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in environment.get(name, "").split(",") if word.strip())


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return _one_of(environment, name, ("false", "true")) == "true"


def _one_of(environment: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """The first of `allowed` is the default."""
    value = environment.get(name, "").strip() or allowed[0]
    if value not in allowed:
        raise InvalidSettings(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def _positive(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise InvalidSettings(f"{name} is {text!r}; it must be a number") from None
    if value <= 0:
        raise InvalidSettings(f"{name} is {text!r}; it must be above 0")
    return value
