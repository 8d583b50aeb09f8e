"""A check of the preflight: its name, what it promises, and what it costs."""

import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from distill_workers.failures import PreflightFailed

T = TypeVar("T")
log = logging.getLogger(__name__)


class ModelsDisagree(PreflightFailed):
    """Raised when student and teacher differ in what they must share; the sentence has both values."""


@dataclass(frozen=True)
class Check:
    """One promise about the parts of a run."""

    name: str
    """With which the message of its failure begins."""
    promise: str
    """What holds where it passes, as a sentence."""
    cost: str
    """Of requests and computing."""

    def failure(self, message: str) -> PreflightFailed:
        """Return the error of a check that failed; `message` says what was expected, what came and what to do."""
        return PreflightFailed(f"{self.name}: {message}")

    async def passing(self, work: Awaitable[T]) -> T:
        """Return the result of `work`, which raises `failure`, and log that the promise holds."""
        begin = time.monotonic()
        result = await work
        log.info("preflight: %s (%s, %.1f s): %s", self.name, self.cost, time.monotonic() - begin, self.promise)
        return result
