"""The learning rate over a run."""

import math

import pytest

from distill_api.spec.job_spec import Optimizer, RateSchedule
from distill_workers.run.learning_rate import learning_rate

PEAK, LOWEST, STEPS, WARMUP = 1e-3, 1e-4, 20, 4


def rates(schedule: str, **changes: float) -> list[float]:
    fields = {"learning_rate": PEAK, "min_learning_rate": LOWEST, "warmup_steps": WARMUP, **changes}
    optimizer = Optimizer.model_validate({"schedule": schedule, **fields}, by_name=True)
    return [learning_rate(optimizer, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", list(RateSchedule))
def test_every_schedule_begins_with_the_same_linear_warm_up(schedule: str) -> None:
    assert rates(schedule)[:5] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_a_constant_rate_stays() -> None:
    assert set(rates("constant")[WARMUP:]) == {PEAK}


def test_without_warm_up_the_first_step_has_the_full_learning_rate() -> None:
    for schedule in RateSchedule:
        assert rates(schedule, warmup_steps=0)[0] == PEAK


def test_a_linear_rate_falls_by_equal_amounts() -> None:
    falls = [a - b for a, b in zip(rates("linear")[WARMUP:], rates("linear")[WARMUP + 1 :], strict=False)]

    assert falls == pytest.approx([(PEAK - LOWEST) / 16] * 15)


def test_a_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates("cosine")

    assert found[WARMUP + 8] == pytest.approx((PEAK + LOWEST) / 2)
    assert found[WARMUP + 4] == pytest.approx(LOWEST + (PEAK - LOWEST) * (1 + math.sqrt(0.5)) / 2)


def test_wsd_is_stable_until_the_last_share_and_then_falls_as_one_minus_a_root() -> None:
    found = rates("wsd", decay_share=0.2)  # 4 of 20 steps

    assert set(found[WARMUP:17]) == {PEAK}
    assert found[17:] == pytest.approx([LOWEST + (PEAK - LOWEST) * (1 - math.sqrt(i / 4)) for i in (1, 2, 3)])


def test_wsd_decays_in_what_the_warm_up_leaves() -> None:
    found = rates("wsd", decay_share=1.0)

    assert found[WARMUP] == PEAK
    assert found[-1] == pytest.approx(LOWEST + (PEAK - LOWEST) * (1 - math.sqrt(15 / 16)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_decay_never_rises_and_every_step_is_above_the_least_rate(schedule: str) -> None:
    found = rates(schedule, min_learning_rate=0.0)[WARMUP:]

    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 0.3 * PEAK


@pytest.mark.parametrize("step", [-1, STEPS])
def test_a_step_outside_of_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="below the 20 steps of the schedule"):
        learning_rate(Optimizer(), step, STEPS)
