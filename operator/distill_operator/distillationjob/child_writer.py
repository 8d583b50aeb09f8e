"""Applies the children of jobs, each only for as long as that is of use.

A webhook of somebody else may undo a value whenever it is applied. The child then differs for ever from what it should
be, and an apply at each reconcile would only be load.
"""

import logging
from collections.abc import Mapping
from typing import Any

from distill_operator.kinds import Kind, kind_of
from distill_operator.model.reading import version_of
from distill_operator.resources.rendering import digest
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.ownership import Key

logger = logging.getLogger(__name__)


class ChildWriter:
    """Applies children, and remembers what each was when it had been applied."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._applied: dict[Key, dict[tuple[Kind, str], tuple[str, str]]] = {}
        """By owner and child: a hash of what was applied, and the version of the child right after it."""

    async def apply(self, owner: Key, body: Mapping[str, Any]) -> None:
        """Apply a child, unless that was done and nobody has written the child since. Raises as Cache.apply() does."""
        place = kind_of(body), body["metadata"]["name"]
        applied, wanted = self._applied.setdefault(owner, {}), digest(dict(body))
        if place in applied and applied[place] == (wanted, self._version(owner, *place)):
            return
        logger.info("%s: apply %s %s", owner, body["kind"], place[1])
        await self._cache.apply(body)
        applied[place] = (wanted, self._version(owner, *place))

    def forget(self, owner: Key) -> None:
        """Forget an owner that is gone."""
        self._applied.pop(owner, None)

    def _version(self, owner: Key, kind: Kind, name: str) -> str:
        """Return the version of a child; empty where there is none."""
        stored = self._cache.store.get(kind, owner.namespace, name)
        return version_of(stored["metadata"]) if stored else ""
