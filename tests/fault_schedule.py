"""What disturbs a run of the soak, and when: drawn from a seed, so that a run that failed can be repeated. Pure.

Each disturbance waits for a step of the run and then some seconds. The first may come while the run still starts, and
one that follows a restart is often drawn so that it comes in the middle of that.
"""

import random
from dataclasses import dataclass
from enum import StrEnum


class Target(StrEnum):
    """What is killed; or the run itself, which is suspended."""

    TRAINER = "trainer"
    ENGINE = "engine"
    TEACHER = "teacher"
    RAY_HEAD = "Ray head"
    OPERATOR = "operator"
    KUBELET = "kubelet"
    API_SERVER = "kube-apiserver"
    RUN = "run"


KILLED = tuple(target for target in Target if target is not Target.RUN)
DAEMONS = (Target.KUBELET, Target.API_SERVER)
"""Nothing starts these again but the test."""
KILLS = 3
MOST_SUSPENSIONS = 2
CHAINED = 0.4
"""Probability that a disturbance follows at once the one before."""
START_SECONDS, RESTART_SECONDS, STEP_SECONDS = 90.0, 60.0, 10.0
"""The most that a disturbance waits: of a run that has just been made, of one that starts again, and of one that
trains, which must not end meanwhile."""
AWAY_SECONDS, SUSPENDED_SECONDS = (0.0, 30.0), (0.0, 20.0)


@dataclass(frozen=True)
class Disturbance:
    """One thing that happens to a run."""

    target: Target
    step: int
    """It is due once the run has ever done so many steps, and the disturbance before is over."""
    delay_seconds: float
    """And then so much later."""
    share: float
    """Which of the target's processes is killed: this share of them, in the order of their numbers, comes before it."""
    away_seconds: float
    """Of a daemon until it is started, of a run until it is resumed; 0 for what starts again by itself."""

    def __str__(self) -> str:
        what = f"suspend the {self.target}" if self.target is Target.RUN else f"kill the {self.target}"
        away = f", for {self.away_seconds:.1f} s" if self.target in (*DAEMONS, Target.RUN) else ""
        return f"{what} {self.delay_seconds:.1f} s after step {self.step}{away}"


@dataclass(frozen=True)
class FaultSchedule:
    """All that happens to one run."""

    seed: int
    checkpoint_every_steps: int
    """Differs between runs: it must not matter to what is exported."""
    disturbances: tuple[Disturbance, ...]


def fault_schedule(seed: int, steps: int) -> FaultSchedule:
    """Return what happens to the run of a seed: three kills, and suspensions among them, all in its first half."""
    rng = random.Random(seed)
    checkpoint_every_steps = rng.choice([1, 3, 7])
    targets = [rng.choice(KILLED) for _ in range(KILLS)] + [Target.RUN] * rng.randint(0, MOST_SUSPENSIONS)
    rng.shuffle(targets)
    disturbances: list[Disturbance] = []
    for target, step in zip(targets, sorted(rng.randint(0, steps // 2) for _ in targets), strict=True):
        before = disturbances[-1] if disturbances else None
        if before is not None and rng.random() < CHAINED:
            step = before.step
        in_a_restart = before is not None and step == before.step and restarts(before.target)
        longest = RESTART_SECONDS if in_a_restart else STEP_SECONDS
        if step == 0:
            longest = max(longest, START_SECONDS / len(targets))
        away = (0.0, 0.0)
        if target in DAEMONS:
            away = AWAY_SECONDS
        elif target is Target.RUN:
            away = SUSPENDED_SECONDS
        disturbances.append(
            Disturbance(target, step, rng.uniform(0, longest), rng.random(), away_seconds=rng.uniform(*away))
        )
    return FaultSchedule(seed, checkpoint_every_steps, tuple(disturbances))


def restarts(target: Target) -> bool:
    """Return whether the trainer starts again after it, which takes longer than any delay here."""
    return target in (Target.TRAINER, Target.RUN)
