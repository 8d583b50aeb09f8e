"""What `distill run` shows while it runs: a live panel on a terminal, one line for each change elsewhere."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill_api.wire import ProgressReport

TAIL_BYTES = 65536
"""Of metrics.jsonl that are searched for the last step."""


class View(Protocol):
    def show(self, report: ProgressReport) -> None: ...

    def say(self, sentence: str) -> None: ...


@contextmanager
def view(console: Console, metrics: Path) -> Iterator[View]:
    """The view that suits the console; `metrics` is the run's metrics.jsonl."""
    if not console.is_terminal:
        yield Plain()
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield Panel(live, metrics)


class Plain:
    """A line for each new step or phase, each new evaluation and each decision of a guard."""

    def __init__(self) -> None:
        self._shown: set[str] = set()
        self._begin = time.monotonic()

    def show(self, report: ProgressReport) -> None:
        for line in (*evaluation_lines(report), *guard_lines(report), progress_line(report)):
            if line not in self._shown:
                self._shown.add(line)
                self.say(line)

    def say(self, sentence: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s] {sentence}", flush=True)


class Panel:
    """The present state, redrawn in place; what must not be missed scrolls above it."""

    def __init__(self, live: Live, metrics: Path) -> None:
        self._live, self._metrics = live, metrics
        self._shown: set[str] = set()
        self._begin = time.monotonic()

    def show(self, report: ProgressReport) -> None:
        for line in (*evaluation_lines(report), *guard_lines(report)):
            if line not in self._shown:
                self._shown.add(line)
                self.say(line)
        self._live.update(panel(report, stages_of_last_step(self._metrics), time.monotonic() - self._begin))

    def say(self, sentence: str) -> None:
        self._live.console.print(Text(sentence))


def panel(report: ProgressReport, stages: dict[str, float], elapsed: float) -> RenderableType:
    """Step, KL, reward, time to go and the seconds of the last step by stage."""
    p = report.progress
    bar = Table.grid(padding=(0, 1))
    left = p.estimated_remaining_seconds
    to_go = f"{clock(left)} to go" if left is not None and p.step < p.total_steps else ""
    counted = f"step {p.step}/{p.total_steps}"
    bar.add_row(
        Text(f"{report.phase.value:<10}", style="bold"),
        ProgressBar(total=max(1, p.total_steps), completed=p.step, width=40),
        counted,
        clock(elapsed),
        to_go,
    )
    numbers = {
        "reverse KL": p.reverse_kl,
        "reward": p.reward,
        "tokens/s": p.tokens_per_second,
        "policy lag": p.policy_lag,
        "checkpoint": None if p.checkpoint_step is None else f"step {p.checkpoint_step}",
    }
    known = Text("   ".join(f"{name} {value}" for name, value in numbers.items() if value is not None))
    spent = Text("   ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in stages.items()))
    return Group(bar, known, spent)


def stages_of_last_step(metrics: Path) -> dict[str, float]:
    """Seconds by stage, from the end of metrics.jsonl; nothing before the first step."""
    if not metrics.exists():
        return {}
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for text in reversed(lines):
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError:
            continue  # being written, or cut off at the beginning
        if line["kind"] == "step":
            return dict(line["stages"])
    return {}


def clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def evaluation_lines(report: ProgressReport) -> list[str]:
    return [
        f"{'Evaluation':<10} step {e.step}: {e.name}, "
        + ", ".join(
            f"{what} {value}"
            for what, value in (
                ("score", f"{e.score} ({e.score_low} to {e.score_high})" if e.score_low else e.score),
                ("pass@k", e.pass_at_k if e.pass_at_k != e.score else None),
                ("reverse KL", e.reverse_kl),
                ("teacher's score", e.teacher_score),
            )
            if value is not None
        )
        for e in report.progress.evaluations
    ]


def guard_lines(report: ProgressReport) -> list[str]:
    return [f"{'Guard':<10} step {e.step}: {e.guard}, {e.action}: {e.message}" for e in report.progress.guard_events]


def progress_line(report: ProgressReport) -> str:
    p = report.progress
    parts = [f"{report.phase.value:<10} step {p.step}/{p.total_steps}"]
    if p.reverse_kl is not None:
        parts.append(f"reverse KL {p.reverse_kl}")
    if p.reward is not None:
        parts.append(f"reward {p.reward}")
    if p.estimated_remaining_seconds is not None and p.step < p.total_steps:
        parts.append(f"{p.estimated_remaining_seconds} s to go, {p.bottleneck} is slowest")
    return ", ".join(parts)
