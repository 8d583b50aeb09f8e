"""How long `make soak` goes on: SOAK_MINUTES, of which each of its tests has a part.

Of disturbed runs on the cluster SOAK_RUNS may say the number instead, and SOAK_SEED repeats one of them.
"""

import os
import time
from collections.abc import Iterable, Iterator

VARIABLE, RUNS, SEED = "SOAK_MINUTES", "SOAK_RUNS", "SOAK_SEED"


def seeds(part: float, *, first: int = 0, at_least: int = 1) -> Iterator[int]:
    """0, 1, 2, ... from `first` until the part of the time is over, and so many in any case."""
    end = time.monotonic() + 60 * part * float(os.environ.get(VARIABLE, "120"))
    seed = first
    while seed < first + at_least or time.monotonic() < end:
        yield seed
        seed += 1


def runs(part: float, *, at_least: int) -> Iterator[int]:
    """As `seeds`, but SOAK_RUNS of them where that is set, and the one of SOAK_SEED alone."""
    count = os.environ.get(RUNS)
    return chosen(range(int(count)) if count else seeds(part, at_least=at_least))


def chosen(usual: Iterable[int]) -> Iterator[int]:
    """The usual seeds, or the one of SOAK_SEED alone."""
    return iter([int(os.environ[SEED])] if os.environ.get(SEED) else usual)
