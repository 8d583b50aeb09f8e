"""What the chart closes, what two replicas need, and what kube-score has to say about all that is rendered.

Rendered by the real helm and compared here: helm-unittest would be a second language for the same assertions.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHART, ROOT, Manifest, Render, Tool, _tool, one

from distill_api.job import load_job
from distill_api.names import OPERATOR_LABELS
from distill_operator.rbac import CLUSTER_RULES, KUEUE_CLUSTER_RULES, KUEUE_RULES, NAMESPACED_RULES
from distill_operator.resources import rendering
from distill_operator.settings import Settings

NAME = "distillation-operator"
HA = "replicas=2"

ACCEPTED = {
    "operator": {
        "CPU limit is not set": "a throttled operator misses its Lease; its memory is limited",
        "ImagePullPolicy is not set to Always": "tags are releases; a start must not need the registry",
        "The pod does not have a matching egress NetworkPolicy": "the API server is no pod, its address is not known",
        "Container has the same readiness and liveness probe": "ready and alive are one: it serves nobody",
        "Deployment update strategy": "one operator without a Lease goes before the next one comes",
        "Deployment does not have a host podAntiAffinity set": "topologySpreadConstraints spread two over nodes",
        "Deployment few replicas": "a restart takes seconds and jobs go on meanwhile; two are a value away",
    },
    "job": {
        "CPU limit is not set": "a throttled process holds up every accelerator of the job",
        "Memory limit is not set": "an estimate must not end a pod that the node could hold; a template sets one",
        "Ephemeral Storage limit is not set": "as for memory",
        "Ephemeral Storage request is not set": "as for memory",
        "ImagePullPolicy is not set to Always": "tags are releases; an image of 20 GB is not looked up at each start",
        "The container is running with a low user ID": "volumes are shared with people, whose ids begin at 1000",
        "The container running with a low group ID": "as for the user",
        "Deployment update strategy": "a rolling update would need accelerators that nobody keeps spare",
        "Deployment few replicas": "spec.teacher.replicas says how many; the trainer waits for one that comes back",
    },
}
"""What kube-score says, and why it is meant. An entry that nothing needs any more fails the test, too."""


@pytest.fixture(scope="session")
def kube_score() -> Tool:
    return _tool("kube-score", "run `make tools`")


def pods_of_a_job() -> list[Manifest]:
    """The children of an example, with Ray's pods as pods: kube-score does not look into a RayCluster."""
    job = load_job(ROOT / "examples" / "qwen3-8b-opd.yaml")
    job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": "5f0c0a54", "namespace": "team"})})
    settings = Settings("workers:1", namespace="distillation-system", scrape_namespaces=("monitoring",))
    made = [*rendering.lasting(job, settings), *rendering.serving(job, settings), rendering.training(job, settings, 1)]
    [ray] = [child for child in made if child["kind"] == "RayCluster"]
    groups = {"head": ray["spec"]["headGroupSpec"], "engine": ray["spec"]["workerGroupSpecs"][0]}
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": part, "namespace": "team", **group["template"]["metadata"]},
            "spec": group["template"]["spec"],
        }
        for part, group in groups.items()
    ]
    return [child for child in made if child["kind"] != "RayCluster"] + pods


def findings(kube_score: Tool, manifests: list[Manifest], folder: Path) -> set[str]:
    """The sentences of the checks that are not passed."""
    file = folder / "manifests.yaml"
    file.write_text(yaml.safe_dump_all(manifests))
    scored = json.loads(kube_score("score", "--output-format", "json", file).stdout)
    assert len(scored) >= 3
    checks = [check for each in scored for check in each["checks"] if not check["skipped"]]
    passed = 10
    return {comment["summary"] for check in checks if check["grade"] < passed for comment in check["comments"]}


def test_kube_score_finds_nothing_that_has_no_written_reason(kube_score: Tool, render: Render, tmp_path: Path) -> None:
    two = render(HA, "scrapeNamespaces={monitoring}")
    operator = findings(kube_score, render(), tmp_path) | findings(kube_score, two, tmp_path)
    assert operator == set(ACCEPTED["operator"])
    assert findings(kube_score, pods_of_a_job(), tmp_path) == set(ACCEPTED["job"])


