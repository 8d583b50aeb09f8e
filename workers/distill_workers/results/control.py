"""A run against its control: whether what it reached with a teacher is outside what it reaches without one.

A control is the same job with objective.control. Both are measured on the same held-out prompts; where the 95 %
intervals of the two scores overlap, the run does not show that its teacher taught it. Intervals of one run each say
nothing of other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_api.job import DistillationJob
from distill_api.teacher.control import Control
from distill_workers.evaluation.estimates import Estimate
from distill_workers.reporting.metrics_file import Evaluated
from distill_workers.run_folder.identity import fingerprint

if TYPE_CHECKING:
    from distill_workers.results.comparison import ComparedRun

NO_VERDICT = (
    "no evaluation with a score was made in both at one step, so that nothing can be said of the teacher; give the job "
    "an evaluation with a reward"
)


@dataclass(frozen=True)
class Verdict:
    """The scores of one evaluation in a run and in its control, at the last step at which both have one."""

    evaluation: str
    step: int
    run: str
    """Name of the run with a teacher."""
    control: str
    taught: Estimate
    untaught: Estimate

    @property
    def difference(self) -> float:
        """Score with the teacher less that of the control."""
        return self.taught.value - self.untaught.value

    @property
    def outside(self) -> bool:
        """Whether the difference is outside both intervals, so that they do not touch."""
        return self.taught.low > self.untaught.high or self.untaught.low > self.taught.high

    @property
    def where(self) -> str:
        """Return the difference, and whether it is outside both intervals or inside."""
        return f"{self.difference:+.4g}, {'outside' if self.outside else 'inside'}"

    @property
    def sentence(self) -> str:
        scores = f"{self.evaluation}, step {self.step}: {_with_interval(self.taught)} with the teacher"
        scores += f", {_with_interval(self.untaught)} with the control"
        if not self.outside:
            return f"{scores}. The difference is inside the intervals: that the teacher teaches is not shown."
        better = "The teacher teaches" if self.difference > 0 else "The control is better than the teacher"
        return f"{scores}. {better}: the difference is outside both intervals."


def verdicts(runs: Sequence[ComparedRun]) -> list[Verdict]:
    """Return a verdict for each run, each control of it, and each evaluation whose score both have at one step."""
    return [verdict for run, control in pairs(runs) for verdict in _verdicts(run, control)]


def pairs(runs: Sequence[ComparedRun]) -> list[tuple[ComparedRun, ComparedRun]]:
    """Return the runs with their controls: those that differ in nothing that shapes a curve but objective.control."""
    controls = [run for run in runs if run.job.spec.objective.control is not Control.NONE]
    taught = [run for run in runs if run.job.spec.objective.control is Control.NONE]
    return [(run, c) for run in taught for c in controls if fingerprint(run.job) == fingerprint(without_control(c.job))]


def without_control(job: DistillationJob) -> DistillationJob:
    """Return the job that a control belongs to."""
    objective = job.spec.objective.model_copy(update={"control": Control.NONE})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"objective": objective})})


def verdict_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """Return the rows of the table of verdicts: evaluation, step, both scores, their difference."""
    return [
        (v.evaluation, str(v.step), v.run, _with_interval(v.taught), v.control, _with_interval(v.untaught), v.where)
        for v in verdicts(runs)
    ]


HEAD = ("evaluation", "step", "run", "score", "control", "score of the control", "difference, of both intervals")


def as_json(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Return the verdicts for programs."""
    return [
        {
            "evaluation": v.evaluation,
            "step": v.step,
            "run": v.run,
            "control": v.control,
            "score": _numbers(v.taught),
            "controlScore": _numbers(v.untaught),
            "difference": v.difference,
            "outsideBothIntervals": v.outside,
        }
        for v in verdicts(runs)
    ]


def _verdicts(run: ComparedRun, control: ComparedRun) -> Iterator[Verdict]:
    for name, measured in run.run.evaluations.items():
        taught = {one.step: score for one in measured if (score := _score(one)) is not None}
        others = control.run.evaluations.get(name, [])
        untaught = {one.step: score for one in others if (score := _score(one)) is not None}
        if steps := taught.keys() & untaught.keys():
            last = max(steps)
            yield Verdict(name, last, run.name, control.name, taught[last], untaught[last])


def _score(one: Evaluated) -> Estimate | None:
    if one.score is None or one.score_low is None or one.score_high is None:
        return None
    return Estimate(one.score, one.score_low, one.score_high)


def _with_interval(score: Estimate) -> str:
    return f"{score.value:.4g} ({score.low:.4g} to {score.high:.4g})"


def _numbers(score: Estimate) -> dict[str, float]:
    return {"value": score.value, "low": score.low, "high": score.high}
