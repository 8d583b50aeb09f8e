"""Every query of every dashboard and every alert, put to a real Prometheus that watches a real run."""

import json
import re
import time
from collections.abc import Iterator

import pytest
import yaml
from observed import JOB, NAMESPACE, RULES, Prometheus, world
from runs import REPO

pytestmark = pytest.mark.timeout(400)

BOARDS = sorted((REPO / "charts" / "distillation-operator" / "files" / "dashboards").glob("*.json"))
ABSENT_PANELS = {
    "Use of the GPUs": "a GPU, and DCGM's exporter",
    "Memory of the GPUs": "a GPU, and DCGM's exporter",
    "Restarts of containers": "kube-state-metrics",
    "Requests that the API server refuses": "a fault: a request that is refused",
    "Sampled advantage": "support sampled-token, and a baseline or a teacher with a tokenizer of its own",
    "Reference": "objective.reference",
    "Stored scores": "objective.teacherLogprobs",
    "Weights of tokens": "objective.forwardKlAboveEntropy for that share",
    "Copied from the teacher's prompt": "prompts.teacherPrompt",
    "Lag of the teacher": "teacher.student",
    "Phase of the objective": "spec.phases",
}
"""Panels that this run leaves empty, and what they need; it has a reward, data sources, guards and failing samples."""
ABSENT_SELECTORS = {
    'distill_teacher_requests_total{code!="200"}': "a fault: a scoring request that fails",
    "distill_train_step": "offset 4h: a run of four hours",
}
"""Of alerts. All others find their series, whether or not the alert fires."""
QUIET_ANNOTATIONS = {"Failed attempts", "Restarted engines", "Guards"}
"""They are answers to a fault; their queries are asked without the comparison."""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with world(tmp_path_factory.mktemp("observed")) as running:
        # The last things to be there: an evaluation after a checkpoint, and two scrapes of failed samples.
        running.wait("distill_train_step > 4", 120)
        running.wait("increase(distill_samples_failed_total[1m]) > 0")
        yield running


def asked(expression: str) -> str:
    for variable, value in {"$namespace": NAMESPACE, "$job": JOB, "$__range": "10m"}.items():
        expression = expression.replace(variable, value)
    return expression


def test_every_query_of_every_panel_has_an_answer(prometheus: Prometheus) -> None:
    empty: dict[str, list[str]] = {}
    count = 0
    for path in BOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                count += 1
                if not prometheus.answers(asked(target["expr"]), 0 if panel["title"] in ABSENT_PANELS else 20):
                    empty.setdefault(panel["title"], []).append(target["expr"])
                    needs = ABSENT_PANELS.get(panel["title"])
                    assert needs and panel["description"].endswith(f"Needs {needs}."), (panel["title"], target["expr"])
    assert empty.keys() == ABSENT_PANELS.keys(), "what has an answer is not to be excused"
    assert count > 90


def test_every_query_of_every_annotation_is_understood(prometheus: Prometheus) -> None:
    names = set()
    for path in BOARDS:
        for annotation in json.loads(path.read_text())["annotations"].get("list", []):
            expression = asked(annotation["expr"])
            assert expression.endswith(" > 0")
            assert prometheus.answers(expression.removesuffix(" > 0")), annotation["name"]
            names.add(annotation["name"])
    assert names == QUIET_ANNOTATIONS


def selectors(expression: str) -> list[str]:
    """The series that an expression is made of."""
    found = re.findall(r'(?:distill_\w+(?:\{[^}]*\})?|\{__name__=~"[^"]*"[^}]*\})', expression)
    return [one for one in found if one != "distill_job"]


def test_every_series_of_every_alert_is_there_and_no_alert_is_in_error(prometheus: Prometheus) -> None:
    missing = set()
    for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]:
        prometheus.query(rule["expr"])
        for selector in selectors(rule["expr"]):
            if not prometheus.answers(selector, 0 if selector in ABSENT_SELECTORS else 20):
                missing.add(selector)
    assert missing <= ABSENT_SELECTORS.keys()
    loaded = prometheus.get("rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in loaded} == {"ok"}
    assert len(loaded) == 14
    firing = {rule["name"] for rule in loaded if rule["state"] == "firing"}
    assert not firing, "a run that is well"


def test_the_roles_of_a_job_are_told_apart(prometheus: Prometheus) -> None:
    up = f'up{{namespace="{NAMESPACE}", distillation_job="{JOB}"}} == 1'
    # An engine's pod has a port of SGLang's and one of Ray's.
    expected = {"teacher": "1", "rollout": "2", "trainer": "1"}
    assert by_role(prometheus, f"count by (role) ({up})", expected) == expected
    servers = {"teacher": "1", "rollout": "1"}
    assert by_role(prometheus, 'group by (role) ({__name__=~"sglang[:_]num_running_reqs"})', servers) == servers


def by_role(prometheus: Prometheus, expression: str, expected: dict[str, str]) -> dict[str, str]:
    """The value of each role: as expected, or what it is after a time. A slow scrape hides a series for a second."""
    end = time.monotonic() + 20
    while True:
        rows = prometheus.get("query", query=expression)["result"]
        found = {row["metric"]["role"]: row["value"][1] for row in rows}
        if found == expected or time.monotonic() > end:
            return found
        time.sleep(0.3)