def test_one_operator_goes_before_the_next_one_comes(render: Render) -> None:
    spec = one(render(), "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert "topologySpreadConstraints" not in spec["template"]["spec"]
    assert not [m for m in render() if m["kind"] == "PodDisruptionBudget"]


def test_one_operator_too_works_only_with_a_lease_unless_that_is_turned_off(render: Render) -> None:
    # A Deployment makes a second pod for one on a node that nobody can reach, where it may still run.
    assert environment(render())["DISTILL_LEADER_ELECTION"] == "true"
    off = render("leaderElection.enabled=false")
    assert environment(off)["DISTILL_LEADER_ELECTION"] == "false"
    assert not [m for m in off if m["kind"] in ("Role", "RoleBinding")]
    assert environment(render(HA, "leaderElection.enabled=false"))["DISTILL_LEADER_ELECTION"] == "true"


def environment(manifests: list[Manifest]) -> dict[str, str]:
    [container] = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    return {e["name"]: e["value"] for e in container["env"]}


def test_two_operators_share_a_lease_a_budget_and_no_node(render: Render) -> None:
    manifests = render(HA)
    spec = one(manifests, "Deployment")["spec"]
    selector = spec["selector"]
    assert spec["replicas"] == 2
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 1}}
    [spread] = spec["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["labelSelector"]) == ("kubernetes.io/hostname", selector)
    budget = one(manifests, "PodDisruptionBudget")["spec"]
    assert budget == {"maxUnavailable": 1, "selector": selector}
    wanted = {
        "DISTILL_LEADER_ELECTION": "true",
        "DISTILL_LEASE_NAME": NAME,
        "DISTILL_LEASE_NAMESPACE": "distillation-system",
    }
    assert environment(manifests).items() >= wanted.items()


@pytest.mark.parametrize("values", [(HA,), ()], ids=["two", "one"])
def test_the_lease_is_the_only_right_in_the_operators_namespace(render: Render, values: tuple[str, ...]) -> None:
    role = one(render(*values), "Role")
    leases = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    # The name of what is to be made is not known to the one who allows it.
    named = {**leases, "resourceNames": [NAME], "verbs": ["get", "update"]}
    assert role["rules"] == [{**leases, "verbs": ["create"]}, named]
    assert role["metadata"]["namespace"] == "distillation-system"
    binding = one(render(*values), "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [s["name"] for s in binding["subjects"]] == [one(render(), "ServiceAccount")["metadata"]["name"]]


@pytest.mark.parametrize("where", [(), ("watchNamespaces={team}",)], ids=["everywhere", "one namespace"])
def test_groups_of_a_gang_scheduler_are_a_right_only_where_it_is_named(render: Render, where: tuple[str, ...]) -> None:
    kind, usual = ("Role", NAMESPACED_RULES) if where else ("ClusterRole", (*NAMESPACED_RULES, *CLUSTER_RULES))
    rules = one(render(*where, "gangSchedulers={volcano,kai}"), kind, NAME)["rules"]
    more = [rule for rule in rules if rule not in usual]
    assert [rule["apiGroups"] for rule in more] == [["scheduling.volcano.sh"], ["scheduling.run.ai"]]
    assert all(rule["resources"] == ["podgroups"] for rule in more)
    assert one(render(*where), kind, NAME)["rules"] == list(usual)


@pytest.mark.parametrize("where", [(), ("watchNamespaces={team}",)], ids=["everywhere", "one namespace"])
def test_workloads_of_kueue_are_a_right_only_where_it_is_used(render: Render, where: tuple[str, ...]) -> None:
    kind, usual = ("Role", NAMESPACED_RULES) if where else ("ClusterRole", (*NAMESPACED_RULES, *CLUSTER_RULES))
    used = render(*where, "kueue=true")
    assert [r for r in one(used, kind, NAME)["rules"] if r not in usual] == list(KUEUE_RULES)
    assert one(used, "ClusterRole", f"{NAME}-kueue")["rules"] == list(KUEUE_CLUSTER_RULES)
    assert environment(used)["DISTILL_KUEUE"] == "true" and environment(render())["DISTILL_KUEUE"] == "false"
    assert not [m for m in render(*where) if m["metadata"]["name"] == f"{NAME}-kueue"]


def test_the_operators_pod_is_closed_but_for_metrics_to_named_namespaces(render: Render) -> None:
    labels = one(render(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    closed = one(render(), "NetworkPolicy")["spec"]
    assert closed["podSelector"]["matchLabels"].items() <= labels.items()
    assert closed["policyTypes"] == ["Ingress"] and "ingress" not in closed
    [rule] = one(render("scrapeNamespaces={monitoring}"), "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": "metrics"}]
    [source] = rule["from"]
    assert source["namespaceSelector"]["matchExpressions"][0]["values"] == ["monitoring"]
    assert not [m for m in render("networkPolicy.enabled=false") if m["kind"] == "NetworkPolicy"]


def test_jobs_know_the_operators_pods_by_the_labels_that_the_chart_gives_them(render: Render) -> None:
    labels = one(render(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert OPERATOR_LABELS.items() <= labels.items()
    assert environment(render())["DISTILL_NAMESPACE"] == "distillation-system"


def test_whoever_turns_monitoring_on_without_naming_its_namespace_is_warned(helm: Tool) -> None:
    on = ("install", "x", CHART, "--dry-run=client", "--set", "metrics.podMonitor.enabled=true")
    assert "scrapeNamespaces names no namespace" in helm(*on).stdout
    assert "scrapeNamespaces names no namespace" not in helm(*on, "--set", "scrapeNamespaces={monitoring}").stdout


def policies(manifests: list[Manifest]) -> list[str]:
    """The names of the admission policies, each of which has its binding."""
    bound = [m["spec"]["policyName"] for m in manifests if m["kind"] == "ValidatingAdmissionPolicyBinding"]
    assert bound == [m["metadata"]["name"] for m in manifests if m["kind"] == "ValidatingAdmissionPolicy"]
    return bound


def test_the_operator_is_held_by_a_policy_and_users_where_it_is_turned_on(render: Render, helm: Tool) -> None:
    operator, users = (f"distillation-system.{NAME}-{whom}" for whom in ("operator", "users"))
    assert policies(render()) == [operator]
    assert sorted(policies(render("policies.users.enabled=true"))) == [operator, users]
    assert policies(render("policies.operator.enabled=false")) == []
    old = helm("template", NAME, CHART, "--kube-version=1.29.0")
    assert old.returncode == 0 and "ValidatingAdmissionPolicy" not in old.stdout
    account = one(render(), "ServiceAccount")["metadata"]
    [condition] = one(render(), "ValidatingAdmissionPolicy")["spec"]["matchConditions"]
    named = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert condition["expression"] == f'request.userInfo.username == "{named}"'


def test_an_upgrade_that_reuses_the_values_of_an_older_chart_gets_the_defaults(helm: Tool, render: Render) -> None:
    added = ("allowTrustRemoteCode", "jobEgress", "gangSchedulers", "replicas", "leaderElection", "networkPolicy")
    added += ("metadataAddresses", "dns", "policies", "kueue")
    absent = [part for name in added for part in ("--set", f"{name}=null")]
    done = helm("template", NAME, CHART, "--namespace", "distillation-system", *absent)
    assert done.returncode == 0, done.stderr
    old, new = ([m for m in found if m] for found in (yaml.safe_load_all(done.stdout), render("crds.keep=true")))
    assert old == new


def test_every_crd_in_the_charts_folder_is_installed(render: Render) -> None:
    files = list((CHART / "files" / "crds").glob("*.yaml"))
    crds = [m for m in render("crds.keep=true") if m["kind"] == "CustomResourceDefinition"]
    assert len(crds) == len(files) >= 1
    assert all(m["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"} for m in crds)


def test_the_readme_of_the_chart_is_made_from_its_values() -> None:
    script: list[Any] = [sys.executable, ROOT / "dev" / "chart_readme.py"]
    made = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert made == (CHART / "README.md").read_text(), "run `python dev/chart_readme.py > charts/.../README.md`"
    for path in ("replicas", "jobEgress", "metrics.podMonitor.enabled", "resources"):
        assert f"| `{path}` |" in made
