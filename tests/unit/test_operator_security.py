"""Who gets into the pods of a job, what they may reach, and what an installation does not allow."""

import asyncio
import copy
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from operator_fakes import EPOCH, SETTINGS, UID, FakeCluster, Json, Simulation, job

from distill_api.names import OPERATOR_LABELS, key_secret
from distill_api.protocol import Variable
from distill_api.status import ConditionType, Status
from distill_api.teacher.kind import parse_teacher
from distill_operator.distillationjob.plan import plan
from distill_operator.kinds import Kind
from distill_operator.model import conditions
from distill_operator.model.observed import Claim, Observed
from distill_operator.policy import problems
from distill_operator.resources import rendering, teacher_servers
from distill_operator.resources.drift import contains
from distill_operator.resources.network_policy import network_policy
from distill_operator.settings import Egress, InvalidSettings, Settings

OWN = {"podSelector": {"matchLabels": {"distillation-operator.io/job": "job"}}}
TEACHER = parse_teacher(
    {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "Teacher",
        "metadata": {"name": "shared", "namespace": "team", "uid": UID},
        "spec": {"model": "/m"},
    }
)
INSTALLED = replace(SETTINGS, namespace="distillation-system")


def namespaces(*found: str) -> Json:
    values = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": list(found)}
    return {"namespaceSelector": {"matchExpressions": [values]}}


def ingress(settings: Settings) -> list[tuple[list[Json], list[int]]]:
    """Who, and to which ports; no port means all."""
    spec = network_policy(job(), settings)["spec"]
    assert spec["podSelector"] == OWN["podSelector"]
    return [(rule.get("from", []), [p["port"] for p in rule.get("ports", [])]) for rule in spec["ingress"]]


def egress(allowed: Egress) -> Any:
    return network_policy(job(), replace(SETTINGS, job_egress=allowed))["spec"].get("egress")


# The network


def test_only_the_jobs_own_pods_and_the_operator_get_in() -> None:
    # Both must hold: a user may give his pods the operator's labels, but not in the operator's namespace.
    operator = {**namespaces("distillation-system"), "podSelector": {"matchLabels": OPERATOR_LABELS}}
    assert ingress(INSTALLED) == [([OWN], []), ([operator], [8080])]


def test_prometheus_reads_metrics_from_named_namespaces_alone() -> None:
    named = replace(INSTALLED, scrape_namespaces=("monitoring", "other"))
    assert ingress(named)[2:] == [([namespaces("monitoring", "other")], [8080, 30000])]


def test_an_operator_outside_the_cluster_still_reads_progress() -> None:
    assert ingress(SETTINGS) == [([OWN], []), ([], [8080])]


SHARED = {
    "podSelector": {"matchExpressions": [{"key": "distillation-operator.io/shared-teacher", "operator": "Exists"}]}
}


CLUSTER_DNS = {
    "to": [
        {**namespaces("kube-system"), "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}},
        {"ipBlock": {"cidr": "169.254.20.10/32"}},
    ],
    "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
}


def test_pods_reach_everything_but_the_credentials_of_their_node() -> None:
    own, dns, rest = egress(Egress.NO_METADATA)
    assert own == {"to": [OWN, SHARED]} and dns == CLUSTER_DNS
    four, six = (peer["ipBlock"] for peer in rest["to"] if "ipBlock" in peer)
    assert (four["cidr"], six["cidr"]) == ("0.0.0.0/0", "::/0")
    for address in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.0.23", "169.254.42.42", "168.63.129.16"),
        *("100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:c1::a9fe:a9fe"),
        *("fe80::a9fe:a9fe", "fd00:42::42"),
    ):
        found = ip_address(address)
        assert any(found in ip_network(network) for network in (six if found.version == 6 else four)["except"]), address
    assert Settings("x").job_egress is Egress.NO_METADATA, "the default"


def test_closed_pods_reach_each_other_and_the_clusters_dns_and_open_ones_everything() -> None:
    assert egress(Egress.CLOSED) == [{"to": [OWN, SHARED]}, CLUSTER_DNS]
    assert egress(Egress.OPEN) is None


def test_a_place_beyond_the_cluster_is_refused_where_no_pod_is_let_out() -> None:
    places = [{"to": "hf://team/sums"}, {"to": "s3://models/sums"}, {"to": "file:///claim/sums"}]
    of = job(output={"volume": {"claimName": "out"}, "publish": places})
    found = problems(of.spec, replace(SETTINGS, job_egress=Egress.CLOSED))
    assert [sentence.split(" is not in the cluster")[0] for sentence in found] == [
        "spec.output.publish: hf://team/sums",
        "spec.output.publish: s3://models/sums",
    ]
    assert problems(of.spec, SETTINGS) == []


