"""Alerts fire when they should, and alerts and dashboard name only metrics that the code exports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ALL_ON, CHART, ROOT, Render, Tool, one

from distill_api.metrics import OPERATOR_METRICS, WORKER_METRICS, Kind, Metric, wire_name
from distill_api.metrics_docs import text

RULES = CHART / "files" / "rules" / "distillation.yaml"
DASHBOARD = CHART / "files" / "dashboards" / "distillation-job.json"
SGLANG_METRICS = {"sglang:num_running_reqs", "sglang:num_queue_reqs"}
"""Of SGLang 0.5.23, srt/observability/metrics_collector.py."""


def series(metric: Metric) -> set[str]:
    if metric.kind is Kind.HISTOGRAM:
        return {f"{metric.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    return {wire_name(metric)}


KNOWN = SGLANG_METRICS.union(*(series(m) for m in (*WORKER_METRICS, *OPERATOR_METRICS)))
LABELS = {label for m in (*WORKER_METRICS, *OPERATOR_METRICS) for label in m.labels}


def named(expression: str) -> set[str]:
    """Metrics of an expression: words of ours or SGLang's outside of braces and quotes."""
    # SGLang's colon is an underscore for a Prometheus before 3, so its metrics are matched by name.
    by_name = re.sub(r'\{__name__=~"sglang\[:_\](\w+)"', r"sglang:\1{", expression)
    bare = re.sub(r"\{[^}]*\}", "", by_name)
    return set(re.findall(r"\b(?:distill_[a-z0-9_]+|sglang:[a-z0-9_]+)", bare)) - {"distillation_job"}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def panel_expressions() -> list[str]:
    return [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", [])]


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_the_prometheus_rule_is_the_rule_file(render: Render) -> None:
    assert one(render(*ALL_ON), "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())


def test_promtool_accepts_the_rules(promtool: Tool) -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_says_what_happened_and_what_to_do() -> None:
    for rule in rules():
        assert {"summary", "description"} == set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


JOB = 'namespace="team", distillation_job="qwen", pod="qwen-trainer-1-0"'
CASES: list[tuple[str, str, dict[str, str], str, dict[str, str] | None]] = [
    (
        "DistillationJobStalled",
        "a stalled job",
        {'distill_job_condition{namespace="team", name="qwen", type="Stalled"}': "0x10 1x10"},
        "15m",
        {"namespace": "team", "name": "qwen", "type": "Stalled"},
    ),
    (
        "DistillationJobStalled",
        "a job that goes on",
        {
            'distill_job_condition{namespace="team", name="qwen", type="Stalled"}': "0x20",
            'distill_job_condition{namespace="team", name="qwen", type="Ready"}': "1x20",
        },
        "15m",
        None,
    ),
    (
        "DistillationKLDiverging",
        "a KL that fell, and rises again over a restart of the trainer",
        {
            f"distill_reverse_kl_nats{{{JOB}}}": "1-0.008x100 0.2x60 stale",
            f"distill_reverse_kl_nats{{{JOB.replace('1-0', '2-0')}}}": "_x162 1x60",
        },
        "3h30m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationKLDiverging",
        "a KL that falls and stays",
        {f"distill_reverse_kl_nats{{{JOB}}}": "1-0.008x100 0.2x60 0.25x60"},
        "3h30m",
        None,
    ),
    (
        "DistillationKLDiverging",
        "a KL so small that it is noise",
        {f"distill_reverse_kl_nats{{{JOB}}}": "0.001x100 0.03x120"},
        "3h30m",
        None,
    ),
    (
        "DistillationTeacherErrors",
        "a teacher that fails one request of ten",
        {
            f'distill_teacher_requests_total{{{JOB}, code="200"}}': "0+90x40",
            f'distill_teacher_requests_total{{{JOB}, code="503"}}': "0+6x40",
            f'distill_teacher_requests_total{{{JOB}, code="error"}}': "0+4x40",
        },
        "20m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationTeacherErrors",
        "a teacher that fails one request of a hundred",
        {
            f'distill_teacher_requests_total{{{JOB}, code="200"}}': "0+99x40",
            f'distill_teacher_requests_total{{{JOB}, code="503"}}': "0+1x40",
        },
        "20m",
        None,
    ),
    (
        "DistillationOperatorDown",
        "an operator that has gone",
        {'distill_operator_build_info{version="0.1.0"}': "1x10 stale"},
        "20m",
        {},
    ),
    (
        "DistillationOperatorDown",
        "an operator that was away for the length of an upgrade",
        {'distill_operator_build_info{version="0.1.0"}': "1x10 stale _x2 1x20"},
        "20m",
        None,
    ),
    (
        "DistillationReconcileErrors",
        "reconciles that keep failing",
        {
            'distill_operator_reconcile_total{pod="operator", result="error"}': "0+1x40",
            'distill_operator_reconcile_total{pod="operator", result="ok"}': "0+5x40",
        },
        "30m",
        {"pod": "operator"},
    ),
    (
        "DistillationReconcileErrors",
        "a reconcile that failed twice",
        {
            'distill_operator_reconcile_total{pod="operator", result="error"}': "0x10 2x30",
            'distill_operator_reconcile_total{pod="operator", result="ok"}': "0+5x40",
        },
        "30m",
        None,
    ),
]


@pytest.mark.parametrize(
    ("alert", "at", "input_series", "labels"),
    [(alert, at, given, labels) for alert, _, given, at, labels in CASES],
    ids=[f"{alert}: {what}" for alert, what, *_ in CASES],
)
def test_an_alert_fires_on(
    promtool: Tool, tmp_path: Path, alert: str, at: str, input_series: dict[str, str], labels: dict[str, str] | None
) -> None:
    """And, where `labels` is None, does not. Summaries are left to the eye: promtool compares only given ones."""
    # Annotations are compared whole; the rules under test are the shipped ones without them.
    bare = [{key: value for key, value in rule.items() if key != "annotations"} for rule in rules()]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "distillation", "rules": bare}]}))
    severity = next(rule["labels"]["severity"] for rule in bare if rule["alert"] == alert)
    expected = [] if labels is None else [{"exp_labels": {**labels, "severity": severity}}]
    check = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in input_series.items()],
                "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": expected}],
            }
        ],
    }
    (tmp_path / "check.yaml").write_text(yaml.safe_dump(check))
    done = promtool("test", "rules", tmp_path / "check.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways() -> None:
    fires = {alert for alert, *_, labels in CASES if labels is not None}
    stays_quiet = {alert for alert, *_, labels in CASES if labels is None}
    assert fires == stays_quiet == {rule["alert"] for rule in rules()}


def test_alerts_and_dashboard_name_only_metrics_that_are_exported() -> None:
    expressions = [rule["expr"] for rule in rules()] + panel_expressions()
    assert all(named(e) for e in expressions)
    assert set().union(*map(named, expressions)) - KNOWN == set()


def test_the_dashboard_shows_every_metric_of_a_trainer_that_has_no_other_home() -> None:
    shown = set().union(*map(named, panel_expressions()))
    missing = {m.name for m in WORKER_METRICS if not series(m) & shown}
    assert missing == {"distill_learning_rate", "distill_weight_version"}


def test_promtool_parses_every_query_of_the_dashboard(promtool: Tool, tmp_path: Path) -> None:
    records = [
        {"record": f"panel:{i}", "expr": e.replace("$namespace", "n").replace("$job", "j")}
        for i, e in enumerate(panel_expressions())
    ]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    done = promtool("check", "rules", tmp_path / "panels.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_works_in_any_grafana(render: Render) -> None:
    board = dashboard()
    assert board["uid"] == "distillation-job"
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "namespace", "job"]
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    shipped = one(render(*ALL_ON), "ConfigMap")
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(shipped["data"][DASHBOARD.name]) == board


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_the_page_of_metrics_is_the_registry() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == text(), "run `make crds`"
