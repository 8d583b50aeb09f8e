"""What `distill run` and `distill watch` show: a live panel on a terminal, one line for each change elsewhere."""

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
from distill_cli.snapshot import Moment, RoleState

CURVE_CELLS = 40
"""Width of a sparkline."""
BLOCKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    def show(self, moment: Moment) -> None: ...

    def say(self, sentence: str) -> None: ...


@contextmanager
def view(console: Console) -> Iterator[View]:
    """The view that suits the console."""
    if not console.is_terminal:
        yield Plain()
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield Panel(live)


class Plain:
    """A line for each new step or phase, each change of a role or of what is slowest, each event, evaluation and
    decision of a guard."""

    def __init__(self) -> None:
        self._shown: set[str] = set()
        self._last: dict[str, str] = {}
        self._begin = time.monotonic()

    def show(self, moment: Moment) -> None:
        for line in passing_lines(moment):
            if line not in self._shown:
                self._shown.add(line)
                self.say(line)
        # A state that comes back is news again.
        for what, line in (("roles", roles_line(moment.roles)), ("progress", progress_line(moment))):
            if line and self._last.get(what) != line:
                self._last[what] = line
                self.say(line)
        # Its share of the step is another after each: only another part is news.
        part, advice = moment.progress.bottleneck, moment.progress.advice
        if part and advice and self._last.get("advice") != part:
            self._last["advice"] = part
            self.say(f"{'Advice':<10} {advice}")

    def say(self, sentence: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s] {sentence}", flush=True)


class Panel:
    """The present state, redrawn in place; what must not be missed scrolls above it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._shown: set[str] = set()
        self._begin = time.monotonic()

    def show(self, moment: Moment) -> None:
        for line in passing_lines(moment):
            if line not in self._shown:
                self._shown.add(line)
                self.say(line)
        self._live.update(panel(moment, time.monotonic() - self._begin))

    def say(self, sentence: str) -> None:
        self._live.console.print(Text(sentence))


def panel(moment: Moment, elapsed: float) -> RenderableType:
    """Step, KL and reward with their curves, time to go, what to change, seconds by stage, and the roles."""
    p = moment.progress
    bar = Table.grid(padding=(0, 1))
    left = p.estimated_remaining_seconds
    to_go = f"{clock(left)} to go" if left is not None and p.step < p.total_steps else ""
    bar.add_row(
        Text(f"{moment.state:<10}", style="bold"),
        ProgressBar(total=max(1, p.total_steps), completed=p.step, width=40),
        f"step {p.step}/{p.total_steps}",
        clock(elapsed),
        to_go,
    )
    rows: list[RenderableType] = [bar]
    curves = Table.grid(padding=(0, 1))
    named = (("reverse KL", p.reverse_kl, moment.curves.reverse_kl), ("reward", p.reward, moment.curves.reward))
    for name, value, curve in named:
        if value is not None:
            curves.add_row(Text(f"{name} {value}"), Text(sparkline(curve), style="cyan"))
    numbers = {
        "tokens/s": p.tokens_per_second,
        "policy lag": p.policy_lag,
        "slowest": p.bottleneck.replace("_", " ") if p.bottleneck else None,
        "checkpoint": None if p.checkpoint_step is None else f"step {p.checkpoint_step}",
    }
    rows += [curves] if curves.row_count else []
    rows.append(Text("   ".join(f"{name} {value}" for name, value in numbers.items() if value is not None)))
    if p.advice and p.step < p.total_steps:
        rows.append(Text(p.advice, style="italic"))
    if moment.stages:
        rows.append(Text("   ".join(f"{name.replace('_', ' ')} {s:.1f} s" for name, s in moment.stages.items())))
    if moment.roles:
        rows.append(Text("   ").join(_role(role) for role in moment.roles))
    return Group(*rows)


def _role(role: RoleState) -> Text:
    missing = role.ready < role.desired
    why = f" {role.reason}" if missing and role.reason else ""
    return Text(f"{role.name} {role.ready}/{role.desired}{why}", style="yellow" if missing else "green")


def sparkline(values: Sequence[float], cells: int = CURVE_CELLS) -> str:
    """One block for each of up to `cells` means of neighbouring values, from the lowest to the highest of them."""
    if not values:
        return ""
    count = min(cells, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    if high == low:
        return BLOCKS[len(BLOCKS) // 2] * count
    return "".join(BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1))] for mean in means)


def clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def passing_lines(moment: Moment) -> list[str]:
    """What is said once and does not stay: events, evaluations, decisions of guards."""
    happened = [f"{'Warning' if h.warning else 'Event':<10} {h.reason}: {h.message}" for h in moment.happenings]
    return [*happened, *evaluation_lines(moment.progress), *guard_lines(moment.progress)]


def evaluation_lines(progress: Progress) -> list[str]:
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
    return [f"{'Guard':<10} step {e.step}: {e.guard}, {e.action}: {e.message}" for e in progress.guard_events]


def roles_line(roles: Sequence[RoleState]) -> str:
    return f"{'Roles':<10} " + ", ".join(_role(role).plain for role in roles) if roles else ""


def progress_line(moment: Moment) -> str:
    p = moment.progress
    parts = [f"{moment.state:<10} step {p.step}/{p.total_steps}"]
    if p.reverse_kl is not None:
        parts.append(f"reverse KL {p.reverse_kl}")
    if p.reward is not None:
        parts.append(f"reward {p.reward}")
    if p.estimated_remaining_seconds is not None and p.step < p.total_steps:
        parts.append(f"{p.estimated_remaining_seconds} s to go, {p.bottleneck} is slowest")
    return ", ".join(parts)
