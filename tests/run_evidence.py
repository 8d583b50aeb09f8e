"""What tells whether a run was disturbed: its steps, its checkpoints, and when its trainers lived."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]


def steps_of(run_folder: Path) -> list[int]:
    """Return the steps in metrics.jsonl, also while it is being written or replaced."""
    try:
        lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # half of the last one
        if entry["kind"] == "step":
            found.append(int(entry["step"]))
    return found


def step_problems(done: Sequence[int], last: int) -> list[str]:
    """Return what is wrong with the steps of a metrics.jsonl that should be 1 to `last`, each once and in order."""
    counted = Counter(done)
    found = []
    if missing := [step for step in range(1, last + 1) if step not in counted]:
        found.append(f"steps {missing} are missing")
    if double := [step for step, count in counted.items() if count > 1]:
        found.append(f"steps {double} are there more than once")
    if beyond := sorted(step for step in counted if not 1 <= step <= last):
        found.append(f"steps {beyond} are none of 1 to {last}")
    if not found and list(done) != sorted(done):
        found.append(f"the steps are not in their order: {list(done)}")
    return found


def steps_back(named: Iterable[str]) -> list[tuple[str, str]]:
    """Return where `latest` went back, from the names that it had one after the other."""
    return [(before, after) for before, after in itertools.pairwise(named) if _step(after) < _step(before)]


def _step(checkpoint: str) -> int:
    return int(checkpoint.strip().removeprefix("step-"))


@dataclass(frozen=True)
class Life:
    """When a container ran, by its pod's status: whole seconds, as Kubernetes has them."""

    pod: str
    uid: str
    started: datetime | None = None
    finished: datetime | None = None
    """None while it runs, or where nobody has heard of its end."""

    def __str__(self) -> str:
        end = f"{self.finished:%H:%M:%S}" if self.finished else "no known end"
        return f"{self.pod} ({f'{self.started:%H:%M:%S}' if self.started else 'never started'} to {end})"


def lives(pods: Iterable[Json], container: str) -> list[Life]:
    """Return the life of a container in each pod that it started in, from all that was seen of the pods."""
    found: dict[str, Life] = {}
    for pod in pods:
        uid = str(pod["metadata"]["uid"])
        life = found.setdefault(uid, Life(str(pod["metadata"]["name"]), uid))
        for status in pod.get("status", {}).get("containerStatuses", []):
            if status["name"] != container:
                continue
            # A container of a pod that is never started again has one state; the last one tells most.
            state = status.get("state", {})
            times = state.get("terminated") or state.get("running") or {}
            life = replace(
                life,
                started=_time(times.get("startedAt")) or life.started,
                finished=_time(times.get("finishedAt")) or life.finished,
            )
        found[uid] = life
    return sorted((life for life in found.values() if life.started), key=lambda life: (life.started, life.uid))


def overlapping(found: Sequence[Life]) -> list[tuple[Life, Life]]:
    """Return the lives of which one began before an earlier one had ended."""
    return [
        (a, b)
        for number, a in enumerate(found)
        for b in found[number + 1 :]
        if a.finished is None or (b.started is not None and b.started < a.finished)
    ]


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
