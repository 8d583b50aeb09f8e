"""The number of servers of a shared teacher: up at once, down slowly, never outside its bounds."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from distill_api.teacher.kind import Autoscaling
from distill_operator.teacher.autoscaler import Scale, rescaled, seconds_to_scale_down

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RULE = Autoscaling(min_replicas=1, max_replicas=8, target_requests=10, scale_down_seconds=300)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize(("requests", "expected"), [(0, 2), (20, 2), (21, 3), (75, 8), (10_000, 8)])
def test_more_requests_add_servers_at_once(requests: int, expected: int) -> None:
    assert rescaled(RULE, Scale(2), requests, NOW).replicas == expected


def test_servers_go_when_fewer_were_enough_for_the_whole_window() -> None:
    scale = rescaled(RULE, Scale(6), 15, NOW)
    assert scale == Scale(6, NOW, 2)
    scale = rescaled(RULE, scale, 15, after(299))
    assert scale.replicas == 6
    assert rescaled(RULE, scale, 15, after(300)) == Scale(2)


def test_they_go_to_what_the_busiest_moment_of_the_window_needed() -> None:
    scale = rescaled(RULE, Scale(6), 5, NOW)
    scale = rescaled(RULE, scale, 35, after(100))
    scale = rescaled(RULE, scale, 5, after(300))
    assert scale.replicas == 4
    # and from there on, as little is still needed
    assert scale.low_since == after(300)
    assert rescaled(RULE, scale, 5, after(600)).replicas == 1


def test_a_moment_at_which_all_are_needed_begins_the_window_anew() -> None:
    scale = rescaled(RULE, Scale(6), 5, NOW)
    scale = rescaled(RULE, scale, 60, after(200))
    assert scale == Scale(6)
    assert rescaled(RULE, scale, 5, after(300)).replicas == 6


def test_time_to_the_next_look_is_known() -> None:
    scale = rescaled(RULE, Scale(6), 5, NOW)
    assert seconds_to_scale_down(RULE, scale, after(100)) == 200
    assert seconds_to_scale_down(RULE, Scale(6), after(100)) is None


@settings(deadline=None, derandomize=True)
@given(some.integers(1, 300), some.lists(some.tuples(some.integers(0, 5000), some.floats(0, 400)), max_size=20))
def test_it_stays_in_bounds_and_never_falls_below_what_is_needed(start: int, loads: list[tuple[int, float]]) -> None:
    scale, now = Scale(start), NOW
    for requests, pause in loads:
        now += timedelta(seconds=pause)
        scale = rescaled(RULE, scale, requests, now)
        assert RULE.min_replicas <= scale.replicas <= RULE.max_replicas
        assert scale.replicas >= min(-(-requests // RULE.target_requests), RULE.max_replicas)
