"""Pod Security `restricted` admits the operator, as the chart renders it; the pods of jobs: test_operator_lifecycle."""

import subprocess
import urllib.error
from typing import Any

import pytest
import yaml
from conftest import ROOT, _binary
from operator_world import PODS, api_of


@pytest.mark.parametrize("values", ["replicas=1", "replicas=2"])
def test_a_namespace_that_enforces_restricted_admits_the_operator(
    crds_installed: Any, namespace: str, values: str
) -> None:
    api = api_of(crds_installed.kubeconfig)
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.merge(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": label}})
    chart = ROOT / "charts" / "distillation-operator"
    rendered = subprocess.run(
        [str(_binary("helm")), "template", "x", str(chart), "--namespace", namespace, "--set", values],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    [template] = [m["spec"]["template"] for m in yaml.safe_load_all(rendered) if m and m["kind"] == "Deployment"]
    pod = {"metadata": {"name": "operator", "labels": template["metadata"]["labels"]}, "spec": template["spec"]}
    path = PODS.format(ns=namespace) + "?dryRun=All"
    assert api.call("POST", path, pod)["metadata"]["name"] == "operator"
    del pod["spec"]["containers"][0]["securityContext"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        api.call("POST", path, pod)
