"""The page of metrics, generated from the registry: `python -m distill_api.generate.metrics_docs FILE` writes it."""

import sys
from pathlib import Path

from distill_api.generate.crd import write_atomically
from distill_api.metrics import OPERATOR_METRICS, WORKER_METRICS, Metric, scraped_name

_HEAD = """# Metrics

Made from `crds/distill_api/metrics/` by `make crds`; do not edit. Counters are named as they are scraped. The job
that a series belongs to (namespace, `distillation_job`, `role`, pod) comes from the scrape target: the chart's
PodMonitor sets these labels. SGLang's servers, teacher and engines, add their own `sglang:` metrics (`sglang_` in a
Prometheus before 3).
"""


def text() -> str:
    """Return the whole page, as Markdown."""
    trainer = _table("Trainer", "Port `metrics` of the trainer's first pod, path `/metrics`.", WORKER_METRICS)
    operator = _table("Operator", "Port `metrics` of the operator's pod, path `/metrics`.", OPERATOR_METRICS)
    return "\n".join([_HEAD, trainer, operator])


def _table(title: str, where: str, metrics: tuple[Metric, ...]) -> str:
    lines = [f"## {title}", "", where, "", "| name | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(
            f"| `{scraped_name(metric)}` | {metric.kind.value} | {labels} | {metric.help.replace('|', chr(92) + '|')} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), text())
