"""The snapshot of a job that `watch` and `run` show, the same whether a cluster or a run folder gives it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from distill_api.status import Progress


@dataclass(frozen=True)
class RoleState:
    """The pods of one role; `reason` says why not all of them are ready."""

    name: str
    ready: int
    desired: int
    reason: str


@dataclass(frozen=True)
class JobEvent:
    """An Event about the job; `time` is RFC 3339."""

    time: str
    warning: bool
    reason: str
    message: str


@dataclass(frozen=True)
class End:
    """How a job ended: the exit code of `watch`, and a sentence."""

    code: int
    sentence: str


@dataclass(frozen=True)
class Curves:
    """The values of the steps so far, oldest first: reverse KL in nats per token, and mean reward."""

    reverse_kl: tuple[float, ...] = ()
    reward: tuple[float, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Everything that is shown of a job at one time; `end` is None while it runs."""

    state: str
    progress: Progress
    curves: Curves = Curves()
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage of a step."""
    roles: tuple[RoleState, ...] = ()
    events: tuple[JobEvent, ...] = ()
    end: End | None = None


def extended(curves: Curves, before: Progress | None, now: Progress) -> Curves:
    """Return the curves with the values of the step of `now` added, if it is a later one than that of `before`."""
    if before is not None and now.step <= before.step:
        return curves
    kl = () if now.reverse_kl is None else (float(now.reverse_kl),)
    reward = () if now.reward is None else (float(now.reward),)
    return Curves(curves.reverse_kl + kl, curves.reward + reward)
