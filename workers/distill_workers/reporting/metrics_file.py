"""Reading metrics.jsonl: the steps, the evaluations and the guards' decisions of a run."""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from distill_workers.evaluation.estimates import Estimate


@dataclass(frozen=True)
class Step:
    """A line of kind step; times in seconds, divergences in nats per token."""

    step: int
    reverse_kl: float | None
    reward: float | None
    response_tokens_mean: float | None
    truncated_ratio: float | None
    stages: dict[str, float]
    seconds: float | None = None
    """Of the whole step."""
    response_tokens: int | None = None
    phase: str | None = None
    """Name of its phase (spec.phases)."""


@dataclass(frozen=True)
class Evaluated:
    """A line of kind evaluation."""

    name: str
    step: int
    score: float | None
    reverse_kl: float | None
    teacher_score: float | None
    score_low: float | None = None
    """Bounds of the 95 % confidence interval of the score."""
    score_high: float | None = None
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    """Pass@k by k."""


@dataclass(frozen=True)
class Guarded:
    """A line of kind guard: decided after `at_step`; the run went on from `step`."""

    guard: str
    action: str
    at_step: int
    step: int
    message: str


@dataclass
class Run:
    """What metrics.jsonl tells."""

    steps: list[Step] = field(default_factory=list)
    evaluations: dict[str, list[Evaluated]] = field(default_factory=dict)
    guarded: list[Guarded] = field(default_factory=list)

    @property
    def phases(self) -> list[tuple[str, int, int]]:
        """Name, first and last step of each phase that has a step; none of a run without phases."""
        found = [(name, list(steps)) for name, steps in groupby(self.steps, key=lambda s: s.phase)]
        return [(name, steps[0].step, steps[-1].step) for name, steps in found if name is not None]

    def until(self, step: int) -> "Run":
        """Return the run as it stood after `step` steps."""
        evaluations = {name: [e for e in found if e.step <= step] for name, found in self.evaluations.items()}
        return Run(
            [s for s in self.steps if s.step <= step],
            {name: found for name, found in evaluations.items() if found},
            [g for g in self.guarded if g.step <= step],
        )


def read_run(path: Path) -> Run:
    """Return what the file tells. A missing one is an empty run; a last line that a kill cut short is left out."""
    run = Run()
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["kind"] == "step":
            run.steps.append(_step(line))
        elif line["kind"] == "evaluation":
            run.evaluations.setdefault(line["name"], []).append(_evaluated(line))
        elif line["kind"] == "guard":
            run.guarded.append(Guarded(**{name: line[name] for name in Guarded.__dataclass_fields__}))
    return run


def _step(line: dict[str, Any]) -> Step:
    tokens, samples = line.get("response_tokens"), line.get("samples")
    return Step(
        step=line["step"],
        reverse_kl=line.get("reverse_kl"),
        reward=line.get("reward"),
        response_tokens_mean=tokens / samples if tokens is not None and samples else None,
        truncated_ratio=line.get("truncated_ratio"),
        stages=line.get("stages", {}),
        seconds=line.get("seconds"),
        response_tokens=tokens,
        phase=line.get("phase"),
    )


def _evaluated(line: dict[str, Any]) -> Evaluated:
    keys = ("name", "step", "score", "reverse_kl", "teacher_score", "score_low", "score_high")
    # The names of JSON's fields are text.
    pass_at = {int(k): Estimate(**estimate) for k, estimate in line.get("pass_at", {}).items()}
    known: dict[str, Any] = {key: line.get(key) for key in keys}
    return Evaluated(**known, pass_at=pass_at)
