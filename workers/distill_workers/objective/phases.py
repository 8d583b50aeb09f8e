"""Phases: which objective a step has, decided from its number and the evaluations so far, without touching anything.

    b_0 = 0,  b_{i+1} = max(b_i, min(untilStep_i, v_i + 1 + maxPolicyLag))
b_i is the first step of phase i, counted in optimiser steps done before it, and v_i the step of the first evaluation
that is `patience` in a row without a gain, of those of weights that phase i began with or made. What a phase lacks is
infinite. A step has the objective of the last phase that has begun by then.

Why 1 + maxPolicyLag: while the weights after v steps are evaluated, the batches of steps v to v + maxPolicyLag have
their prompts already, and perhaps their samples. They keep the objective that they were prepared for, and nothing under
way is thrown away; and since the rule looks at steps alone, not at what happens to be ready, a resumed run decides
alike, inside a phase and between two.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill_api.spec.job_spec import Objective, RewardSource, Spec
from distill_api.status import EvaluationScore
from distill_api.training_phases import Plateau, TrainingPhase, objectives
from distill_workers.objective.coefficients import StepCoefficients, step_coefficients

Curve = Sequence[tuple[int, float]]
"""Step and value of each evaluation of one name, in order of the steps; more is better."""
log = logging.getLogger(__name__)


def begins(phases: Sequence[TrainingPhase], curves: Mapping[str, Curve], max_policy_lag: int) -> list[int]:
    """Return the first step of each phase that is known to begin: b_0 to b_n above. Later evaluations add to it, and
    change nothing that a step taken before them had."""
    found = [0]
    for phase in phases[:-1]:
        end = math.inf if phase.until_step is None else phase.until_step
        if phase.until_flat is not None:
            curve = curves.get(phase.until_flat.evaluation, ())
            end = min(end, flat_at(phase.until_flat, curve, found[-1]) + 1 + max_policy_lag)
        if end == math.inf:
            break
        found.append(max(found[-1], int(end)))
    return found


def flat_at(plateau: Plateau, curve: Curve, since: int) -> float:
    """Return the step of the first evaluation, of those from step `since` on, that is `patience` in a row without a
    gain of more than minimumGain over the best before it; infinity if there is none."""
    best, without_gain = -math.inf, 0
    for step, value in curve:
        if step < since:
            continue
        if value > best + plateau.minimum_gain:
            best, without_gain = value, 0
            continue
        without_gain += 1
        if without_gain == plateau.patience:
            return step
    return math.inf


class Phases:
    """The phases of a spec, with the evaluations that end them. A spec without phases is one phase with no name."""

    def __init__(self, spec: Spec) -> None:
        self._phases, self._lag = spec.phases, spec.rollout.max_policy_lag
        self._objectives = objectives(spec)
        self._scored = {e.name: e.reward.source is not RewardSource.NONE for e in spec.evaluation}
        self._curves: dict[str, list[tuple[int, float]]] = {
            phase.until_flat.evaluation: [] for phase in self._phases if phase.until_flat is not None
        }

    def number(self, step: int) -> int:
        """Return the number of a step's phase, from 0."""
        begun = self._begins()
        return max(i for i, begin in enumerate(begun) if begin <= step)

    def name(self, step: int) -> str | None:
        """Return the name of a step's phase; None without phases."""
        return self._phases[self.number(step)].name if self._phases else None

    def objective(self, step: int) -> Objective:
        """Return the objective of a step."""
        return self._objectives[self.number(step)]

    def coefficients(self, step: int) -> StepCoefficients:
        """Return the coefficients of a step: their schedules count the steps of its phase."""
        number = self.number(step)
        return step_coefficients(self._objectives[number], step - self._begins()[number], number)

    def after_evaluation(self, entry: EvaluationScore) -> None:
        """Add an evaluation, given as its entry in status. Decides of steps after step + maxPolicyLag alone."""
        curve = self._curves.get(entry.name)
        if curve is None or (value := self._value(entry)) is None:
            return
        before = self._begins()
        # A run that goes on from a checkpoint without this step's evaluation makes it again, as one of step 0 does.
        curve[:] = [*(point for point in curve if point[0] < entry.step), (entry.step, value)]
        if (now := self._begins()) != before:
            what = (entry.name, entry.step, self._phases[len(now) - 1].name, now[-1])
            log.info("evaluation %s is flat at step %d: phase %s begins after step %d", *what)

    def state(self) -> dict[str, Any]:
        """Return the evaluations that decide, for a checkpoint: phase and beginning follow from them and the step."""
        return {"curves": {name: [list(point) for point in curve] for name, curve in self._curves.items()}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Move to a `state`; an empty one, of a release without phases, has no evaluation."""
        curves = saved.get("curves", {})
        self._curves = {name: [(step, value) for step, value in curves.get(name, [])] for name in self._curves}

    def _value(self, entry: EvaluationScore) -> float | None:
        """Return what is to grow: the score, or less reverse KL without one; None where nothing was measured."""
        if self._scored[entry.name]:
            return None if entry.score is None else float(entry.score)
        return None if entry.reverse_kl is None else -float(entry.reverse_kl)

    def _begins(self) -> list[int]:
        return begins(self._phases, self._curves, self._lag)
