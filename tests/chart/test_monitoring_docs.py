"""The scrape configuration of docs/monitoring.md: promtool takes it, and its labels are those of the PodMonitor."""

import re
from pathlib import Path
from typing import Any

import yaml
from conftest import ALL_ON, CHART, ROOT, Render, Tool, one

from distill_api import names

PAGE = (ROOT / "docs" / "monitoring.md").read_text()


def blocks() -> list[Any]:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def documented() -> dict[str, Any]:
    [found] = [block for block in blocks() if "scrape_configs" in block]
    assert isinstance(found, dict)
    return found


def test_promtool_accepts_the_documented_configuration(promtool: Tool, tmp_path: Path) -> None:
    config = documented()
    for scrape in config["scrape_configs"]:
        # Debian builds Prometheus without its Kubernetes discovery; the rest is checked as it stands.
        assert scrape.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        scrape["file_sd_configs"] = [{"files": ["targets.json"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "targets.json").write_text("[]")
    (tmp_path / "distillation.yaml").write_text((CHART / "files" / "rules" / "distillation.yaml").read_text())
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_picks_the_pods_and_ports_of_the_monitors_and_labels_them_alike(render: Render) -> None:
    jobs, operator = documented()["scrape_configs"]
    monitor = one(render(*ALL_ON), "PodMonitor")["spec"]
    kept = {tuple(r["source_labels"]): r["regex"] for r in jobs["relabel_configs"] if r.get("action") == "keep"}
    made = {r["target_label"]: r["source_labels"] for r in jobs["relabel_configs"] if "target_label" in r}
    assert kept[("__meta_kubernetes_pod_container_port_name",)].split("|") == [
        endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]
    ]
    assert kept[("__meta_kubernetes_pod_label_app_kubernetes_io_part_of",)] == names.PART_OF
    # Of every pod of a role, of a job or of a Teacher; not the operator's own.
    [picked] = monitor["selector"]["matchExpressions"]
    assert picked == {"key": names.LABEL_ROLE, "operator": "Exists"}
    assert kept[("__meta_kubernetes_pod_label_distillation_operator_io_role",)] == ".+"
    for endpoint in monitor["podMetricsEndpoints"]:
        assert len(endpoint["relabelings"]) == 3
        for relabeling in endpoint["relabelings"]:
            assert made[relabeling["targetLabel"]] == relabeling["sourceLabels"]
    assert operator["honor_labels"] is one(render(*ALL_ON), "ServiceMonitor")["spec"]["endpoints"][0]["honorLabels"]
    deployed = one(render(*ALL_ON), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert deployed["app.kubernetes.io/name"] == "distillation-operator"
