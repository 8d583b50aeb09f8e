"""The autoscaler: how many servers a Teacher needs, up at once, down slowly. Pure.

A server that comes costs minutes of loading, and one that goes takes its prefix cache along, so servers go only when
fewer would have been enough for a whole while: the rule of Kubernetes' HorizontalPodAutoscaler (stabilisation of
scale-down by the highest recommendation of the window), on requests instead of CPU time.
"""

from dataclasses import dataclass
from datetime import datetime

from distill_api.teacher.kind import Autoscaling


@dataclass(frozen=True)
class Scale:
    """A decision, and what has to be remembered for the next one."""

    replicas: int
    low_since: datetime | None = None
    """Since when fewer servers would have been enough."""
    low_peak: int = 0
    """The most servers that were needed since then."""


def rescaled(rule: Autoscaling, before: Scale, requests: int, now: datetime) -> Scale:
    """Return the next decision; `requests` wait or are under way at all trainers."""
    needed = min(max(-(-requests // rule.target_requests), rule.min_replicas), rule.max_replicas)
    replicas = min(max(before.replicas, rule.min_replicas), rule.max_replicas)
    if needed >= replicas:
        return Scale(needed)
    since = before.low_since or now
    peak = max(needed, before.low_peak if before.low_since else 0)
    if (now - since).total_seconds() < rule.scale_down_seconds:
        return Scale(replicas, since, peak)
    # What is enough now may be less still: the window begins anew.
    return Scale(peak, now if needed < peak else None, needed if needed < peak else 0)


def seconds_to_scale_down(rule: Autoscaling, scale: Scale, now: datetime) -> float | None:
    """Return the seconds until servers may go; None where none is to go."""
    if scale.low_since is None:
        return None
    return max(0.0, rule.scale_down_seconds - (now - scale.low_since).total_seconds())
