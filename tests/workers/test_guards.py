"""Guards act when, and only when, they were told to; and never for ever."""

import json
from typing import Any

import pytest
from conftest import spec_of
from hypothesis import given
from hypothesis import strategies as st

from distill_api.spec.guards import GuardAction
from distill_api.status import EvaluationScore
from distill_workers.evaluation.guards import Decision, Guards

EVALUATION = {"name": "heldout", "prompts": {"path": "/data/test.jsonl"}}


def guards(*entries: dict[str, Any]) -> Guards:
    return Guards(spec_of("student", "teacher", guards=list(entries), evaluation=[EVALUATION]))


def line(step: int, reverse_kl: float = 0.5, entropy: float = 1.0, length: float = 100.0) -> dict[str, Any]:
    tokens = {"response_tokens": 4 * length, "samples": 4}
    return {"step": step, "reverse_kl": reverse_kl, "entropy": entropy, **tokens}


def entry(step: int, score: float | None, best: float | None, kl: float = 1.0, best_kl: float = 1.0) -> EvaluationScore:
    decimals = {"score": score, "best_score": best, "reverse_kl": kl, "best_reverse_kl": best_kl}
    texts = {name: None if value is None else f"{value:.5f}" for name, value in decimals.items()}
    return EvaluationScore(name="heldout", step=step, best_step=1, **texts)


def fed(watching: Guards, what: str, values: list[float]) -> list[Decision]:
    """What was decided over the steps 1, 2, … with these values."""
    made = [watching.after_step(line(step, **{what: value})) for step, value in enumerate(values, 1)]
    return [decision for decision in made if decision is not None]


