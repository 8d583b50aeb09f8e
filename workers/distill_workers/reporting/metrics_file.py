"""Reading metrics.jsonl: the steps, the evaluations and the guards' decisions of a run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """A line of kind step; times in seconds, divergences in nats per token."""

    step: int
    reverse_kl: float | None
    reward: float | None
    response_tokens_mean: float | None
    truncated_ratio: float | None
    stages: dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """A line of kind evaluation."""

    name: str
    step: int
    score: float | None
    reverse_kl: float | None
    teacher_score: float | None


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
            keys = ("name", "step", "score", "reverse_kl", "teacher_score")
            run.evaluations.setdefault(line["name"], []).append(Evaluated(**{key: line.get(key) for key in keys}))
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
    )
