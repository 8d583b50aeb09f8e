"""The namespaces that a label selects, beside those of a list: watched from when they get the label until they lose it.

They are listed every few seconds. While that fails, what was watched is watched on.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection

from distill_operator.kinds import Kind
from distill_operator.runtime.client import Cluster
from distill_operator.runtime.errors import ApiError
from distill_operator.runtime.health_server import Heart
from distill_operator.runtime.work_queue import backoff_seconds

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 1.0, 30.0
"""Between two tries of a list that fails."""


class SelectedNamespaces:
    """The list of the namespaces that are watched, kept up to date."""

    def __init__(
        self,
        cluster: Cluster,
        selector: str,
        always: Collection[str],
        *,
        turn_to: Callable[[Collection[str]], None],
        heart: Heart,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.failing = False
        """Whether the last list failed."""
        self._cluster = cluster
        self._selector = selector
        self._always = frozenset(always)
        """Namespaces that are watched with or without the label."""
        self._turn_to = turn_to
        """Called with all namespaces that are to be watched, when they are others than before."""
        self._heart = heart
        self._jitter = jitter

    async def run(self) -> None:
        """List until cancelled."""
        beat, failures, watched = self._heart("namespaces"), 0, self._always
        while True:
            try:
                found = await self._cluster.list(Kind.NAMESPACE, "", labels=self._selector)
                wanted = self._always | {raw["metadata"]["name"] for raw in found}
            except Exception as error:
                failures += 1
                self.failing = True
                if failures.bit_count() == 1:
                    trace = None if isinstance(error, ApiError) else error
                    logger.warning("namespaces cannot be listed, try %d: %s", failures, error, exc_info=trace)
                if isinstance(error, ApiError) and error.may_pass:
                    beat()
                seconds = backoff_seconds(failures, FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS, self._jitter())
            else:
                failures, seconds = 0, INTERVAL_SECONDS
                self.failing = False
                beat()
                if wanted != watched:
                    for word, names in (("taken up", wanted - watched), ("let go", watched - wanted)):
                        if names:
                            logger.info("namespaces %s: %s", word, ", ".join(sorted(names)))
                    watched = wanted
                    self._turn_to(sorted(wanted))
            await asyncio.sleep(seconds)
