"""What the chart makes of its values."""

import json
import re
from typing import Any

import pytest
import yaml
from conftest import ALL_ON, CHART, MONITORING, ROOT, Render, Tool, one

from distill_api import names, protocol
from distill_operator.rbac import CLUSTER_RULES, NAMESPACE_RULES, NAMESPACED_RULES
from distill_operator.settings import ClusterDns, Egress, Settings

CRD_FILES = sorted((CHART / "files" / "crds").glob("*.yaml"))
BASE_KINDS = [
    "ClusterRole",
    "ClusterRole",
    "ClusterRole",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "CustomResourceDefinition",
    "Deployment",
    "NetworkPolicy",
    "Role",
    "RoleBinding",
    "Service",
    "ServiceAccount",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
]
MONITORING_KINDS = {
    "serviceMonitor": "ServiceMonitor",
    "podMonitor": "PodMonitor",
    "prometheusRule": "PrometheusRule",
    "dashboards": "ConfigMap",
}


def kinds(manifests: list[dict[str, Any]]) -> list[str]:
    return sorted(m["kind"] for m in manifests)


@pytest.mark.parametrize("values", [(), ALL_ON], ids=["default", "everything on"])
def test_helm_lint_has_nothing_to_say(helm: Tool, values: tuple[str, ...]) -> None:
    done = helm("lint", "--strict", CHART, *[part for value in values for part in ("--set", value)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


def test_by_default_there_is_no_monitoring(render: Render) -> None:
    assert kinds(render()) == BASE_KINDS


@pytest.mark.parametrize("name", MONITORING)
def test_each_kind_of_monitoring_adds_its_own_object(render: Render, name: str) -> None:
    assert kinds(render(f"metrics.{name}.enabled=true")) == sorted([*BASE_KINDS, MONITORING_KINDS[name]])


@pytest.mark.parametrize(
    ("value", "where", "why"),
    [
        ("workerImage=x", "", "additional properties 'workerImage' not allowed"),
        ("metrics.podMonitor.enable=true", "/metrics/podMonitor", "additional properties 'enable' not allowed"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy", "value must be one of 'IfNotPresent', 'Always', 'Never'"),
        ("resyncSeconds=0", "/resyncSeconds", "exclusiveMinimum: got 0, want 0"),
        ("concurrency=many", "/concurrency", "got string, want integer"),
        ("replicas=0", "/replicas", "minimum: got 0, want 1"),
        ("jobEgress=shut", "/jobEgress", "value must be one of 'no-metadata', 'closed', 'open'"),
        ("metadataAddresses={imds}", "/metadataAddresses/0", "does not match pattern"),
        ("dns.ports={dns}", "/dns/ports/0", "got string, want integer"),
        ("policies.users.image={x}", "/policies/users", "additional properties 'image' not allowed"),
        ("metrics.prometheusRule.runbookUrl=docs", "/metrics/prometheusRule/runbookUrl", "does not match pattern"),
        ("watchNamespaces=team-a", "/watchNamespaces", "got string, want array"),
        ("watchNamespaces={Team A}", "/watchNamespaces/0", "does not match pattern"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_the_reason(helm: Tool, value: str, where: str, why: str) -> None:
    done = helm("template", "x", CHART, "--set", value)
    assert done.returncode != 0
    assert f"at '{where}':" in done.stderr
    assert why in done.stderr


def test_every_value_is_in_the_schema_and_has_a_comment() -> None:
    def check(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        assert schema.get("additionalProperties") is False, f"{path} takes unknown values"
        assert set(values) <= set(schema["properties"]), path
        for key, value in values.items():
            inner = schema["properties"][key]
            if isinstance(value, dict) and "properties" in inner and value:
                check(value, inner, f"{path}.{key}")

    check(
        yaml.safe_load((CHART / "values.yaml").read_text()), json.loads((CHART / "values.schema.json").read_text()), ""
    )
    above = ""
    for line in (CHART / "values.yaml").read_text().splitlines():
        opens_a_group = re.fullmatch(r"\s*\w+:", line)
        if re.match(r"\s*\w+:", line) and not opens_a_group and not line.startswith(("  requests:", "  limits:")):
            assert above.lstrip().startswith("#"), f"no comment above: {line}"
        above = line


def crds(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for m in manifests if m["kind"] == "CustomResourceDefinition"]


def test_the_crds_are_the_generated_ones() -> None:
    generated = sorted((ROOT / "crds").glob("*.yaml"))
    assert [f.read_text() for f in CRD_FILES] == [f.read_text() for f in generated], "run `make crds`"


def test_the_crds_are_kept_on_uninstall_and_otherwise_unchanged(render: Render) -> None:
    found = crds(render())
    assert [crd["metadata"].pop("annotations") for crd in found] == 2 * [{"helm.sh/resource-policy": "keep"}]
    assert found == [yaml.safe_load(file.read_text()) for file in CRD_FILES]


def test_the_crds_may_go_with_the_release_or_be_left_to_others(render: Render) -> None:
    assert crds(render("crds.keep=false")) == [yaml.safe_load(file.read_text()) for file in CRD_FILES]
    assert not crds(render("crds.install=false"))


def test_the_operator_watching_everything_has_exactly_the_rights_it_names(render: Render) -> None:
    role = one(render(), "ClusterRole", "distillation-operator")
    assert role["rules"] == [*NAMESPACED_RULES, *CLUSTER_RULES]
    binding = one(render(), "ClusterRoleBinding")
    account = one(render(), "ServiceAccount")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": "distillation-system"}
    ]


def test_the_operator_of_some_namespaces_has_no_right_outside_them(render: Render) -> None:
    manifests = render("watchNamespaces={team-a,team-b}", "rbac.userRoles=false")
    assert not [m for m in manifests if m["kind"].startswith("Cluster")]
    own = "distillation-system"  # for its Lease
    manifests = [m for m in manifests if m["metadata"].get("namespace") != own]
    roles = {m["metadata"]["namespace"]: m["rules"] for m in manifests if m["kind"] == "Role"}
    assert roles == {"team-a": list(NAMESPACED_RULES), "team-b": list(NAMESPACED_RULES)}
    bound = [m["metadata"]["namespace"] for m in manifests if m["kind"] == "RoleBinding"]
    assert bound == ["team-a", "team-b"]


def test_the_operator_of_labelled_namespaces_may_list_namespaces_and_has_its_rights_in_each(render: Render) -> None:
    for values in (["watchNamespaceSelector=a=b"], ["watchNamespaceSelector=a=b", "watchNamespaces={team-a}"]):
        manifests = render(*values)
        role = one(manifests, "ClusterRole", "distillation-operator")
        assert role["rules"] == [*NAMESPACED_RULES, *CLUSTER_RULES, *NAMESPACE_RULES]
        assert not [m for m in manifests if m["metadata"].get("namespace") == "team-a"]


def test_people_may_view_edit_and_administer_jobs_by_the_roles_they_have(render: Render) -> None:
    rights = {}
    for word, aggregate in (("viewer", "view"), ("editor", "edit"), ("admin", "admin")):
        role = one(render(), "ClusterRole", f"distillation-operator-{word}")
        assert role["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{aggregate}"] == "true"
        rights[word] = {resource: set(r["verbs"]) for r in role["rules"] for resource in r["resources"]}
    for kind in ("distillationjobs", "teachers"):
        assert {**rights["viewer"]}.items() >= {kind: {"get", "list", "watch"}, f"{kind}/status": {"get"}}.items()
        assert rights["editor"][kind] == rights["admin"][kind] > rights["viewer"][kind]
    assert not [resource for found in rights.values() for resource in found if "secret" in resource]
    assert rights["viewer"]["distillationjobs"] < rights["editor"]["distillationjobs"]
    assert "patch" not in rights["editor"]["distillationjobs/status"]
    assert "patch" in rights["admin"]["distillationjobs/status"]


def test_pod_security_restricted_admits_the_operator(render: Render) -> None:
    pod = one(render(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for field in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
        assert field not in pod
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("hostPort" not in port for port in container["ports"])
    assert [set(v) - {"name"} for v in pod["volumes"]] == [{"emptyDir"}]


def test_the_operator_reads_its_settings_from_the_values(render: Render) -> None:
    values = (
        "workersImage=registry.example/workers:1",
        "workersImagePullPolicy=Always",
        "workersImagePullSecrets={one,two}",
        "watchNamespaces={team-a,team-b}",
        "watchNamespaceSelector=distillation=enabled",
        "scrapeNamespaces={monitoring}",
        "allowTrustRemoteCode=true",
        "jobEgress=closed",
        "metadataAddresses={10.0.0.1,fd01::/64}",
        "dns.namespace=dns",
        "dns.podLabels.app=resolver",
        "dns.podLabels.tier=a",
        "dns.addresses={10.96.0.10}",
        "dns.ports={5353}",
        "resyncSeconds=30",
        "progressSeconds=0.5",
        "concurrency=3",
        "logLevel=DEBUG",
        "logFormat=text",
    )
    [container] = one(render(*values), "Deployment")["spec"]["template"]["spec"]["containers"]
    environment = {e["name"]: e["value"] for e in container["env"]}
    settings = Settings.from_environment(environment)
    assert settings == Settings(
        workers_image="registry.example/workers:1",
        workers_image_pull_policy="Always",
        workers_image_pull_secrets=("one", "two"),
        watch_namespaces=("team-a", "team-b"),
        watch_namespace_selector="distillation=enabled",
        scrape_namespaces=("monitoring",),
        namespace="distillation-system",
        leader_election=True,
        lease_namespace="distillation-system",
        allow_trust_remote_code=True,
        job_egress=Egress.CLOSED,
        metadata_addresses=("10.0.0.1/32", "fd01::/64"),
        dns=ClusterDns("dns", (("app", "resolver"), ("tier", "a")), ("10.96.0.10/32",), (5353,)),
        resync_seconds=30,
        progress_seconds=0.5,
        concurrency=3,
        log_level="DEBUG",
        log_format="text",
    )
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"health": settings.health_port, "metrics": settings.metrics_port}


def test_every_variable_that_the_operator_reads_is_set(render: Render) -> None:
    source = "".join(p.read_text() for p in (ROOT / "operator" / "distill_operator").rglob("*.py"))
    [container] = one(render(), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {e["name"] for e in container["env"]} == {"HOME", *re.findall(r"DISTILL_[A-Z_]*[A-Z]", source)}


def test_the_services_and_monitors_select_the_operator_and_the_jobs_apart(render: Render) -> None:
    manifests = render(*ALL_ON)
    operator = one(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert one(manifests, "Service")["spec"]["selector"].items() <= operator.items()
    service_labels = one(manifests, "Service")["metadata"]["labels"]
    assert one(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items() <= service_labels.items()

    monitor = one(manifests, "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"] == {names.LABEL_PART_OF: names.PART_OF}
    assert monitor["selector"]["matchExpressions"] == [{"key": names.LABEL_ROLE, "operator": "Exists"}]
    assert names.LABEL_JOB not in operator
    # The engines' pods serve SGLang's metrics at the one and Ray's at the other.
    assert [e["port"] for e in monitor["podMetricsEndpoints"]] == [
        protocol.METRICS_PORT_NAME,
        protocol.RAY_METRICS_PORT_NAME,
    ]
    pod_label = "__meta_kubernetes_pod_label_"
    for endpoint in monitor["podMetricsEndpoints"]:
        assert {r["targetLabel"]: r["sourceLabels"] for r in endpoint["relabelings"]} == {
            "distillation_job": [pod_label + re.sub(r"\W", "_", names.LABEL_JOB)],
            "role": [pod_label + re.sub(r"\W", "_", names.LABEL_ROLE)],
            "shared_teacher": [pod_label + re.sub(r"\W", "_", names.LABEL_SHARED_TEACHER)],
        }


def test_pods_of_jobs_are_sought_only_in_watched_namespaces(render: Render) -> None:
    assert one(render(*ALL_ON), "PodMonitor")["spec"]["namespaceSelector"] == {"any": True}
    some = one(render(*ALL_ON, "watchNamespaces={team-a}"), "PodMonitor")
    assert some["spec"]["namespaceSelector"] == {"matchNames": ["team-a"]}
    labelled = one(render(*ALL_ON, "watchNamespaces={team-a}", "watchNamespaceSelector=a=b"), "PodMonitor")
    assert labelled["spec"]["namespaceSelector"] == {"any": True}


def test_the_readme_names_values_that_exist(render: Render) -> None:
    [settings] = re.findall(r"--set (\S+=true)", (ROOT / "README.md").read_text())
    kinds = {manifest["kind"] for manifest in render(*settings.split(","))}
    assert {"PodMonitor", "PrometheusRule"} <= kinds
