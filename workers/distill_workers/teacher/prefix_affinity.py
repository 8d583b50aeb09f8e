"""Which replica has which prompt in its cache, so that the siblings of a prompt are scored where it is.

The first sibling goes alone, the others once the prompt is cached; what a replica has lost since is learnt from its
answers.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from distill_workers.teacher.replicas import Replica, Replicas

SHARED_PREFIX_TOKENS = 32
"""Shorter prompts are not worth waiting for."""
REMEMBERED_PREFIXES = 4096


@dataclass(eq=False)
class Prefix:
    """Where a prompt is cached, once `cached` is set."""

    replica: Replica
    cached: asyncio.Event = field(default_factory=asyncio.Event)
    """Also set after a failure, or siblings would wait for ever."""
    lost: bool = False
    """It could not be prefetched: the first sibling goes alone after all."""
    used_at: int = 0
    """answered_tokens of the replica when the prompt was last used there."""

    @property
    def age_tokens(self) -> int:
        return self.replica.answered_tokens - self.used_at


@dataclass(frozen=True)
class Placement:
    """Where a request should go, and what of it is expected to be cached there."""

    replica: Replica | None = None
    cached_tokens: int = 0
    age_tokens: int = 0


NO_PREFERENCE = Placement()


class PrefixAffinity:
    """Of the prompts that were scored last."""

    def __init__(self, replicas: Replicas, *, share: bool) -> None:
        """`share`: whether a cached prompt is of use at all."""
        self._replicas, self._share = replicas, share
        self._known: OrderedDict[int, Prefix] = OrderedDict()
        self._kept_tokens = math.inf
        """What may go through a replica's cache before it loses a prompt, as learnt from those that it lost."""

    def worth_sharing(self, prompt_ids: list[int]) -> bool:
        return self._share and len(prompt_ids) >= SHARED_PREFIX_TOKENS

    def observe(self, place: Placement, cached_tokens: float) -> None:
        """Learns from what an answer says it had in its cache."""
        if place.cached_tokens and cached_tokens < place.cached_tokens // 2:
            self._kept_tokens = min(self._kept_tokens, place.age_tokens / 2)

    @asynccontextmanager
    async def placement(self, prompt_ids: list[int]) -> AsyncIterator[Placement]:
        """The replica that has the prompt, once it has it; for the first sibling the replica that shall get it, and
        also for one so late that the prompt may be lost there."""
        if not self.worth_sharing(prompt_ids):
            yield NO_PREFERENCE
            return
        await self._replicas.resolve()
        key = hash(tuple(prompt_ids))
        while (prefix := self._known.get(key)) is not None:
            if self._may_be_lost(prefix):
                break
            self._known.move_to_end(key)
            await prefix.cached.wait()
            if prefix.lost:
                continue
            best = self._replicas.least_loaded()
            # Going elsewhere costs the prompt once more: worth it where more than that is waiting.
            stay = best is None or prefix.replica.outstanding_tokens <= best.outstanding_tokens + len(prompt_ids)
            yield Placement(prefix.replica, len(prompt_ids) - 1, prefix.age_tokens) if stay else NO_PREFERENCE
            if stay:
                prefix.used_at = prefix.replica.answered_tokens
            return
        replica = self._replicas.least_loaded()
        if replica is None:
            yield NO_PREFERENCE
            return
        with self._caching(key, replica):
            yield Placement(replica)

    @asynccontextmanager
    async def prefetching(self, prompt_ids: list[int]) -> AsyncIterator[Replica | None]:
        """The replica that a prompt is sent to before its responses; None where that is of no use. What goes wrong
        inside is forgotten, and the first sibling goes alone after all."""
        await self._replicas.resolve()
        replica = self._replicas.least_loaded()
        key = hash(tuple(prompt_ids))
        # A sibling, or another prefetch, may have been faster.
        known = self._known.get(key)
        if replica is None or (known is not None and not self._may_be_lost(known)):
            yield None
            return
        with self._caching(key, replica) as prefix:
            prefix.lost = True
            yield replica
            prefix.lost = False

    def _may_be_lost(self, prefix: Prefix) -> bool:
        return prefix.cached.is_set() and prefix.age_tokens > self._kept_tokens

    @contextmanager
    def _caching(self, key: int, replica: Replica) -> Iterator[Prefix]:
        """While the first request of a prompt is under way; others wait for its end. A failure is forgotten."""
        prefix = self._known[key] = Prefix(replica)
        while len(self._known) > REMEMBERED_PREFIXES:
            self._known.popitem(last=False)[1].cached.set()
        try:
            yield prefix
            prefix.used_at = replica.answered_tokens
        except BaseException:
            if self._known.get(key) is prefix:
                del self._known[key]
            raise
        finally:
            prefix.cached.set()
