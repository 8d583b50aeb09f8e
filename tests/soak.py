"""How long `make soak` goes on: SOAK_MINUTES, of which each of its tests has a part."""

import os
import time
from collections.abc import Iterator

VARIABLE = "SOAK_MINUTES"


def seeds(part: float, *, first: int = 0, at_least: int = 1) -> Iterator[int]:
    """0, 1, 2, ... from `first` until the part of the time is over, and so many in any case."""
    end = time.monotonic() + 60 * part * float(os.environ.get(VARIABLE, "120"))
    seed = first
    while seed < first + at_least or time.monotonic() < end:
        yield seed
        seed += 1
