"""What `distill` shows of a job: lines, curves, colours, tables; from objects of a cluster and from run folders."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from distill_api import names
from distill_api.status import Progress
from distill_cli.cluster import ApiError
from distill_cli.commands.jobs import age, rows
from distill_cli.commands.watch import stages_of_job
from distill_cli.job_state import job_state, mean_stages, newest_events
from distill_cli.main import main
from distill_cli.pods import pods_of_role
from distill_cli.run_folder import folder_end, folder_snapshot
from distill_cli.snapshot import Curves, RoleState, Snapshot, extended
from distill_cli.views.progress import Plain, panel, sparkline
from distill_cli.views.rollout import colour, rollout_text, select_rollouts
from distill_workers.reporting.samples_file import Rollout

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def job(reason: str = "", status: str = "Unknown", **more: Any) -> dict[str, Any]:
    """As the API server has it."""
    condition = {"type": "Succeeded", "status": status, "reason": reason, "message": "why"}
    condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    meta = {"namespace": "n", "name": "sums", "creationTimestamp": "2026-01-01T00:00:00Z"}
    found = {"conditions": [condition] if reason else [], **more}
    return {"metadata": meta, "spec": {"schedule": {"steps": 10}}, "status": found}


def test_a_job_that_nobody_has_seen_is_new() -> None:
    found = job_state(job(), NOW)
    assert (found.state, found.end, found.age_seconds) == ("New", None, 86400)
    assert (found.progress.step, found.progress.total_steps) == (0, 10)


def test_a_job_of_a_newer_operator_can_be_read() -> None:
    more = {"progress": {"step": 3, "totalSteps": 10, "novelty": 1}, "novelty": {"a": 1}}
    found = job_state(job("Pondering", **more), NOW)
    assert (found.state, found.progress.step, found.end) == ("Pondering", 3, None)


def test_a_job_that_is_being_deleted_says_so() -> None:
    going = job("Running")
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert job_state(going, NOW).state == "Deleting"


@pytest.mark.parametrize(
    ("reason", "status", "code", "sentence"),
    [
        ("Completed", "True", 0, "job sums is complete: model /output/model"),
        ("PreflightFailed", "False", 78, "job sums failed, PreflightFailed: why"),
        ("InvalidSpec", "Unknown", 78, "job sums is not started, InvalidSpec: why"),
        ("DeadlineExceeded", "False", 1, "job sums failed, DeadlineExceeded: why"),
    ],
)
def test_the_end_of_a_job_is_an_exit_code(reason: str, status: str, code: int, sentence: str) -> None:
    found = job_state(job(reason, status, result={"modelPath": "/output/model", "step": 10}), NOW)
    assert found.end is not None and (found.end.code, found.end.sentence) == (code, sentence)


def test_the_table_has_a_column_for_namespaces_only_where_there_are_several() -> None:
    state = job_state(job("Running", progress={"step": 3, "totalSteps": 10, "reverseKL": "0.5"}, restarts=2), NOW)
    assert rows([state], everywhere=False)[1] == ["sums", "Running", "3/10", "0.5", "", "2", "1d"]
    assert [row[0] for row in rows([state], everywhere=True)] == ["NAMESPACE", "n"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-2, "0s"),
        (59, "59s"),
        (60, "1m"),
        (90, "1m30s"),
        (3600 * 5 + 60, "5h1m"),
        (3600 * 13 + 60, "13h"),
        (1e6, "11d"),
    ],
)
def test_an_age_is_written_as_kubectl_writes_it(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_a_sparkline_goes_from_the_lowest_to_the_highest_mean() -> None:
    assert sparkline([1, 2, 3, 8]) == "▁▂▃█"
    assert sparkline([0, 0, 1, 1], cells=2) == "▁█"
    assert sparkline([5, 5]) == "▅▅"
    assert sparkline([]) == "" and len(sparkline(range(1000))) == 40


def test_curves_grow_by_steps_alone() -> None:
    def at(step: int) -> Progress:
        return Progress(step=step, reverse_kl=f"{step}.5")

    grown = extended(Curves(), None, at(1))
    assert extended(grown, at(1), at(1)) == grown == Curves((1.5,))
    assert extended(grown, at(1), at(3)) == Curves((1.5, 3.5))


def test_the_newest_events_are_kept_in_the_order_of_time() -> None:
    events = [
        {"metadata": {"creationTimestamp": f"2026-01-0{day}T00:00:00Z"}, "reason": str(day), "message": "a\n b"}
        for day in (5, 1, 4, 2, 3)
    ]
    found = newest_events([{**events[0], "type": "Warning"}, *events[1:]])
    assert [event.reason for event in found] == ["2", "3", "4", "5"]
    assert (found[-1].warning, found[-1].message) == (True, "a b")


def test_stage_times_come_from_the_trainers_metrics() -> None:
    text = """# TYPE distill_step_duration_seconds histogram
