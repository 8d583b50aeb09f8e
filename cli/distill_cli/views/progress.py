"""The progress of a job as `run` and `watch` show it: a live panel on a terminal, a line for each change elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill_api.status import Progress
from distill_cli.snapshot import RoleState, Snapshot

CURVE_CELLS = 40
"""Width of a sparkline, in characters."""
BLOCKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """Where the progress of a job is shown."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the snapshot, or what is new in it."""

    def say(self, sentence: str) -> None:
        """Show a sentence that stays."""


@contextmanager
def view(console: Console) -> Iterator[View]:
    """Yield the view that suits the console."""
    if not console.is_terminal:
        yield Plain()
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield Panel(live)


class Plain:
    """A view that prints a line for each new step or phase, each change of a role or of the bottleneck, each event,
    each evaluation and each decision of a guard."""

    def __init__(self) -> None:
        self._shown: set[str] = set()
        self._last: dict[str, str] = {}
        self._begin = time.monotonic()

    def show(self, snapshot: Snapshot) -> None:
        for line in passing_lines(snapshot):
            if line not in self._shown:
                self._shown.add(line)
                self.say(line)
        # A state that comes back is printed again.
        for what, line in (("roles", roles_line(snapshot.roles)), ("progress", progress_line(snapshot))):
            if line and self._last.get(what) != line:
                self._last[what] = line
                self.say(line)
        # The advice names a share of the step, which changes with every step: it is printed for another part alone.
        part, advice = snapshot.progress.bottleneck, snapshot.progress.advice
        if part and advice and self._last.get("advice") != part:
            self._last["advice"] = part
            self.say(f"{'Advice':<10} {advice}")

    def say(self, sentence: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s] {sentence}", flush=True)


class Panel:
    """A view that redraws the present state in place; events, evaluations and guards scroll above it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._shown: set[str] = set()
        self._begin = time.monotonic()

    def show(self, snapshot: Snapshot) -> None:
        for line in passing_lines(snapshot):
            if line not in self._shown:
                self._shown.add(line)
                self.say(line)
        self._live.update(panel(snapshot, time.monotonic() - self._begin))

    def say(self, sentence: str) -> None:
        self._live.console.print(Text(sentence))


def panel(snapshot: Snapshot, elapsed: float) -> RenderableType:
    """Return step, KL and reward with their curves, time to go, advice, seconds by stage, and the roles."""
    p = snapshot.progress
    bar = Table.grid(padding=(0, 1))
    left = p.estimated_remaining_seconds
    to_go = f"{clock(left)} to go" if left is not None and p.step < p.total_steps else ""
    bar.add_row(
        Text(f"{snapshot.state:<10}", style="bold"),
        ProgressBar(total=max(1, p.total_steps), completed=p.step, width=40),
        f"step {p.step}/{p.total_steps}",
        clock(elapsed),
        to_go,
    )
    rows: list[RenderableType] = [bar]
    curves = Table.grid(padding=(0, 1))
    named = (("reverse KL", p.reverse_kl, snapshot.curves.reverse_kl), ("reward", p.reward, snapshot.curves.reward))
    for name, value, curve in named:
        if value is not None:
            curves.add_row(Text(f"{name} {value}"), Text(sparkline(curve), style="cyan"))
    numbers = {
        "phase": p.objective_phase,
        "tokens/s": p.tokens_per_second,
        "policy lag": p.policy_lag,
        "slowest": p.bottleneck.replace("_", " ") if p.bottleneck else None,
        "checkpoint": None if p.checkpoint_step is None else f"step {p.checkpoint_step}",
    }
    rows += [curves] if curves.row_count else []
    rows.append(Text("   ".join(f"{name} {value}" for name, value in numbers.items() if value is not None)))
    if p.advice and p.step < p.total_steps:
        rows.append(Text(p.advice, style="italic"))
    if snapshot.stages:
        rows.append(Text("   ".join(f"{name.replace('_', ' ')} {s:.1f} s" for name, s in snapshot.stages.items())))
    if snapshot.roles:
        rows.append(Text("   ").join(_role(role) for role in snapshot.roles))
    return Group(*rows)


def _role(role: RoleState) -> Text:
    missing = role.ready < role.desired
    why = f" {role.reason}" if missing and role.reason else ""
    return Text(f"{role.name} {role.ready}/{role.desired}{why}", style="yellow" if missing else "green")


def sparkline(values: Sequence[float], cells: int = CURVE_CELLS) -> str:
    """Return a block for each of up to `cells` means of neighbouring values, scaled from the lowest to the highest."""
    means = cell_means(values, cells)
    return blocks(means, min(means), max(means)) if means else ""


def cell_means(values: Sequence[float], cells: int) -> list[float]:
    """Return up to `cells` means of neighbouring values, of as many values each as can be."""
    count = min(cells, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)] if count else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]


def blocks(means: Sequence[float], low: float, high: float) -> str:
    """Return a block for each value, the lowest one for `low` and the highest for `high`."""
    if high == low:
        return BLOCKS[len(BLOCKS) // 2] * len(means)
    return "".join(BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1))] for mean in means)


def clock(seconds: float) -> str:
    """Return a duration as H:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def passing_lines(snapshot: Snapshot) -> list[str]:
    """Return the lines that are shown once: events, evaluations, decisions of guards."""
    events = [f"{'Warning' if e.warning else 'Event':<10} {e.reason}: {e.message}" for e in snapshot.events]
    return [*events, *evaluation_lines(snapshot.progress), *guard_lines(snapshot.progress)]


def evaluation_lines(progress: Progress) -> list[str]:
    """Return a line for the newest values of each evaluation."""
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
        for e in progress.evaluations
    ]


def guard_lines(progress: Progress) -> list[str]:
    """Return a line for each decision of a guard."""
    return [f"{'Guard':<10} step {e.step}: {e.guard}, {e.action}: {e.message}" for e in progress.guard_events]


def roles_line(roles: Sequence[RoleState]) -> str:
    """Return how many pods of each role are ready, or nothing where there are no roles."""
    return f"{'Roles':<10} " + ", ".join(_role(role).plain for role in roles) if roles else ""


def progress_line(snapshot: Snapshot) -> str:
    """Return state, step, phase of the objective, KL, reward and time to go."""
    p = snapshot.progress
    parts = [f"{snapshot.state:<10} step {p.step}/{p.total_steps}"]
    if p.objective_phase is not None:
        parts.append(f"phase {p.objective_phase}")
    if p.reverse_kl is not None:
        parts.append(f"reverse KL {p.reverse_kl}")
    if p.reward is not None:
        parts.append(f"reward {p.reward}")
    if p.estimated_remaining_seconds is not None and p.step < p.total_steps:
        parts.append(f"{p.estimated_remaining_seconds} s to go, {p.bottleneck} is slowest")
    return ", ".join(parts)
