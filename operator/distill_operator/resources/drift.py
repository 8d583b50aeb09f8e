"""Whether a live object still says what we wrote, although others add to it: defaults, KubeRay, admission webhooks."""

from typing import Any

from distill_api.names import ANNOTATION_FIXED_HASH, ANNOTATION_SPEC_HASH
from distill_operator.model.observed import Child, Raw

REWRITTEN = frozenset({"resources", "sizeLimit"})
"""Quantities come back in another spelling, 1000m as 1: a difference there means nothing."""
CLOSED = frozenset({"ingress"})
"""A rule more of a NetworkPolicy lets somebody in."""
COMPARED = ("spec", "data")


def has_drifted(desired: Raw, child: Child) -> bool:
    """True when applying `desired` again would change something. A changed operator changes the hashes."""
    there = {ANNOTATION_SPEC_HASH: child.spec_hash, ANNOTATION_FIXED_HASH: child.fixed_hash}
    if any(there[key] != value for key, value in desired["metadata"]["annotations"].items()):
        return True
    return any(not contains(child.content.get(part), desired[part]) for part in COMPARED if part in desired)


def is_of(desired: Raw, child: Child) -> bool:
    """Whether it was made of the very same words, but for the numbers that the user may change. What a release before
    0.2.0 made tells nothing of it, and so is not."""
    return bool(child.fixed_hash == desired["metadata"]["annotations"][ANNOTATION_FIXED_HASH])


def contains(live: Any, desired: Any) -> bool:
    """Every value of `desired` is in `live`; what `live` has besides is somebody else's."""
    if live == desired:
        return True
    if isinstance(desired, dict):
        return isinstance(live, dict) and all(
            key in REWRITTEN
            or not _says_something(value)
            or (contains(live.get(key), value) and (key not in CLOSED or len(live[key]) == len(value)))
            for key, value in desired.items()
        )
    if isinstance(desired, list):
        return isinstance(live, list) and all(any(contains(entry, value) for entry in live) for value in desired)
    return False


def _says_something(value: Any) -> bool:
    """Empty maps and lists are left out of what is stored."""
    return value not in (None, {}, [])
