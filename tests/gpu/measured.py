"""What one part of the suite measures, and on what: the sizes for a GPU, and a tiny form of each for a CPU."""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

TINY = os.environ.get("DISTILL_GPU_TINY") == "cpu"
"""The tiny form: every line but CUDA's own runs on a CPU in seconds; what it measures says nothing of a GPU."""
DEVICE = torch.device("cpu" if TINY else "cuda")
GB = 1e9


@dataclass(frozen=True)
class Row:
    """One measured value."""

    what: str
    value: float | None
    """None where it could not be measured; `note` says why."""
    unit: str
    bound: str = ""
    holds: bool | None = None
    """Whether the value keeps its bound; None without one."""
    note: str = ""


@dataclass
class Rows:
    """The values of one part, in the order in which they were measured."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        what: str,
        value: float | None,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
        also_tiny: bool = False,
    ) -> None:
        """Add a value. Its bound is checked on a GPU; in the tiny form only with `also_tiny`, as for correctness."""
        bound, holds = "", None
        if value is not None and (also_tiny or not TINY):
            if at_most is not None:
                bound, holds = f"<= {at_most:.4g}", value <= at_most
            if at_least is not None:
                bound, holds = f">= {at_least:.4g}", value >= at_least
        self.rows.append(Row(what, value, unit, bound, holds, note))

    def plain(self) -> list[dict[str, Any]]:
        """Return the rows as JSON has them."""
        return [asdict(row) for row in self.rows]


def synchronise() -> None:
    """Wait until the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def seconds(work: Callable[[], object], *, repeats: int = 3) -> float:
    """Return the shortest time of some runs, after one that warms up."""
    work()
    found = []
    for _ in range(1 if TINY else repeats):
        synchronise()
        begin = time.perf_counter()
        work()
        synchronise()
        found.append(time.perf_counter() - begin)
    return min(found)


@dataclass
class Peak:
    """Bytes of the device's memory around some work."""

    before: int = 0
    most: int = 0
    after: int = 0

    @property
    def extra(self) -> int:
        """Bytes at the peak over those before."""
        return self.most - self.before


@contextmanager
def peak() -> Iterator[Peak]:
    """Measure the device's memory during the body; all zero on a CPU."""
    found = Peak()
    if DEVICE.type != "cuda":
        yield found
        return
    free()
    torch.cuda.reset_peak_memory_stats()
    found.before = torch.cuda.memory_allocated()
    yield found
    synchronise()
    found.most, found.after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
