"""Reading samples.jsonl and its older half, samples.1.jsonl: the rollouts that sample_lines.py writes.

Imports no more than the standard library, since the command line reads them too.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SERVED_BYTES = 2 * 2**20
"""Of the newest rollouts that the trainer serves: some tens of the longest."""
FILES = ("samples.1.jsonl", "samples.jsonl")
"""The older half, and the newer."""


@dataclass(frozen=True)
class Rollout:
    """A rollout of samples.jsonl; `kl` in nats, one for each of `tokens`, None for those of an environment."""

    step: int
    picked: str
    source: str
    reward: float | None
    response_tokens: int
    prompt: str
    tokens: list[str]
    kl: list[float | None]

    @property
    def mean_kl(self) -> float:
        """Mean over the student's own tokens, nats."""
        own = [kl for kl in self.kl if kl is not None]
        return sum(own) / max(1, len(own))


def read_rollouts(run_folder: Path) -> list[Rollout]:
    """Return the rollouts of the first step that is still there, and of the last."""
    found: list[Rollout] = []
    for rollout in every_rollout(run_folder):
        found = [r for r in found if r.step in (found[0].step, rollout.step)] + [rollout]
    return found


def every_rollout(run_folder: Path) -> Iterator[Rollout]:
    """Yield all rollouts that samples.jsonl and its older half hold, in their order."""
    for name in FILES:
        path = run_folder / name
        if path.exists():
            with path.open(encoding="utf-8") as lines:
                yield from rollouts_in(lines)


def rollouts_in(lines: Iterable[str]) -> Iterator[Rollout]:
    """Yield the rollouts among lines of samples.jsonl, which holds the examples of evaluations too."""
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if line["kind"] == "rollout":
            yield Rollout(**{name: line[name] for name in Rollout.__dataclass_fields__})


def newest_lines(run_folder: Path, limit_bytes: int = SERVED_BYTES) -> bytes:
    """Return the last whole lines of samples.jsonl, and before them of its older half, that fit; oldest first."""
    found = b""
    for name in reversed(FILES):
        path = run_folder / name
        left = limit_bytes - len(found)
        if left <= 0 or not path.exists():
            continue
        with path.open("rb") as file:
            size = file.seek(0, 2)
            begin = max(0, size - left)
            # One byte more tells whether a line begins here.
            file.seek(max(0, begin - 1))
            tail = file.read(size - max(0, begin - 1))
        if begin:
            tail = tail.partition(b"\n")[2]
        # What has no end is being written, or was cut short by a kill.
        found = tail[: tail.rfind(b"\n") + 1] + found
        if begin:
            break
    return found
