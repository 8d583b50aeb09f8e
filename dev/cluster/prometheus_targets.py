"""Keeps a Prometheus target file equal to the pods of this project that serve metrics.

    prometheus_targets.py FILE        (KUBECONFIG names the cluster; runs until it is ended)

A target is every running pod with the label app.kubernetes.io/part-of=distillation-operator and a container port named
"metrics", or "ray-metrics": of an engine's pod, whose port "metrics" is SGLang's. The PodMonitor of the chart does the
same in a cluster that has the Prometheus operator.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

SELECTOR = "app.kubernetes.io/part-of=distillation-operator"
PORT_NAMES = ("metrics", "ray-metrics")
PATH_ANNOTATION = "prometheus.io/path"
# Prometheus label -> label of the pod
COPIED_LABELS = {
    "distillation_job": "distillation-operator.io/job",
    "shared_teacher": "distillation-operator.io/shared-teacher",
    "role": "distillation-operator.io/role",
}
PERIOD_SECONDS = 2.0

log = logging.getLogger("prometheus-targets")


def targets(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a file_sd file for `pods` as the API server lists them; sorted: equal states are equal files."""
    entries = []
    for pod in pods:
        meta, status = pod["metadata"], pod.get("status", {})
        address = status.get("podIP")
        if status.get("phase") != "Running" or not address or meta.get("deletionTimestamp"):
            continue
        labels = {"namespace": meta["namespace"], "pod": meta["name"]}
        labels["__metrics_path__"] = meta.get("annotations", {}).get(PATH_ANNOTATION, "/metrics")
        for name, source in COPIED_LABELS.items():
            if source in meta.get("labels", {}):
                labels[name] = meta["labels"][source]
        for container in pod["spec"]["containers"]:
            for port in container.get("ports", []):
                if port.get("name") in PORT_NAMES:
                    entries.append({"targets": [f"{address}:{port['containerPort']}"], "labels": labels})
    return sorted(entries, key=lambda entry: (entry["labels"]["namespace"], entry["labels"]["pod"], entry["targets"]))


def write_if_changed(file: Path, entries: list[dict[str, Any]]) -> None:
    text = json.dumps(entries, indent=1)
    if file.exists() and file.read_text() == text:
        return
    aside = file.with_suffix(".new")  # replaced at once: Prometheus must never read half a file
    aside.write_text(text)
    aside.replace(file)
    log.info("%d targets", len(entries))


def main(file: Path) -> None:
    import kubernetes

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    kubernetes.config.load_kube_config()
    pods = kubernetes.client.CoreV1Api()
    while True:
        try:
            answer = pods.list_pod_for_all_namespaces(
                label_selector=SELECTOR, _preload_content=False, _request_timeout=5
            )
            write_if_changed(file, targets(json.loads(answer.data)["items"]))
        except Exception as error:  # the API server may be away for a while; the last targets stay
            log.warning("%s", error)
        time.sleep(PERIOD_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