distill_step_duration_seconds_bucket{le="0.1",stage="rollout"} 0.0
distill_step_duration_seconds_count{stage="rollout"} 4.0
distill_step_duration_seconds_sum{stage="rollout"} 10.0
distill_step_duration_seconds_count{stage="train"} 0.0
distill_step_duration_seconds_sum{stage="train"} 0.0
"""
    assert mean_stages(text) == {"rollout": 2.5}


class Proxied:
    """A cluster whose API server passes on what the trainer's pods answer."""

    namespace = "n"

    def __init__(self, answers: dict[str, str], *, allowed: bool = True) -> None:
        self.answers, self.allowed = answers, allowed

    def core(self, plural: str, **query: str) -> list[dict[str, Any]]:
        assert plural == "pods" and query["labelSelector"].endswith("/job=sums,distillation-operator.io/role=trainer")
        phases = {"gone": "Failed"}
        return [{"metadata": {"name": n}, "status": {"phase": phases.get(n, "Running")}} for n in self.answers]

    def text(self, path: str) -> str:
        if not self.allowed:
            raise ApiError(403, "pods/proxy is forbidden")
        return self.answers[path.removeprefix("/api/v1/namespaces/n/pods/").removesuffix(":8080/proxy/metrics")]


def test_watch_asks_the_pod_that_has_rank_0_for_stage_times_and_does_without_where_it_may_not() -> None:
    train = 'distill_step_duration_seconds_{}{{stage="train"}} 4.0\n'
    answers = {"gone": "", "other-rank": "", "rank-0": train.format("sum") + train.format("count")}
    cluster: Any = Proxied(answers)
    assert stages_of_job(cluster, "sums") == {"train": 1.0}
    refused: Any = Proxied(answers, allowed=False)
    assert stages_of_job(refused, "sums") == {}


def test_a_state_that_comes_back_is_a_line_again(capsys: pytest.CaptureFixture[str]) -> None:
    plain, progress = Plain(), Progress(step=3, total_steps=9)
    for state, ready in (("Running", 2), ("Running", 2), ("Restarting", 0), ("Running", 2)):
        plain.show(Snapshot(state, progress, roles=(RoleState("rollout", ready, 2, "NotReady"),)))
    said = capsys.readouterr().out
    assert said.count("Running    step 3/9") == 2 and said.count("Restarting step 3/9") == 1
    assert said.count("rollout 2/2\n") == 2 and said.count("rollout 0/2 NotReady") == 1


