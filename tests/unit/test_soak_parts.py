"""The pure parts of the soak on the cluster: what disturbs a run, and what would show that it was disturbed."""

import itertools
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import soak
from fault_schedule import (
    DAEMONS,
    KILLED,
    KILLS,
    RESTART_SECONDS,
    START_SECONDS,
    STEP_SECONDS,
    Target,
    fault_schedule,
    restarts,
)
from run_evidence import Life, lives, overlapping, step_problems, steps_back, steps_of

STEPS = 40
SCHEDULES = [fault_schedule(seed, STEPS) for seed in range(300)]


def test_a_seed_gives_the_same_schedule_each_time_and_another_seed_another() -> None:
    assert [fault_schedule(seed, STEPS) for seed in range(300)] == SCHEDULES
    assert len({schedule.disturbances for schedule in SCHEDULES}) == 300


def test_each_schedule_has_three_kills_in_the_first_half_and_all_targets_come_often() -> None:
    for schedule in SCHEDULES:
        killed = [d for d in schedule.disturbances if d.target is not Target.RUN]
        assert len(killed) == KILLS
        steps = [d.step for d in schedule.disturbances]
        assert steps == sorted(steps) and steps[-1] <= STEPS // 2
        assert all(0 <= d.share < 1 for d in schedule.disturbances)
    counts = Counter(d.target for schedule in SCHEDULES for d in schedule.disturbances)
    assert min(counts[target] for target in Target) > 60, counts


def test_only_a_restart_and_a_start_are_given_longer_than_the_second_half_of_a_run_takes() -> None:
    for schedule in SCHEDULES:
        before = None
        for d in schedule.disturbances:
            if before and restarts(before.target) and d.step == before.step:
                assert d.delay_seconds <= max(RESTART_SECONDS, START_SECONDS)
            elif d.step > 0:
                assert d.delay_seconds <= STEP_SECONDS
            before = d


def test_some_disturbances_come_in_the_start_and_some_in_the_midst_of_a_restart() -> None:
    assert sum(schedule.disturbances[0].step == 0 for schedule in SCHEDULES) > 10
    pairs = [pair for s in SCHEDULES for pair in itertools.pairwise(s.disturbances)]
    assert sum(a.step == b.step and restarts(a.target) for a, b in pairs) > 60


def test_only_what_does_not_start_by_itself_is_away_for_a_time() -> None:
    for schedule in SCHEDULES:
        for d in schedule.disturbances:
            if d.target in KILLED and d.target not in DAEMONS:
                assert d.away_seconds == 0 and "for" not in str(d)
            else:
                assert str(d).endswith(f"for {d.away_seconds:.1f} s")


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ([1, 2, 3], []),
        ([1, 3], ["steps [2] are missing"]),
        ([1, 2], ["steps [3] are missing"]),
        ([1, 2, 2, 3], ["steps [2] are there more than once"]),
        ([1, 2, 3, 4], ["steps [4] are none of 1 to 3"]),
        ([2, 1, 3], ["the steps are not in their order: [2, 1, 3]"]),
        ([], ["steps [1, 2, 3] are missing"]),
    ],
)
def test_a_gap_a_double_and_a_step_too_many_are_named(done: list[int], said: list[str]) -> None:
    assert step_problems(done, 3) == said


def test_steps_are_read_while_the_last_line_is_being_written(tmp_path: Path) -> None:
    assert steps_of(tmp_path) == []
    lines = [{"kind": "evaluation", "step": 0}, {"kind": "step", "step": 1}, {"kind": "step", "step": 2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "st')
    assert steps_of(tmp_path) == [1, 2]


def test_a_checkpoint_that_goes_back_is_named() -> None:
    assert steps_back(["step-000002", "step-000002\n", "step-000010"]) == []
    assert steps_back(["step-000030", "step-000024", "step-000025"]) == [("step-000030", "step-000024")]


def pod(uid: str, **state: Any) -> dict[str, Any]:
    status = {"containerStatuses": [{"name": "main", "state": state}, {"name": "sidecar", "state": {"running": {}}}]}
    return {"metadata": {"name": f"job-trainer-1-0-{uid}", "uid": uid}, "status": status}


def running(second: int) -> dict[str, str]:
    return {"startedAt": f"2026-11-30T10:00:{second:02}Z"}


def ended(first: int, last: int) -> dict[str, str]:
    return {**running(first), "finishedAt": f"2026-11-30T10:00:{last:02}Z"}


def test_the_life_of_a_trainer_is_what_was_last_said_of_its_container() -> None:
    at = [datetime(2026, 11, 30, 10, 0, second, tzinfo=UTC) for second in (5, 20, 21)]
    seen = [
        pod("b", waiting={}),
        pod("b", running=running(21)),
        pod("a", running=running(5)),
        pod("a", terminated=ended(5, 20)),
        {"metadata": {"name": "never", "uid": "c"}},
    ]
    assert lives(seen, "main") == [Life("job-trainer-1-0-a", "a", at[0], at[1]), Life("job-trainer-1-0-b", "b", at[2])]


def test_two_trainers_at_a_time_are_found_and_one_whose_end_nobody_knows_too() -> None:
    first, touching = pod("a", terminated=ended(5, 20)), pod("b", terminated=ended(20, 30))
    assert overlapping(lives([first, touching], "main")) == []
    for seen in ([first, pod("b", running=running(19))], [pod("a", running=running(5)), touching]):
        [(a, b)] = overlapping(lives(seen, "main"))
        assert (a.uid, b.uid) == ("a", "b")
    assert overlapping(lives([first], "main")) == []


def test_the_number_of_runs_can_be_said_and_one_seed_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(soak.VARIABLE, "0")
    monkeypatch.delenv(soak.RUNS, raising=False)
    monkeypatch.delenv(soak.SEED, raising=False)
    assert list(soak.runs(0.2, at_least=3)) == [0, 1, 2]
    monkeypatch.setenv(soak.RUNS, "5")
    assert list(soak.runs(0.2, at_least=3)) == [0, 1, 2, 3, 4]
    monkeypatch.setenv(soak.SEED, "17")
    assert list(soak.runs(0.2, at_least=3)) == [17]
    assert list(soak.chosen(range(2))) == [17]
