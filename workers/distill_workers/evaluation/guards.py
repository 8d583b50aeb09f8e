"""When a training goes wrong, and what is done about it: decided from numbers, without touching anything.

A guard is out of bounds at a step (or an evaluation) by its limits, or by its ratios to what the training has reached:
the lowest, or highest, median of `window` steps so far. Medians, since a single step is noisy; the best of them, since
a median of the last steps alone would follow a slow drift. After `patience` in a row it acts, and counts anew.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from distill_api.spec.guards import Guard, GuardAction, Watch
from distill_api.spec.job_spec import Spec
from distill_api.status import EvaluationScore

SMALLEST = {Watch.REVERSE_KL: 0.01, Watch.ENTROPY: 0.01, Watch.RESPONSE_LENGTH: 1.0}
"""Nats, nats, tokens: a lowest median below this counts as this, since a multiple of nearly nothing is noise (and the
k1 estimate of a reverse KL near 0 can be negative)."""
SEVERITY = (GuardAction.LOWER_COEFFICIENT, GuardAction.ROLL_BACK, GuardAction.STOP)
UNITS = {Watch.REVERSE_KL: " nats", Watch.ENTROPY: " nats", Watch.RESPONSE_LENGTH: " tokens"}


@dataclass(frozen=True)
class Decision:
    """What a guard wants done after `step` optimiser steps, and why, in one sentence."""

    guard: str
    action: GuardAction
    step: int
    message: str


@dataclass
class Seen:
    """What one guard has seen of the curve. Plain numbers: it is kept in checkpoints as JSON."""

    breaches: int = 0
    """In a row, up to now."""
    recent: list[float] = field(default_factory=list)
    """The last `window` values."""
    lowest: float | None = None
    """Of the medians of whole windows; None before the first."""
    highest: float | None = None


class Guards:
    """The guards of a spec, and what they have seen and done so far."""

    def __init__(self, spec: Spec) -> None:
        self._guards = {guard.name: guard for guard in spec.guards}
        self._seen = {name: Seen() for name in self._guards}
        self._times = dict.fromkeys(self._guards, 0)
        self.coefficient_factor = 1.0
        """What objective.coefficient of every later step is multiplied by."""
        self._phase = spec.phases[0].name if spec.phases else None
        """That of the curve that was seen: a guard compares no phase with another, whose objective differs."""

    def after_step(self, line: dict[str, Any]) -> Decision | None:
        """By a step's line of metrics.jsonl. Of several that would act the most severe does."""
        if line.get("phase") != self._phase:
            self._phase, self._seen = line["phase"], {name: Seen() for name in self._guards}
        due = []
        for guard in self._guards.values():
            value = watched(guard.watch, line)
            if value is None:
                continue
            seen = self._seen[guard.name]
            why = out_of_bounds(guard, value, seen)
            remember(seen, value, guard.window)
            if self._due(guard, why):
                due.append((guard, str(why)))
        return self._decide(due, line["step"])

    def after_evaluation(self, entry: EvaluationScore) -> Decision | None:
        """By an evaluation's entry in status, its newest values included."""
        watching = [guard for guard in self._guards.values() if guard.evaluation == entry.name]
        judged = [(guard, fallen(guard, entry)) for guard in watching]
        return self._decide([(guard, str(why)) for guard, why in judged if self._due(guard, why)], entry.step)

    def rolled_back(self, saved: dict[str, Any]) -> None:
        """The curve is that of a checkpoint again, whose `state()` is given; what was done stays done."""
        self._restore_seen(saved)
        for seen in self._seen.values():
            seen.breaches = 0

    def state(self) -> dict[str, Any]:
        return {
            "coefficientFactor": self.coefficient_factor,
            "times": dict(self._times),
            "phase": self._phase,
            "seen": {name: asdict(seen) for name, seen in self._seen.items()},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """From `state()`, perhaps of a spec with other guards: those that are new begin anew."""
        self.coefficient_factor = saved["coefficientFactor"]
        self._times |= {name: times for name, times in saved["times"].items() if name in self._guards}
        self._restore_seen(saved)

    def _restore_seen(self, saved: dict[str, Any]) -> None:
        self._seen = {name: Seen(**saved["seen"].get(name, {})) for name in self._guards}
        self._phase = saved.get("phase")

    def _due(self, guard: Guard, why: str | None) -> bool:
        """Counts what `why` says is out of bounds, or that nothing is: whether patience is at its end."""
        seen = self._seen[guard.name]
        seen.breaches = seen.breaches + 1 if why else 0
        return seen.breaches >= guard.patience

    def _decide(self, due: list[tuple[Guard, str]], step: int) -> Decision | None:
        """Those that do not get their turn are due again the next time."""
        decisions = [(self._action(guard), guard, why) for guard, why in due]
        if not decisions:
            return None
        action, guard, why = max(decisions, key=lambda decision: SEVERITY.index(decision[0]))
        self._seen[guard.name].breaches = 0
        self._times[guard.name] += 1
        done = ""
        if action is GuardAction.LOWER_COEFFICIENT:
            self.coefficient_factor *= guard.factor
            done = f"; objective.coefficient is multiplied by {self.coefficient_factor:g} from here on"
        elif action is not guard.action:
            done = f"; it has acted {guard.max_times} times already (maxTimes)"
        often = f"{guard.patience} times in a row, " if guard.patience > 1 else ""
        return Decision(guard.name, action, step, f"{often}{why}{done}")

    def _action(self, guard: Guard) -> GuardAction:
        """What the guard does now; one that has acted maxTimes has not helped."""
        return guard.action if self._times[guard.name] < guard.max_times else GuardAction.STOP


def watched(watch: Watch, line: dict[str, Any]) -> float | None:
    """The value of a step that a guard judges; None for what no step has, or this one had no token to measure at."""
    values: dict[Watch, float | None] = {
        Watch.REVERSE_KL: line["reverse_kl"],
        Watch.ENTROPY: line["entropy"],
        Watch.RESPONSE_LENGTH: line["response_tokens"] / line["samples"],
        Watch.EVALUATION: None,
    }
    return values[watch]


def out_of_bounds(guard: Guard, value: float, seen: Seen) -> str | None:
    """What is out of bounds, as the middle of a sentence; None if nothing is."""
    what, unit = f"{guard.watch.value} {value:.4g}", UNITS[guard.watch]
    if not math.isfinite(value):
        return f"{what} is no number"
    if guard.above is not None and value > guard.above:
        return f"{what} is above {guard.above:g}{unit}"
    if guard.below is not None and value < guard.below:
        return f"{what} is below {guard.below:g}{unit}"
    if guard.above_ratio is not None and seen.lowest is not None:
        lowest = max(seen.lowest, SMALLEST[guard.watch])
        if value > guard.above_ratio * lowest:
            return f"{what} is above {guard.above_ratio:g} times its lowest median, {lowest:.4g}{unit}"
    if guard.below_ratio is not None and seen.highest is not None and value < guard.below_ratio * seen.highest:
        return f"{what} is below {guard.below_ratio:g} of its highest median, {seen.highest:.4g}{unit}"
    return None


def remember(seen: Seen, value: float, window: int) -> None:
    if not math.isfinite(value):
        return
    seen.recent = [*seen.recent, value][-window:]
    if len(seen.recent) == window:
        median = statistics.median(seen.recent)
        seen.lowest = median if seen.lowest is None else min(seen.lowest, median)
        seen.highest = median if seen.highest is None else max(seen.highest, median)


def fallen(guard: Guard, entry: EvaluationScore) -> str | None:
    """How far the evaluation is from its best, if that is more than the guard allows."""
    assert guard.drop is not None  # a rule of the API
    if entry.score is None and entry.best_score is not None:
        return None  # all of its responses failed, which says nothing about the student
    if entry.score is not None and entry.best_score is not None:
        what, now, best = "score", float(entry.score), float(entry.best_score)
        worse_by = best - now
    elif entry.reverse_kl is not None and entry.best_reverse_kl is not None:
        what, now, best = "reverse KL", float(entry.reverse_kl), float(entry.best_reverse_kl)
        worse_by = now - best
    else:
        return None
    if worse_by <= guard.drop:
        return None
    return f"{what} {now:g} of {entry.name} is {worse_by:.4g} worse than its best, {best:g} at step {entry.best_step}"
