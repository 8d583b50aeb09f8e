"""The weights of divergence and reward, step by step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_api.spec.job_spec import CoefficientSchedule, Decay, Objective
from distill_workers.objective.coefficients import StepCoefficients, scheduled, step_coefficients

DECAYS = st.sampled_from([Decay.LINEAR, Decay.COSINE])


def test_without_a_schedule_they_stay_what_they_are() -> None:
    objective = Objective(coefficient=0.5, reward_coefficient=3.0)

    assert {step_coefficients(objective, step) for step in (0, 1, 10**6)} == {StepCoefficients(0.5, 3.0)}


def test_each_follows_its_own_schedule() -> None:
    objective = Objective.model_validate({
        "coefficient": 1.0,
        "coefficientSchedule": {"decay": "linear", "steps": 4, "endValue": 0.2},
        "rewardCoefficient": 0.0,
        "rewardCoefficientSchedule": {"decay": "cosine", "steps": 2, "endValue": 2.0},
    })  # fmt: skip

    found = [step_coefficients(objective, step) for step in range(6)]

    assert [c.divergence for c in found] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert [c.reward for c in found] == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0, 2.0])


def test_cosine_is_half_a_period() -> None:
    schedule = CoefficientSchedule(decay=Decay.COSINE, steps=10, end_value=1.0)

    expected = [1.0 + 0.5 * (5.0 - 1.0) * (1 + math.cos(math.pi * step / 10)) for step in range(11)]
    assert [scheduled(5.0, schedule, step) for step in range(11)] == pytest.approx(expected)


@given(DECAYS, st.floats(0, 1000), st.floats(0, 1000), st.integers(1, 50), st.integers(0, 100))
def test_it_never_leaves_the_range_between_its_ends_nor_turns_back(
    decay: Decay, start: float, end: float, steps: int, step: int
) -> None:
    schedule = CoefficientSchedule(decay=decay, steps=steps, end_value=end)
    before, after = scheduled(start, schedule, step), scheduled(start, schedule, step + 1)

    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= after <= max(start, end) + slack
    assert abs(after - end) <= abs(before - end) + slack
    assert scheduled(start, schedule, 0) == start


def test_a_guard_lowers_that_of_the_divergence_alone() -> None:
    assert StepCoefficients(2.0, 3.0).lowered(0.25) == StepCoefficients(0.5, 3.0)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        scheduled(1.0, CoefficientSchedule(), -1)
