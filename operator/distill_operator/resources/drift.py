"""Drift: a live object no longer is as it was rendered, beyond what defaults, KubeRay and webhooks add to it. Pure."""

from typing import Any

from distill_api.names import ANNOTATION_FIXED_HASH, ANNOTATION_SPEC_HASH
from distill_operator.model.observed import Child, Raw

REWRITTEN = frozenset({"resources", "sizeLimit"})
"""Fields whose quantities come back in another spelling, 1000m as 1: a difference there means nothing."""
CLOSED = frozenset({"ingress", "egress", "from", "to"})
"""Lists to which nobody may add: one more rule or peer of a NetworkPolicy lets somebody in or out."""
COMPARED = ("spec", "data")
"""Parts of an object that are compared."""


def has_drifted(desired: Raw, child: Child) -> bool:
    """Return whether applying `desired` again would change something. A changed operator changes the hashes."""
    live = {ANNOTATION_SPEC_HASH: child.spec_hash, ANNOTATION_FIXED_HASH: child.fixed_hash}
    if any(live[key] != value for key, value in desired["metadata"]["annotations"].items()):
        return True
    return any(not contains(child.content.get(part), desired[part]) for part in COMPARED if part in desired)


def same_but_for_scalable_fields(desired: Raw, child: Child) -> bool:
    """Return whether a child was rendered as `desired` is, but for its scalable fields.

    What a release before 0.2.0 made does not tell, and so is taken for different.
    """
    return bool(child.fixed_hash == desired["metadata"]["annotations"][ANNOTATION_FIXED_HASH])


def contains(live: Any, desired: Any) -> bool:
    """Return whether every value of `desired` is in `live`; what `live` has besides is somebody else's."""
    if live == desired:
        return True
    if isinstance(desired, dict):
        return isinstance(live, dict) and all(
            key in REWRITTEN
            or not _is_stored(value)
            or (contains(live.get(key), value) and (key not in CLOSED or len(live[key]) == len(value)))
            for key, value in desired.items()
        )
    if isinstance(desired, list):
        return isinstance(live, list) and all(any(contains(entry, value) for entry in live) for value in desired)
    return False


def _is_stored(value: Any) -> bool:
    """Return whether the API server stores a value; it leaves out empty maps and lists."""
    return value not in (None, {}, [])