def test_an_installation_names_its_own_dns_and_its_own_metadata_addresses() -> None:
    settings = Settings.from_environment(
        {
            "DISTILL_WORKERS_IMAGE": "x",
            "DISTILL_DNS_NAMESPACE": "openshift-dns",
            "DISTILL_DNS_POD_LABELS": "dns.operator.openshift.io/daemonset-dns=default,tier=a",
            "DISTILL_DNS_ADDRESSES": "10.96.0.10, fd00::a/128",
            "DISTILL_DNS_PORTS": "5353",
            "DISTILL_METADATA_ADDRESSES": "10.1.2.3,fd01::/64",
        }
    )
    _, dns, rest = network_policy(job(), settings)["spec"]["egress"]
    assert dns == {
        "to": [
            {
                **namespaces("openshift-dns"),
                "podSelector": {
                    "matchLabels": {"dns.operator.openshift.io/daemonset-dns": "default", "tier": "a"},
                },
            },
            {"ipBlock": {"cidr": "10.96.0.10/32"}},
            {"ipBlock": {"cidr": "fd00::a/128"}},
        ],
        "ports": [{"protocol": "UDP", "port": 5353}, {"protocol": "TCP", "port": 5353}],
    }
    assert [peer["ipBlock"]["except"] for peer in rest["to"][1:]] == [["10.1.2.3/32"], ["fd01::/64"]]


def test_the_servers_of_a_teacher_reach_no_more_than_the_pods_of_a_job() -> None:
    def reached(allowed: Egress) -> Any:
        return teacher_servers.network_policy(TEACHER, replace(SETTINGS, job_egress=allowed))["spec"].get("egress")

    assert reached(Egress.CLOSED) == [CLUSTER_DNS]
    assert reached(Egress.NO_METADATA) == egress(Egress.NO_METADATA)[1:]
    assert reached(Egress.OPEN) is None


@pytest.mark.parametrize("rules", ["ingress", "egress"])
@pytest.mark.parametrize("within", [False, True], ids=["a rule more", "a peer more"])
def test_a_network_policy_that_somebody_opened_is_closed_again(rules: str, within: bool) -> None:
    desired = network_policy(job(), replace(SETTINGS, job_egress=Egress.CLOSED))
    live = copy.deepcopy(desired["spec"])
    assert contains(live, desired["spec"])
    world = {"ipBlock": {"cidr": "0.0.0.0/0"}}
    if within:
        live[rules][0]["from" if rules == "ingress" else "to"].append(world)
    else:
        live[rules].append({"from" if rules == "ingress" else "to": [world]})
    assert not contains(live, desired["spec"])


# The key


def test_every_container_reads_the_key_from_the_secret_and_none_holds_it() -> None:
    teacher, rollout = rendering.serving(job(), SETTINGS)
    ray, trainer = rollout["spec"], rendering.training(job(), SETTINGS, 1)
    reference = {"secretKeyRef": {"name": key_secret("job", UID), "key": "key"}}
    for pods in (teacher["spec"], ray["headGroupSpec"], *ray["workerGroupSpecs"], trainer["spec"]):
        environment = {e["name"]: e for e in pods["template"]["spec"]["containers"][0]["env"]}
        for name in (Variable.KEY.value, "RAY_AUTH_TOKEN"):
            assert environment[name] == {"name": name, "valueFrom": reference}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"


