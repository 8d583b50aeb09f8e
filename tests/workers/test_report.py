"""The report of a run: what it shows, and that it can be made at any moment of a run."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill_api.job import DistillationJob, parse_job
from distill_workers.reporting.metrics_file import read_run
from distill_workers.reporting.report import write_report
from distill_workers.reporting.samples_file import read_rollouts


@pytest.fixture
def job() -> DistillationJob:
    return parse_job(
        {
            "apiVersion": "distillation-operator.io/v1alpha1",
            "kind": "DistillationJob",
            "metadata": {"name": "sums"},
            "spec": {
                "accelerator": "none",
                "student": {"model": "/models/<student>"},
                "teacher": {"model": "/models/teacher"},
                "data": {"prompts": {"path": "/models/train.jsonl"}},
                "schedule": {"steps": 20},
            },
        }
    )


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "time": 1_700_000_000.0 + step,
        "samples": 4,
        "reverse_kl": 1.0 / step,
        "reward": 0.1 * step,
        "loss": 0.5,
        "grad_norm": 1.0,
        "response_tokens": 20,
        "truncated_ratio": 0.25,
        "stages": {"rollout": 1.0, "teacher_score": 0.5, "train": 0.25, "weight_sync": 0.1},
        **changes,
    }


def evaluation_line(step: int, score: float | None, kl: float, teacher: float | None = None) -> dict[str, Any]:
    line = {"kind": "evaluation", "time": 1.0, "name": "heldout", "step": step, "score": score}
    return {**line, "reverse_kl": kl, "teacher_score": teacher}


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Loads(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            value for key, value in attrs if key in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]


def test_the_page_shows_evaluations_before_and_after(tmp_path: Path, job: DistillationJob) -> None:
    steps = [step_line(n) for n in range(1, 21)]
    write_metrics(tmp_path, [evaluation_line(0, 0.25, 2.0, 1.0), *steps, evaluation_line(20, 0.875, 0.5)])
    write_report(tmp_path, job)
    page = (tmp_path / "report.html").read_text()
    for expected in ("20 of 20 steps", "0.250 → 0.875", "+0.625", "2.000 → 0.500", "-1.500", "1.000"):
        assert expected in page
    for title in ("Reverse KL to the teacher", "Evaluation and reward", "Seconds of a step", "Length of responses"):
        assert title in page
    for stage in ("rollout", "teacher score", "train", "weight sync"):
        assert f">{stage}<" in page
    assert re.search(r"torch \d", page)
    assert "steps: 20" in page


def test_versions_are_those_of_the_run_not_of_this_machine(tmp_path: Path, job: DistillationJob) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"versions": {"torch": "9.9.9"}}))
    write_report(tmp_path, job)
    page = (tmp_path / "report.html").read_text()
    assert "<p>torch 9.9.9</p>" in page


def test_the_page_needs_no_other_file(tmp_path: Path, job: DistillationJob) -> None:
    write_metrics(tmp_path, [step_line(1)])
    write_report(tmp_path, job)
    assert Loads((tmp_path / "report.html").read_text()).found == []
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_users_write_is_escaped(tmp_path: Path, job: DistillationJob) -> None:
    write_report(tmp_path, job)
    page = (tmp_path / "report.html").read_text()
    assert "<student>" not in page
    assert "&lt;student&gt;" in page


def test_a_run_without_a_step_has_a_report_too(tmp_path: Path, job: DistillationJob) -> None:
    write_report(tmp_path, job)
    page = (tmp_path / "report.html").read_text()
    assert "0 of 20 steps" in page
    assert page.count("nothing measured") == 4


def test_a_run_without_rewards_scores_or_stages_has_a_report(tmp_path: Path, job: DistillationJob) -> None:
    write_metrics(tmp_path, [step_line(1, reward=None, stages={}), evaluation_line(1, None, 0.5)])
    write_report(tmp_path, job)
    assert "– → –" in (tmp_path / "report.html").read_text()


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, [step_line(1), step_line(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    assert [s.step for s in read_run(path).steps] == [1]


def test_equal_runs_make_equal_reports_and_nothing_else_is_left(tmp_path: Path, job: DistillationJob) -> None:
    write_metrics(tmp_path, [step_line(1), step_line(2)])
    write_report(tmp_path, job)
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, job)
    assert (tmp_path / "report.html").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "curve.png", "report.html"}


def rollout(step: int, tokens: list[str], kl: list[float], **changes: Any) -> dict[str, Any]:
    known = {"kind": "rollout", "step": step, "picked": "first", "source": "", "reward": None, "prompt": "2+2="}
    return {**known, "response_tokens": len(tokens), "tokens": tokens, "kl": kl, **changes}


def write_samples(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "roll')


def test_tokens_of_rollouts_are_coloured_by_their_kl(tmp_path: Path, job: DistillationJob) -> None:
    write_samples(tmp_path, [rollout(1, ["<4>", " ok", "!"], [3.0, 0.0, -1.5], reward=1.0, source="sums")])
    write_report(tmp_path, job)
    page = (tmp_path / "report.html").read_text()
    assert '<span style="background:rgba(220,60,40,0.80)" title="3.000">&lt;4&gt;</span>' in page
    assert '<span style="background:rgba(40,90,220,0.00)" title="0.000"> ok</span>' in page
    assert '<span style="background:rgba(40,90,220,0.40)" title="-1.500">!</span>' in page
    assert "step 1, first, sums, 3 tokens, 0.500 nats per token, reward 1" in page
    assert "2+2=" in page


def test_rollouts_of_the_first_step_and_of_the_last_are_shown(tmp_path: Path) -> None:
    lines = [rollout(step, [f"{step}"], [0.1], picked=why) for step in (1, 2, 3) for why in ("first", "furthest")]
    write_samples(tmp_path, [{"kind": "evaluation", "step": 0}, *lines])
    shown = [(r.step, r.picked) for r in read_rollouts(tmp_path)]
    assert shown == [(1, "first"), (1, "furthest"), (3, "first"), (3, "furthest")]


def test_what_guards_did_is_told(tmp_path: Path, job: DistillationJob) -> None:
    guard = {"kind": "guard", "guard": "diverges", "action": "roll-back", "step": 4, "at_step": 9, "message": "kl > 5"}
    write_metrics(tmp_path, [step_line(1), {**guard, "time": 1.0, "coefficient_factor": 1.0}])
    write_report(tmp_path, job)
    row = "<td>diverges</td><td>9</td><td>roll-back</td><td>4</td><td>kl &gt; 5</td>"
    assert row in (tmp_path / "report.html").read_text()
