"""Prefix affinity: the samples of a group are scored by the replica that has their prompt in its cache.

The first sample of a group is scored alone, and the others once it has brought the prompt into the cache. How long a
replica keeps a prompt is estimated from the cached tokens that its answers name.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from distill_workers.teacher.replicas import Replica, Replicas

SHARED_PREFIX_TOKENS = 32
"""Shorter prompts are not worth waiting for: they go to any replica."""
REMEMBERED_PREFIXES = 4096


@dataclass(eq=False)
class CachedPrefix:
    """A prompt and the replica that has it in its cache once `cached` is set."""

    replica: Replica
    cached: asyncio.Event = field(default_factory=asyncio.Event)
    """Also set after a failure, or the other samples of the group would wait for ever."""
    lost: bool = False
    """The prefetch failed: the first sample of the group brings the prompt into the cache after all."""
    used_at: int = 0
    """answered_tokens of the replica when the prompt was last used there."""

    @property
    def age_tokens(self) -> int:
        """Tokens that have passed through the replica's cache since the prompt was last used."""
        return self.replica.answered_tokens - self.used_at


@dataclass(frozen=True)
class Placement:
    """The replica that a request should go to, and the part of it that should be cached there."""

    replica: Replica | None = None
    """None for no preference."""
    cached_tokens: int = 0
    age_tokens: int = 0


NO_PREFERENCE = Placement()


class PrefixAffinity:
    """The affinity of the prompts that were scored last."""

    def __init__(self, replicas: Replicas, *, share: bool) -> None:
        """`share` is False for servers that gain nothing from a cached prompt."""
        self._replicas, self._share = replicas, share
        self._known: OrderedDict[int, CachedPrefix] = OrderedDict()
        self._kept_tokens = math.inf
        """Tokens that pass through a replica's cache before it loses a prompt; an estimate from lost prompts."""

    def is_shared(self, prompt_ids: list[int]) -> bool:
        return self._share and len(prompt_ids) >= SHARED_PREFIX_TOKENS

    def observe(self, place: Placement, cached_tokens: float) -> None:
        """Lower the estimate of what a cache keeps, if an answer had much less in its cache than expected."""
        if place.cached_tokens and cached_tokens < place.cached_tokens // 2:
            self._kept_tokens = min(self._kept_tokens, place.age_tokens / 2)

    @asynccontextmanager
    async def placement(self, prompt_ids: list[int]) -> AsyncIterator[Placement]:
        """Yield the placement of a request that begins with the prompt, once the prompt is cached there.

        The first sample of a group is not made to wait, nor one so late that the cache may have lost the prompt.
        """
        if not self.is_shared(prompt_ids):
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
            # Another replica computes the prompt once more: worth it where more than that is waiting here.
            stay = best is None or prefix.replica.outstanding_tokens <= best.outstanding_tokens + len(prompt_ids)
            yield Placement(prefix.replica, len(prompt_ids) - 1, prefix.age_tokens) if stay else NO_PREFERENCE
            if stay:
                prefix.used_at = prefix.replica.answered_tokens
            return
        replica = self._replicas.least_loaded()
        if replica is None:
            yield NO_PREFERENCE
            return
        with self._first_request(key, replica):
            yield Placement(replica)

    @asynccontextmanager
    async def prefetching(self, prompt_ids: list[int]) -> AsyncIterator[Replica | None]:
        """Yield the replica that a prompt is sent to before its responses; None where that is of no use.

        After an error inside, the first sample of the group brings the prompt into the cache.
        """
        await self._replicas.resolve()
        replica = self._replicas.least_loaded()
        key = hash(tuple(prompt_ids))
        # A sample of the group, or another prefetch, may have been faster.
        known = self._known.get(key)
        if replica is None or (known is not None and not self._may_be_lost(known)):
            yield None
            return
        with self._first_request(key, replica) as prefix:
            prefix.lost = True
            yield replica
            prefix.lost = False

    def _may_be_lost(self, prefix: CachedPrefix) -> bool:
        return prefix.cached.is_set() and prefix.age_tokens > self._kept_tokens

    @contextmanager
    def _first_request(self, key: int, replica: Replica) -> Iterator[CachedPrefix]:
        """Make the other requests of a prompt wait for the first one, after whose error the prompt is unknown again."""
        prefix = self._known[key] = CachedPrefix(replica)
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
