"""Lists everything again and again, each namespace by itself: what watches missed is noticed, and what is gone too.

A namespace that is deleted or forbidden holds up no other. Nothing in a namespace is reconciled before everything in
it was listed once: what is not known yet would be taken for gone.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Collection

from distill_operator.runtime.cache import Cache
from distill_operator.runtime.errors import ApiError
from distill_operator.runtime.health_server import Heart
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import backoff_seconds

logger = logging.getLogger(__name__)

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 1.0, 3.0
"""Between two tries of a list that fails: so soon after an outage everything is as it was."""
RECOVERY_SECONDS = 5.0
"""Within this time everything is reconciled once a list succeeds that had failed."""
LEFT_AFTER = 10
"""After so many answers of 403 in a row, about half a minute, a namespace counts as gone."""


class Resync:
    """The lists of the watched namespaces."""

    def __init__(
        self,
        cache: Cache,
        interval_seconds: float,
        *,
        known: Callable[[], set[Key]],
        on_listed: Callable[[str], None],
        wake: Callable[[Key, float], None],
        renew_watches: Callable[[str], None],
        heart: Heart,
        end_heart: Callable[[str], None] = lambda part: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.failing: set[str] = set()
        """Namespaces whose last list failed."""
        self._cache = cache
        self._interval = interval_seconds
        self._known = known
        """Return all owners of which anything is remembered."""
        self._on_listed = on_listed
        """Called with a namespace that was listed, before any owner in it is reconciled."""
        self._wake = wake
        """Called with an owner, and in how many seconds it is to be reconciled."""
        self._renew_watches = renew_watches
        self._heart = heart
        self._end_heart = end_heart
        """Called with a part whose work is over."""
        self._jitter = jitter
        self._listed: set[str] = set()
        self._left: set[str] = set()
        """Namespaces that were listed once, and are forbidden or not watched by now."""
        self._went_back = 0
        self._turned = asyncio.Event()
        """Set when other namespaces are to be watched."""

    def may_reconcile(self, key: Key) -> bool:
        """Return whether enough is known of an owner's namespace; of one that is left, owners are only forgotten."""
        if not self._listed.isdisjoint(("", key.namespace)):
            return True
        if key.namespace not in self._left:
            return False
        if self._cache.owner(key) is not None and key.namespace not in self._cache.namespaces:
            # The answer to a write that was under way when it was let go has brought it back.
            self._cache.leave(key.namespace)
        return self._cache.owner(key) is None

    @property
    def all_failing(self) -> bool:
        """Whether no namespace can be listed: the API server is away."""
        return self.failing.issuperset(self._cache.namespaces)

    async def run(self) -> None:
        """List until cancelled."""
        kept: dict[str, asyncio.Task[None]] = {}
        loop = asyncio.get_running_loop()
        expires = loop.time() + self._interval
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._turned.clear()
                for namespace in kept.keys() - set(self._cache.namespaces):
                    kept.pop(namespace).cancel()
                    self._end_heart(_part(namespace))
                    self.failing.discard(namespace)
                    self._leave(namespace)
                for namespace in set(self._cache.namespaces) - kept.keys():
                    kept[namespace] = tasks.create_task(self._keep(namespace))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._turned.wait(), expires - loop.time())
                # Also where namespaces come and go more often than that.
                if loop.time() >= expires:
                    self._cache.expire()
                    expires = loop.time() + self._interval

    def turn_to(self, namespaces: Collection[str]) -> None:
        """Watch these namespaces from now on, and no other."""
        self._cache.namespaces = tuple(namespaces)
        self._turned.set()

    async def _keep(self, namespace: str) -> None:
        beat, failures = self._heart(_part(namespace)), 0
        while True:
            try:
                await self._list(namespace)
                beat()
            except Exception as error:
                failures += 1
                self._failed(namespace, error, failures)
                if isinstance(error, ApiError) and error.may_pass:
                    beat()
                seconds = backoff_seconds(failures, FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS, self._jitter())
            else:
                failures, seconds = 0, self._interval
            await asyncio.sleep(min(seconds, self._interval))

    async def _list(self, namespace: str) -> None:
        try:
            changed = await self._cache.sync(namespace)
        finally:
            self._look_back()
        within = self._interval
        if namespace in self.failing:
            logger.info("%s can be listed again", namespace or "the cluster")
            # What failed meanwhile may wait for long before it is tried again.
            within = min(within, RECOVERY_SECONDS)
        if first := namespace not in self._listed:
            self._on_listed(namespace)
        self._listed.add(namespace)
        self.failing.discard(namespace)
        self._left.discard(namespace)
        for key in self._known_in(namespace) | changed:
            # Spread, or a thousand jobs would be reconciled while one waits that has changed.
            self._wake(key, 0.0 if first or key in changed else self._jitter() * within)

    def _failed(self, namespace: str, error: Exception, failures: int) -> None:
        self.failing.add(namespace)
        # At the first time, and then ever less often.
        if failures.bit_count() == 1:
            trace = None if isinstance(error, ApiError) else error
            logger.warning(
                "%s cannot be listed, try %d: %s", namespace or "the cluster", failures, error, exc_info=trace
            )
        forbidden = isinstance(error, ApiError) and error.status == 403 and not self.all_failing
        if namespace in self._listed and forbidden and failures >= LEFT_AFTER:
            logger.warning("namespace %s is forbidden: its jobs are forgotten until it is not", namespace)
            self._leave(namespace)

    def _leave(self, namespace: str) -> None:
        """Forget the owners of a namespace. Nothing in it is changed."""
        self._listed.discard(namespace)
        self._left.add(namespace)
        left = self._known_in(namespace)
        self._cache.leave(namespace)
        for key in left:
            self._wake(key, 0.0)

    def _look_back(self) -> None:
        if self._cache.store.went_back != self._went_back:
            self._went_back = self._cache.store.went_back
            self._renew_watches("the API server shows older versions than before, as after a restored backup")

    def _known_in(self, namespace: str) -> set[Key]:
        return {key for key in self._known() if namespace in ("", key.namespace)}


def _part(namespace: str) -> str:
    """Return the name of the lists of a namespace, as a part of the process that shows that it works."""
    return f"lists of {namespace or 'all namespaces'}"
