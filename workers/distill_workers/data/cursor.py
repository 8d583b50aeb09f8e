"""The cursor: an endless stream of prompts, epoch by epoch, mixed by the sources' weights."""

import bisect
import functools
import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

from distill_workers.data.identity import changed, content_of
from distill_workers.data.sample import Prompt
from distill_workers.failures import PromptError

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, fill the unit interval as evenly as any sequence does."""


class SourceIterator:
    """An endless iterator over the prompts of one source, shuffled anew in each epoch."""

    def __init__(self, prompts: list[Prompt], key: str, shuffle: bool) -> None:
        """`key` seeds the order of each epoch."""
        self.prompts, self._key, self._shuffle = prompts, key, shuffle
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    def next(self) -> Prompt:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        self._position += 1
        return self.prompts[self._order[self._position - 1]]

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """The content of all prompts, by which a resumed run knows them."""
        return content_of(self.prompts)

    def state(self) -> dict[str, Any]:
        of = {"prompts": len(self.prompts), "content": self.content}
        return {"epoch": self._epoch, "position": self._position, **of}

    def restore(self, state: dict[str, Any]) -> None:
        """Move to a `state`. Raises PromptError if it is of other prompts."""
        others = changed(state.get("content", {}), self.content)
        if state["prompts"] != len(self.prompts) or others:
            count = f"{state['prompts']} prompts and there are {len(self.prompts)} now"
            what = f"; their {', '.join(others)} differ" if others else ""
            raise PromptError(
                f"the checkpoint was made with {count}{what}; restore the data, or start in a new output folder"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        if self._shuffle:
            random.Random(f"{self._key}/{epoch}").shuffle(order)
        return order


class Cursor:
    """An endless stream of prompts: one iterator for each source, mixed by the sources' weights.

    Each source has a part of the unit interval, as long as its share of the weights. Prompt n is of the source in whose
    part (start + n·GOLDEN_RATIO) mod 1 falls. So any run of prompts holds the sources by their weights, give or take
    two prompts, in no fixed pattern.
    """

    def __init__(
        self, prompts: list[Prompt], *, seed: int, shuffle: bool, weights: Mapping[str, float] | None = None
    ) -> None:
        """`weights` are by the names of sources; a source that is left out has the weight 1."""
        by_source: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            by_source.setdefault(prompt.source, []).append(prompt)
        alone = len(by_source) == 1
        self._iterators = {
            name: SourceIterator(of_source, f"{seed}" if alone else f"{seed}/{name}", shuffle)
            for name, of_source in by_source.items()
        }
        self._names = list(self._iterators)
        self._ends = list(itertools.accumulate((weights or {}).get(name, 1.0) for name in self._names))
        self._start = random.Random(f"{seed}/sources").random()
        self._taken = 0

    def next(self, count: int) -> list[Prompt]:
        """Return the next prompts and move the cursor behind them."""
        return [self._iterators[self._choose()].next() for _ in range(count)]

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts, source by source, wherever the cursor stands."""
        return [prompt for iterator in self._iterators.values() for prompt in iterator.prompts]

    def peek(self, count: int) -> list[Prompt]:
        """Return the first prompts of each source in turn, wherever the cursor stands."""
        rows = itertools.zip_longest(*(iterator.prompts[:count] for iterator in self._iterators.values()))
        return [prompt for row in rows for prompt in row if prompt is not None][:count]

    def state(self) -> dict[str, Any]:
        states = {name: iterator.state() for name, iterator in self._iterators.items()}
        return states[self._names[0]] if len(states) == 1 else {"drawn": self._taken, "sources": states}

    def restore(self, state: dict[str, Any]) -> None:
        """Move the cursor to a `state`. Raises PromptError if the state is of other prompts."""
        states = state["sources"] if "sources" in state else {self._names[0]: state}
        if states.keys() != self._iterators.keys():
            raise PromptError(
                f"the checkpoint was made with the sources {', '.join(states)} and there are "
                f"{', '.join(self._names)} now; restore data.sources, or start in a new output folder"
            )
        for name, iterator in self._iterators.items():
            iterator.restore(states[name])
        self._taken = state.get("drawn", 0)

    def _choose(self) -> str:
        if len(self._names) == 1:
            return self._names[0]
        point = (self._start + self._taken * GOLDEN_RATIO) % 1.0 * self._ends[-1]
        self._taken += 1
        return self._names[min(bisect.bisect_right(self._ends, point), len(self._names) - 1)]