CASES: dict[str, tuple[dict[str, Any], str, list[float], list[int]]] = {
    "a limit, at once": ({"watch": "reverse-kl", "above": 2, "patience": 1}, "reverse_kl", [1, 2, 2.1, 1], [3]),
    "a limit, three in a row": (
        {"watch": "reverse-kl", "above": 2},
        "reverse_kl",
        [3, 3, 1, 3, 3, 3, 3],
        [6],
    ),
    "a rise above the best median": (
        {"watch": "reverse-kl", "aboveRatio": 3, "window": 3, "patience": 2},
        "reverse_kl",
        [1.0, 1.0, 1.0, 0.2, 0.2, 0.2, 0.5, 0.7, 0.7],
        [9],
    ),
    "a slow rise, which a median of the last steps would follow": (
        {"watch": "reverse-kl", "aboveRatio": 2, "window": 3, "patience": 1, "action": "stop"},
        "reverse_kl",
        [0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1],
        [9],
    ),
    "a rise before the first whole window": (
        {"watch": "reverse-kl", "aboveRatio": 2, "window": 5, "patience": 1},
        "reverse_kl",
        [0.1, 0.1, 5.0, 5.0],
        [],
    ),
    "noise around a reverse KL of nothing": (
        {"watch": "reverse-kl", "aboveRatio": 2, "window": 3, "patience": 1},
        "reverse_kl",
        [-0.002, 0.001, -0.001, 0.015, 0.019],
        [],
    ),
    "entropy that collapses": (
        {"watch": "entropy", "belowRatio": 0.1, "window": 2, "patience": 2},
        "entropy",
        [1.0, 1.2, 0.9, 0.1, 0.1],
        [5],
    ),
    "length that collapses": ({"watch": "response-length", "below": 10}, "length", [50, 9, 8, 7], [4]),
    "length that explodes": ({"watch": "response-length", "above": 60, "patience": 2}, "length", [50, 90, 90], [3]),
    "a value that is no number": (
        {"watch": "reverse-kl", "above": 2, "patience": 1},
        "reverse_kl",
        [1, float("nan")],
        [2],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_guard_acts_at_the_step_that_its_bounds_say(name: str) -> None:
    guard, what, values, steps = CASES[name]
    found = fed(guards({"name": "g", **guard}), what, values)
    assert [decision.step for decision in found][:1] == steps
    assert all(decision.guard == "g" and decision.action is GuardAction.STOP for decision in found)


@pytest.mark.parametrize(
    ("entries", "steps"),
    [
        ([entry(1, 0.5, 0.5), entry(2, 0.4, 0.5), entry(3, 0.39, 0.5)], [3]),
        ([entry(1, 0.5, 0.5), entry(2, 0.3, 0.5), entry(3, 0.5, 0.5), entry(4, 0.3, 0.5)], []),
        ([entry(1, 0.5, 0.5), entry(2, None, 0.5, 3.0), entry(3, None, 0.5, 3.0)], []),
        ([entry(1, None, None, 1.0, 1.0), entry(2, None, None, 1.2, 1.0), entry(3, None, None, 1.3, 1.0)], [3]),
    ],
    ids=["twice in a row", "with a good one between", "without a score all at once", "by reverse KL without a score"],
)
def test_an_evaluation_that_falls_too_far_below_its_best_is_acted_on(
    entries: list[EvaluationScore], steps: list[int]
) -> None:
    falls = {"name": "falls", "watch": "evaluation", "evaluation": "heldout", "drop": 0.095, "patience": 2}
    watching = guards(falls)
    assert [d.step for e in entries if (d := watching.after_evaluation(e))] == steps


def test_a_sentence_says_what_was_out_of_bounds_and_what_was_done() -> None:
    watching = guards({"name": "g", "watch": "entropy", "below": 0.1, "patience": 2, "action": "lower-coefficient"})
    [decision] = fed(watching, "entropy", [0.05, 0.04])
    assert decision.message == (
        "2 times in a row, entropy 0.04 is below 0.1 nats; objective.coefficient is multiplied by 0.5 from here on"
    )


def test_lowering_multiplies_each_time_and_then_stops() -> None:
    lower = {"action": "lower-coefficient", "factor": 0.25, "maxTimes": 2}
    watching = guards({"name": "g", "watch": "reverse-kl", "above": 1, "patience": 1, **lower})
    found = fed(watching, "reverse_kl", [2, 2, 2])
    assert [d.action.value for d in found] == ["lower-coefficient", "lower-coefficient", "stop"]
    assert watching.coefficient_factor == 0.0625
    assert "acted 2 times already (maxTimes)" in found[-1].message


def test_of_two_that_would_act_the_more_severe_does_and_the_other_has_its_turn_next() -> None:
    bounds = {"watch": "reverse-kl", "above": 1, "patience": 1}
    back = {"name": "back", **bounds, "action": "roll-back"}
    watching = guards({"name": "lower", **bounds, "action": "lower-coefficient"}, {**back, "patience": 2})
    assert [d.guard for d in fed(watching, "reverse_kl", [2, 2, 2])] == ["lower", "back", "lower"]
    assert watching.coefficient_factor == 0.25


@given(
    value=st.floats(0.02, 1000),
    steps=st.integers(1, 60),
    window=st.integers(1, 20),
    above=st.floats(1.01, 10),
    below=st.floats(0.1, 0.99),
)
def test_a_flat_curve_sets_off_no_guard(value: float, steps: int, window: int, above: float, below: float) -> None:
    ratios = {"aboveRatio": above, "belowRatio": below, "window": window, "patience": 1}
    limits = {"above": value * above, "below": value * below, "patience": 1}
    watching = guards(
        {"name": "kl", "watch": "reverse-kl", **ratios},
        {"name": "entropy", "watch": "entropy", **ratios},
        {"name": "limits", "watch": "reverse-kl", **limits},
    )
    lines = [line(step, reverse_kl=value, entropy=value) for step in range(1, steps + 1)]
    assert [watching.after_step(one) for one in lines] == [None] * steps
    assert watching.after_evaluation(entry(steps, 0.5, 0.5)) is None


@given(values=st.lists(st.floats(0, 10), max_size=80), patience=st.integers(1, 4), most=st.integers(1, 3))
def test_a_guard_rolls_back_so_often_and_no_more_then_stops(values: list[float], patience: int, most: int) -> None:
    """Whatever comes, and from whatever checkpoint the run goes on."""
    once = guards({"name": "g", "watch": "reverse-kl", "above": 5})
    rules = {"above": 5, "aboveRatio": 2, "window": 3, "patience": patience, "maxTimes": most, "action": "roll-back"}
    watching = guards({"name": "g", "watch": "reverse-kl", **rules})
    saved = once.state()
    actions = []
    for step, value in enumerate(values, 1):
        decision = watching.after_step(line(step, reverse_kl=value))
        if decision is not None:
            actions.append(decision.action)
        if decision is not None and decision.action is GuardAction.ROLL_BACK:
            watching.rolled_back(saved)
        if decision is not None and decision.action is GuardAction.STOP:
            break
    assert actions in ([GuardAction.ROLL_BACK] * len(actions), [*[GuardAction.ROLL_BACK] * most, GuardAction.STOP])
    assert actions.count(GuardAction.ROLL_BACK) <= most


@given(values=st.lists(st.floats(0, 10), max_size=40), cut=st.integers(0, 40))
def test_a_resumed_run_decides_as_an_uninterrupted_one(values: list[float], cut: int) -> None:
    guard = {"name": "g", "watch": "reverse-kl", "aboveRatio": 1.5, "window": 4, "patience": 2}
    guard |= {"action": "lower-coefficient", "maxTimes": 2}
    whole, first, second = guards(guard), guards(guard), guards(guard)
    lines = [line(step, reverse_kl=value) for step, value in enumerate(values, 1)]
    expected = [whole.after_step(one) for one in lines]
    found = [first.after_step(one) for one in lines[:cut]]
    second.restore(json.loads(json.dumps(first.state())))
    assert [*found, *(second.after_step(one) for one in lines[cut:])] == expected
    assert second.coefficient_factor == whole.coefficient_factor


def test_a_resumed_run_does_not_forget_how_often_a_guard_has_acted() -> None:
    guard = {"name": "g", "watch": "reverse-kl", "above": 1, "patience": 1, "action": "roll-back", "maxTimes": 1}
    before, after = guards(guard), guards(guard)
    assert [d.action.value for d in fed(before, "reverse_kl", [2])] == ["roll-back"]
    after.restore(before.state())
    assert [d.action.value for d in fed(after, "reverse_kl", [2])] == ["stop"]


def test_a_step_without_a_token_to_measure_at_is_not_judged() -> None:
    watching = guards({"name": "g", "watch": "reverse-kl", "above": 1, "patience": 1})
    assert watching.after_step({**line(1), "reverse_kl": None}) is None


def test_a_guard_that_is_new_in_the_spec_begins_anew() -> None:
    old = guards({"name": "old", "watch": "reverse-kl", "above": 1, "patience": 1, "action": "lower-coefficient"})
    fed(old, "reverse_kl", [2])
    changed = guards({"name": "new", "watch": "reverse-kl", "above": 1, "patience": 1})
    changed.restore(old.state())
    assert changed.coefficient_factor == 0.5
    assert [d.guard for d in fed(changed, "reverse_kl", [2])] == ["new"]
