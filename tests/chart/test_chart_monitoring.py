"""Alerts fire when they should and say where to read on; alerts and dashboards name only metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ALL_ON, CHART, ROOT, Render, Tool, one

from distill_api.generate.metrics_docs import text
from distill_api.metrics import OPERATOR_METRICS, WORKER_METRICS, Kind, Metric, scraped_name

RULES = CHART / "files" / "rules" / "distillation.yaml"
DASHBOARDS = sorted((CHART / "files" / "dashboards").glob("*.json"))
RUNBOOKS = ROOT / "docs" / "runbooks"
SGLANG_METRICS = {"sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:gen_throughput"}
"""Of SGLang 0.5.23, srt/observability/metrics_collector.py."""
FOREIGN_METRICS = {
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_FB_USED",
    "ray_node_mem_used",
    "kube_pod_container_status_restarts_total",
}
"""Of DCGM's exporter, of Ray (dashboard/modules/reporter/reporter_agent.py), of kube-state-metrics."""


def series(metric: Metric) -> set[str]:
    if metric.kind is Kind.HISTOGRAM:
        return {f"{metric.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    return {scraped_name(metric)}


KNOWN = (SGLANG_METRICS | FOREIGN_METRICS).union(*(series(m) for m in (*WORKER_METRICS, *OPERATOR_METRICS)))
LABELS = {label for m in (*WORKER_METRICS, *OPERATOR_METRICS) for label in m.labels}


def named(expression: str) -> set[str]:
    """Metrics of an expression: words of ours, or of those exporters, outside of braces and quotes."""
    # SGLang's colon is an underscore for a Prometheus before 3, so its metrics are matched by name.
    by_name = re.sub(r'\{__name__=~"sglang\[:_\](\w+)"', r"sglang:\1{", expression)
    bare = re.sub(r'\{[^}]*\}|"[^"]*"', "", by_name)
    return set(re.findall(r"\b(?:(?:distill|ray|kube|DCGM)_\w+|sglang:[a-z0-9_]+)", bare))


def board(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def panel_expressions(*paths: Path) -> list[str]:
    """Those of annotations too."""
    found = []
    for shown in map(board, paths or DASHBOARDS):
        found += [t["expr"] for panel in shown["panels"] for t in panel.get("targets", [])]
        found += [annotation["expr"] for annotation in shown["annotations"].get("list", [])]
    return found


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_the_prometheus_rule_is_the_rule_file(render: Render) -> None:
    assert one(render(*ALL_ON), "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())


def test_the_link_of_each_alert_is_made_of_the_site_that_the_value_names(render: Render) -> None:
    site = "metrics.prometheusRule.runbookUrl=https://docs.example/runbooks/{alert}.html"
    [group] = one(render(*ALL_ON, site), "PrometheusRule")["spec"]["groups"]
    for made, rule in zip(group["rules"], rules(), strict=True):
        url = f"https://docs.example/runbooks/{rule['alert']}.html"
        assert made == rule | {"annotations": rule["annotations"] | {"runbook_url": url}}


def test_promtool_accepts_the_rules(promtool: Tool) -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_says_what_happened_and_what_to_do() -> None:
    for rule in rules():
        assert {"summary", "description", "runbook"} == set(rule["annotations"]), rule["alert"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_each_alert_has_a_page_that_says_how_to_confirm_it_and_what_to_do() -> None:
    for rule in rules():
        page = RUNBOOKS / f"{rule['alert']}.md"
        assert rule["annotations"]["runbook"] == str(page.relative_to(ROOT))
        text = page.read_text()
        headings = [line for line in text.splitlines() if line.startswith("#")]
        assert headings == [f"# {rule['alert']}", "## What it means", "## How to confirm", "## What to do"]
        parts = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
        assert all(len(part.split()) >= 12 for part in parts), f"{page.name} has an empty part"
        assert "`" in parts[1], f"{page.name}: how to confirm names no command, query or field"
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == {rule["alert"] for rule in rules()}


JOB = 'namespace="team", distillation_job="qwen", pod="qwen-trainer-1-0"'
CHECKPOINT = "distill_checkpoint_last_success_timestamp_seconds"
LAST_STEP, STEPS = "distill_last_step_timestamp_seconds", "distill_train_step"
DECISIONS, QUEUE = "distill_guard_decisions_total", "distill_teacher_queue_depth"


def phase(reason: str) -> str:
    return f'distill_job_phase{{namespace="team", name="qwen", phase="{reason}"}}'


def stages(**seconds: int) -> dict[str, str]:
    """Seconds of each minute that go into a stage."""
    return {
        f'distill_step_duration_seconds_sum{{{JOB}, stage="{stage}"}}': f"0+{spent}x80"
        for stage, spent in seconds.items()
    }


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
        "DistillationPendingTooLong",
        "a job that waits for pods, and then for models",
        {
            phase("Pending"): "1x20 stale",
            phase("Starting"): "_x21 1x20",
        },
        "35m",
        {"namespace": "team", "name": "qwen"},
    ),
    (
        "DistillationPendingTooLong",
        "a job with a queue's label where nobody admits it",
        {phase("KueueNotInstalled"): "1x40"},
        "35m",
        {"namespace": "team", "name": "qwen"},
    ),
    (
        "DistillationPendingTooLong",
        "a job that waits for quota",
        {phase("WaitingForQuota"): "1x40"},
        "35m",
        None,
    ),
    (
        "DistillationPendingTooLong",
        "a job that waited, and runs",
        {phase("Pending"): "1x20 stale", phase("Running"): "_x21 1x40"},
        "50m",
        None,
    ),
    (
        "DistillationJobRestarts",
        "two failed attempts within an hour",
        {'distill_job_restarts{namespace="team", name="qwen"}': "1x60 2x20 3x20"},
        "90m",
        {"namespace": "team", "name": "qwen"},
    ),
    (
        "DistillationJobRestarts",
        "a failed attempt now and then",
        {'distill_job_restarts{namespace="team", name="qwen"}': "1x90 2x90 3x90"},
        "200m",
        None,
    ),
    (
        "DistillationCheckpointTooOld",
        "a checkpoint of five hours ago",
        {f"{CHECKPOINT}{{{JOB}}}": "600x360", f"{LAST_STEP}{{{JOB}}}": "0+60x360", f"{STEPS}{{{JOB}}}": "0+1x360"},
        "5h",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationCheckpointTooOld",
        "five hours without a first checkpoint",
        {f"{LAST_STEP}{{{JOB}}}": "0+60x360", f"{STEPS}{{{JOB}}}": "0+1x360"},
        "5h",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationCheckpointTooOld",
        "a checkpoint every hour, by another pod after a restart",
        {
            f"{CHECKPOINT}{{{JOB}}}": "600x300 stale",
            f"{STEPS}{{{JOB}}}": "0+1x300 stale",
            f"{CHECKPOINT}{{{JOB.replace('1-0', '2-0')}}}": "_x301 18000x60",
            f"{STEPS}{{{JOB.replace('1-0', '2-0')}}}": "_x301 300+1x60",
            f"{LAST_STEP}{{{JOB}}}": "0+60x360",
        },
        "5h30m",
        None,
    ),
    (
        "DistillationCheckpointTooOld",
        "a job that has not begun to train for long",
        {f"{LAST_STEP}{{{JOB}}}": "0+60x60", f"{STEPS}{{{JOB}}}": "0+1x60"},
        "1h",
        None,
    ),
    (
        "DistillationRewardCollapse",
        "a reward that was good, and falls",
        {f"distill_reward_mean{{{JOB}}}": "0.1+0.005x100 0.6x60 0.1x60"},
        "3h30m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationRewardCollapse",
        "a reward that falls a little",
        {f"distill_reward_mean{{{JOB}}}": "0.1+0.005x100 0.6x60 0.45x60"},
        "3h30m",
        None,
    ),
    (
        "DistillationRewardCollapse",
        "a reward that was never there",
        {f"distill_reward_mean{{{JOB}}}": "0.05x100 0.01x120"},
        "3h30m",
        None,
    ),
    (
        "DistillationLengthCollapse",
        "responses that become short",
        {f"distill_response_tokens_mean{{{JOB}}}": "900x160 100x60"},
        "3h30m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationLengthCollapse",
        "responses that become concise",
        {f"distill_response_tokens_mean{{{JOB}}}": "900x160 400x60"},
        "3h30m",
        None,
    ),
    (
        "DistillationGuardActed",
        "the first decision of a guard",
        {f'{DECISIONS}{{{JOB}, guard="short", action="stop"}}': "0x10 1x20"},
        "15m",
        {"namespace": "team", "distillation_job": "qwen", "guard": "short", "action": "stop"},
    ),
    (
        "DistillationGuardActed",
        "a guard that has nothing to do",
        {f'{DECISIONS}{{{JOB}, guard="short", action="stop"}}': "0x30"},
        "15m",
        None,
    ),
    (
        "DistillationTeacherSaturated",
        "steps that wait for scores, and a queue in the trainer",
        {**stages(rollout=10, teacher_score=30, train=15, weight_sync=5), f"{QUEUE}{{{JOB}}}": "12x60"},
        "50m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationTeacherSaturated",
        "steps that wait for scores, and a queue in SGLang",
        {
            **stages(rollout=10, teacher_score=30, train=15, weight_sync=5),
            f"{QUEUE}{{{JOB}}}": "0x60",
            'sglang:num_queue_reqs{namespace="team", distillation_job="qwen", role="teacher", pod="a"}': "3x60",
        },
        "50m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationTeacherSaturated",
        "a queue that holds nothing up",
        {**stages(rollout=10, teacher_score=5, train=40, weight_sync=5), f"{QUEUE}{{{JOB}}}": "12x60"},
        "50m",
        None,
    ),
    (
        "DistillationTrainerWaiting",
        "a trainer that waits nine tenths of its time",
        stages(rollout=50, teacher_score=4, train=4, weight_sync=2),
        "70m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationTrainerWaiting",
        "a trainer that waits for environments nine tenths of its time",
        stages(rollout=10, environment=40, teacher_score=4, train=4, weight_sync=2),
        "70m",
        {"namespace": "team", "distillation_job": "qwen"},
    ),
    (
        "DistillationTrainerWaiting",
        "a trainer that waits half of its time",
        stages(rollout=26, teacher_score=4, train=24, weight_sync=6),
        "70m",
        None,
    ),
    (
        "DistillationTeacherNotReady",
        "a Teacher whose jobs have waited for twenty minutes",
        {
            'distill_shared_teacher_condition{namespace="team", name="poet", type="Ready"}': "1x5 0x40",
            'distill_shared_teacher_jobs{namespace="team", name="poet"}': "2x45",
        },
        "25m",
        {"namespace": "team", "name": "poet"},
    ),
    (
        "DistillationTeacherNotReady",
        "a Teacher that no job learns from, one that came back, and one that is gone",
        {
            'distill_shared_teacher_condition{namespace="team", name="idle", type="Ready"}': "0x45",
            'distill_shared_teacher_jobs{namespace="team", name="idle"}': "0x45",
            'distill_shared_teacher_condition{namespace="team", name="back", type="Ready"}': "0x14 1 0x30",
            'distill_shared_teacher_jobs{namespace="team", name="back"}': "2x45",
            'distill_shared_teacher_condition{namespace="team", name="gone", type="Ready"}': "0x10 stale",
            'distill_shared_teacher_jobs{namespace="team", name="gone"}': "2x10 stale",
        },
        "29m",
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


def test_alerts_and_dashboards_name_only_metrics_that_are_exported() -> None:
    expressions = [rule["expr"] for rule in rules()] + panel_expressions()
    assert all(named(e) for e in expressions)
    assert set().union(*map(named, expressions)) - KNOWN == set()


def test_the_dashboard_of_a_job_shows_every_metric_of_a_trainer() -> None:
    [path] = [p for p in DASHBOARDS if p.stem == "distillation-job"]
    shown = set().union(*map(named, panel_expressions(path)))
    assert {m.name for m in WORKER_METRICS if not series(m) & shown} == set()


def test_the_dashboards_show_every_metric_of_the_operator() -> None:
    shown = set().union(*map(named, panel_expressions()))
    missing = {m.name for m in OPERATOR_METRICS if not series(m) & shown}
    assert missing == {"distill_job_info"}, "it fills the variables"


def test_promtool_parses_every_query_of_the_dashboards(promtool: Tool, tmp_path: Path) -> None:
    given = {"$namespace": "n", "$job": "j", "$__range": "3h"}
    records = []
    for i, expression in enumerate(panel_expressions()):
        for variable, value in given.items():
            expression = expression.replace(variable, value)
        records.append({"record": f"panel:{i}", "expr": expression})
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    done = promtool("check", "rules", tmp_path / "panels.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_are_what_their_code_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "dev" / "dashboards"))
    from generate import texts

    assert {p.name: p.read_text() for p in DASHBOARDS} == texts(), "run `make dashboards`"


def test_there_is_a_dashboard_of_a_job_of_the_fleet_and_of_the_operator() -> None:
    assert [p.stem for p in DASHBOARDS] == ["distillation-fleet", "distillation-job", "distillation-operator"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_a_dashboard_works_in_any_grafana(path: Path, render: Render) -> None:
    one_board = board(path)
    assert one_board["uid"] == path.stem
    assert [v["name"] for v in one_board["templating"]["list"]] == ["datasource", "namespace", "job"]
    for panel in one_board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["description"], panel["title"]
    ids = [panel["id"] for panel in one_board["panels"]]
    assert len(ids) == len(set(ids))
    shipped = one(render(*ALL_ON), "ConfigMap")
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(shipped["data"][path.name]) == one_board


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board(path)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_the_page_of_metrics_is_the_registry() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == text(), "run `make crds`"