def test_rays_dashboard_is_reached_from_inside_its_pod_only() -> None:
    head = rendering.serving(job(), SETTINGS)[1]["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert 8265 not in [p["containerPort"] for p in head["template"]["spec"]["containers"][0]["ports"]]


class Blind(FakeCluster):
    """Secrets may not be read."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        assert kind is not Kind.SECRET
        return await super().get(kind, namespace, name)

    async def list(
        self, kind: Kind, namespace: str, *, labels: str = "", name: str = "", fields: str = ""
    ) -> list[Json]:
        assert kind is not Kind.SECRET
        return await super().list(kind, namespace, labels=labels, name=name, fields=fields)


def suspended_and_resumed(simulation: Simulation, meanwhile: Any = None) -> None:
    async def act() -> None:
        await simulation.run_until_quiet()
        simulation.edit(suspend=True)
        await simulation.run_until_quiet()
        if meanwhile:
            meanwhile()
        simulation.edit(suspend=False)
        await simulation.run_until_quiet()

    asyncio.run(act())
    assert simulation.job_status["attempts"] == 2


def test_the_key_is_made_before_the_pods_once_for_all_attempts_and_is_never_read() -> None:
    simulation = Simulation(cluster=Blind())
    suspended_and_resumed(simulation)
    made, writes = f"create Secret/{key_secret('job', UID)}", simulation.cluster.writes
    assert writes.index(made) < writes.index("apply Deployment/job-teacher") and writes.count(made) == 1
    [secret] = simulation.cluster.of(Kind.SECRET).values()
    assert len(secret["stringData"]["key"]) == 43
    assert secret["metadata"]["ownerReferences"][0]["uid"] == UID


def test_a_key_that_was_deleted_comes_back_with_the_next_attempt() -> None:
    simulation = Simulation()
    name = key_secret("job", UID)
    suspended_and_resumed(simulation, lambda: simulation.cluster.remove(Kind.SECRET, name))
    assert list(simulation.cluster.of(Kind.SECRET)) == [name]
    assert simulation.cluster.writes.count(f"create Secret/{name}") == 2


def test_the_key_of_an_earlier_job_of_this_name_is_another_object() -> None:
    assert key_secret("job", "aaaaaaaa-1") != key_secret("job", "bbbbbbbb-1")
    assert len(key_secret("j" * 40, UID)) <= 63


# What an installation does not allow


def condition(settings: Settings, **spec: Any) -> tuple[str, str]:
    """Of SpecValid after the first reconcile: status, message."""
    found = plan(job(**spec), Status(), Observed(claim=Claim.BOUND), settings, EPOCH)
    condition = conditions.find(found.status, ConditionType.SPEC_VALID)
    assert condition is not None
    return condition.status.value, condition.message


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"trustRemoteCode": True}, "spec.trustRemoteCode"),
        ({"teacher": {"model": "/m", "engineArgs": ["--trust-remote-code"]}}, "spec.teacher.engineArgs"),
        ({"rollout": {"engineArgs": ["--page-size=1", "--trust-rem"]}}, "spec.rollout.engineArgs: --trust-rem"),
        ({"rollout": {"engineArgs": ["--config", "/data/sglang.yaml"]}}, "spec.rollout.engineArgs: --config"),
    ],
)
def test_code_of_a_model_runs_only_where_the_installation_allows_it(spec: Json, where: str) -> None:
    status, message = condition(SETTINGS, **spec)
    assert status == "False"
    assert message.startswith(where) and "allowTrustRemoteCode of the chart" in message
    assert condition(replace(SETTINGS, allow_trust_remote_code=True), **spec)[0] == "True"


def test_other_arguments_of_the_engines_are_allowed() -> None:
    arguments = ["--tp-size", "2", "--trust-request-chat-template", "--page-size=16", "/a/path"]
    assert condition(SETTINGS, rollout={"engineArgs": arguments})[0] == "True"


def test_a_job_that_needs_the_hub_is_refused_where_nothing_may_be_reached() -> None:
    closed = replace(SETTINGS, job_egress=Egress.CLOSED)
    status, message = condition(closed, student={"model": "Qwen/Qwen3-8B"})
    assert status == "False" and "paths on a mounted volume" in message
    assert condition(closed)[0] == "True"


def test_nothing_is_started_of_a_job_that_is_not_allowed() -> None:
    simulation = Simulation(spec={"trustRemoteCode": True})
    asyncio.run(simulation.run_until_quiet())
    assert simulation.condition("Succeeded")[1] == "InvalidSpec"
    assert {write for write in simulation.cluster.writes if not write.startswith("event")} == {"status"}


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("DISTILL_JOB_EGRESS", "shut", "no-metadata, closed, open"),
        ("DISTILL_ALLOW_TRUST_REMOTE_CODE", "yes", "false, true"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(InvalidSettings, match=f"{variable} is '{value}'; it must be one of {allowed}"):
        Settings.from_environment({"DISTILL_WORKERS_IMAGE": "x", variable: value})


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        (
            "DISTILL_METADATA_ADDRESSES",
            "169.254.169.254/16",
            "each must be an IP address or a network such as 10.0.0.0/8",
        ),
        ("DISTILL_DNS_ADDRESSES", "kube-dns", "each must be an IP address or a network such as 10.0.0.0/8"),
        ("DISTILL_DNS_POD_LABELS", "kube-dns", "each must be KEY=VALUE, such as k8s-app=kube-dns"),
        ("DISTILL_DNS_PORTS", "dns", "each must be a port number"),
        ("DISTILL_DNS_PORTS", "70000", "each must be a port number"),
    ],
)
def test_a_wrong_address_label_or_port_is_named_with_what_it_must_be(variable: str, value: str, why: str) -> None:
    with pytest.raises(InvalidSettings, match=f"{variable} is '{value}'; {why}"):
        Settings.from_environment({"DISTILL_WORKERS_IMAGE": "x", variable: value})
