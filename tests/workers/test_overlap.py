"""How well the loop hides its stages behind each other: the real loop over stages that sleep, on a virtual clock.

bench/loop_overlap.py does the same on a real clock.
"""

import sys

import pytest
from runs import REPO

sys.path.insert(0, str(REPO / "bench"))
from conversation_stages import PLACES, conversation_stages, conversation_step_seconds
from stages import SCHEDULES, SHAPES, step_seconds, virtual

MOST = {
    ("generation longest", "maxPolicyLag 0"): 1.20,
    ("generation and training longest", "maxPolicyLag 0"): 1.20,
    ("all equal", "maxPolicyLag 0"): 1.30,
    ("generation longest", "maxPolicyLag 1"): 1.08,
    ("generation and training longest", "maxPolicyLag 1"): 1.08,
    ("all equal", "maxPolicyLag 1"): 1.08,
    ("generation longest", "maxPolicyLag 1, partial"): 0.80,
}
"""Of the longest stage, where generation counts as a batch of its own, from its first token to its last."""


@pytest.mark.parametrize(("shape", "schedule"), MOST)
def test_a_step_takes_little_more_than_its_longest_stage(shape: str, schedule: str) -> None:
    stages = SHAPES[shape]
    seconds = virtual(lambda folder: step_seconds(stages, **SCHEDULES[schedule], steps=4, folder=folder))
    assert seconds / stages.longest <= MOST[shape, schedule]
    assert seconds < 0.7 * stages.one_after_another


@pytest.mark.parametrize(("schedule", "most"), {"maxPolicyLag 0": 0.12, "maxPolicyLag 1": 0.25}.items())
def test_an_evaluation_after_each_step_costs_training_a_fraction_of_its_own_time(schedule: str, most: float) -> None:
    """By itself it takes as long as a batch from its first token to its last: 1."""
    stages, options = SHAPES["all equal"], SCHEDULES[schedule]
    alone = virtual(lambda folder: step_seconds(stages, **options, steps=2, folder=folder))
    beside = virtual(lambda folder: step_seconds(stages, **options, steps=2, folder=folder, evaluate=True))
    assert beside - alone <= most * stages.generate


@pytest.mark.parametrize(("schedule", "most"), {"maxPolicyLag 0": 1.25, "maxPolicyLag 1": 1.10}.items())
@pytest.mark.parametrize("shape", PLACES)
def test_a_step_of_conversations_takes_little_more_than_these_alone(shape: str, schedule: str, most: float) -> None:
    """Their environment takes as long as the student's turns on average, with a log-normal tail."""
    places = PLACES[shape]
    stages, options = conversation_stages(places), SCHEDULES[schedule]
    seconds = virtual(lambda folder: conversation_step_seconds(stages, places, **options, steps=4, folder=folder))
    assert seconds / stages.longest <= most
    assert seconds < 0.8 * stages.one_after_another