def test_the_advice_is_a_line_again_only_where_it_is_about_another_part(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Plain()
    for step, (part, share) in enumerate((("rollout", 71), ("rollout", 64), ("teacher", 55), ("rollout", 60)), 1):
        progress = Progress(step=step, total_steps=9, bottleneck=part, advice=f"{part}: {share} %")
        plain.show(Snapshot("Running", progress))
    said = [line.partition("Advice")[2].strip() for line in capsys.readouterr().out.splitlines() if "Advice" in line]
    assert said == ["rollout: 71 %", "teacher: 55 %", "rollout: 60 %"]


def test_the_panel_shows_curves_roles_and_the_slowest_stage() -> None:
    progress = Progress(
        step=3, total_steps=9, reverse_kl="0.1", reward="0.5", bottleneck="teacher", advice="teacher: do it"
    )
    roles = (RoleState("teacher", 1, 1, ""), RoleState("rollout", 0, 2, "Unschedulable"))
    snapshot = Snapshot("Running", progress, Curves((3, 2, 1), (0, 1)), {"weight_sync": 1.25}, roles)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(panel(snapshot, 61))
    text = captured.get()
    for expected in (
        "reverse KL 0.1 █▅▁",
        "reward 0.5",
        "▁█",
        "slowest teacher",
        "\nteacher: do it",
        "weight sync 1.2 s",
    ):
        assert expected in text
    assert "teacher 1/1   rollout 0/2 Unschedulable" in text


def run_folder(folder: Path, reason: str | None = None, step: int = 2) -> Path:
    (folder / "run.json").write_text("{}")
    progress = {"step": step, "totalSteps": 2, "reverseKL": "0.25"}
    (folder / "state.json").write_text(json.dumps({"phase": "Training", "progress": progress}))
    lines = [{"kind": "step", "step": n, "reverse_kl": 1 / n, "reward": None, "stages": {"train": n}} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if reason is not None:
        (folder / "exit.json").write_text(json.dumps({"reason": reason, "message": "why"}))
    return folder


@pytest.mark.parametrize(
    ("reason", "code"), [("Completed", 0), ("Stopped", 75), ("TeacherUnreachable", 75), ("ConfigurationError", 78)]
)
def test_watching_a_run_folder_ends_as_the_run_did(
    reason: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(run_folder(tmp_path, reason))]) == code
    assert "Training   step 2/2, reverse KL 0.25" in capsys.readouterr().out


def test_a_run_folder_tells_its_curves_and_the_seconds_of_its_last_step(tmp_path: Path) -> None:
    found = folder_snapshot(run_folder(tmp_path))
    assert (found.curves, dict(found.stages), found.end) == (Curves((1.0, 0.5)), {"train": 2}, None)
    assert folder_snapshot(tmp_path / "none").state == "Starting"


def test_a_run_that_was_taken_up_again_has_not_ended(tmp_path: Path) -> None:
    run_folder(tmp_path, "Stopped")
    assert folder_end(tmp_path) is not None
    later = (tmp_path / "exit.json").stat().st_mtime + 5
    os.utime(tmp_path / "state.json", (later, later))
    assert folder_end(tmp_path) is None


def rollout(step: int, source: str = "", **changes: Any) -> Rollout:
    known = {"picked": "first", "reward": 1.0, "response_tokens": 3, "prompt": "2+2=", "tokens": ["so", " 4", "!"]}
    return Rollout(**{"step": step, "source": source, "kl": [2.5, 0.0, -1.0], **known, **changes})


def test_samples_are_of_the_newest_step_unless_another_is_asked_for() -> None:
    every = [rollout(1), rollout(1, "b"), rollout(2), rollout(2, "b"), rollout(2, "b")]
    assert select_rollouts(every, None, None, 9) == every[2:]
    assert select_rollouts(every, 1, None, 9) == every[:2]
    assert select_rollouts(every, None, "b", 1) == every[4:]
    assert select_rollouts(every, 3, None, 9) == []


def test_tokens_are_red_where_the_teacher_holds_them_less_likely_and_blue_where_more() -> None:
    assert colour(3.0) == colour(30.0) == "white on rgb(220,60,40)"
    assert colour(-3.0) == "white on rgb(40,90,220)" and colour(0.01) == ""
    assert [colour(kl, sixteen_colours=True) for kl in (1.5, 0.5, -1.5)] == ["white on red", "", "white on blue"]
    text = rollout_text(rollout(1), coloured=True)
    assert text.plain.endswith("2+2=\nso 4!")
    assert [text.plain[s.start : s.end] for s in text.spans if "rgb" in str(s.style)] == ["so", "!"]


def write_samples(folder: Path, *rollouts: Rollout) -> None:
    lines = [json.dumps({"kind": "rollout", **vars(r)}) for r in rollouts]
    (folder / "samples.jsonl").write_text("\n".join([*lines, '{"kind": "evaluation"}', '{"ki']))


def test_samples_in_a_pipe_name_the_furthest_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(run_folder(tmp_path), rollout(1), rollout(2))
    assert main(["samples", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "step 2, first, 3 tokens, 0.500 nats per token, reward 1\n2+2=\nso 4!\n" in said and "step 1" not in said
    assert "furthest from the teacher: 'so' 2.50, ' 4' 0.00, '!' -1.00" in said
    assert main(["samples", str(tmp_path), "--step", "1", "-o", "json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["step"], found["kl"]) == (1, [2.5, 0.0, -1.0])
    assert main(["samples", str(tmp_path), "--step", "7"]) == 1
    assert "has no rollout of step 7" in capsys.readouterr().err


def test_the_pods_of_an_earlier_job_of_the_name_are_left_out() -> None:
    def pod(name: str, **labels: str) -> dict[str, Any]:
        return {"metadata": {"name": name, "labels": labels}}

    uid = names.LABEL_OWNER_UID
    found = [pod("old", **{uid: "old"}), pod("mine", **{uid: "mine"}), pod("before the upgrade")]
    cluster: Any = SimpleNamespace(core=lambda plural, **query: found)
    shown = [p["metadata"]["name"] for p in pods_of_role(cluster, "sums", "trainer", uid="mine")]
    assert shown == ["mine", "before the upgrade"]
    assert len(pods_of_role(cluster, "sums", "trainer")) == 3
