"""Replicas of a teacher that join later: each is used once it has scored a response as those before it did."""

import asyncio
import logging
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from distill_api.spec import NamedTeacherSource
from distill_workers.teacher.protocol import BadScore, Observer, Scores
from distill_workers.teacher.replicas import NotAnswered, Replica, Replicas

log = logging.getLogger(__name__)

ENOUGH_TOKENS = 16
"""Of a response: a longer one says no more about a replica's weights."""
DISAGREES = "disagrees"
"""Instead of a code, of a replica that joined later and was refused."""


@dataclass(frozen=True)
class Reference:
    """What the replicas have said of one response."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    """[response], nats"""

    def worse_than(self, response_ids: list[int]) -> bool:
        return len(self.response_ids) < min(len(response_ids), ENOUGH_TOKENS)

    def gap_nats(self, scores: Scores) -> float:
        """Mean over the tokens."""
        return statistics.fmean(abs(a - b) for a, b in zip(self.logprobs, scores.logprobs, strict=True))


class ReplicaAdmission:
    """Of one teacher's replicas."""

    def __init__(
        self,
        replicas: Replicas,
        teacher: NamedTeacherSource,
        score: Callable[[Replica, list[int], list[int]], Awaitable[Scores]],
        observer: Observer,
    ) -> None:
        """`score`: a prompt and a response by one replica; raises BadScore, NotAnswered."""
        self._replicas, self._teacher, self._score, self._observer = replicas, teacher, score, observer
        self._reference: Reference | None = None
        self._comparisons: dict[Replica, asyncio.Task[None]] = {}

    def observe(self, prompt_ids: list[int], response_ids: list[int], scores: Scores) -> None:
        """Keeps what was scored, if a newcomer can be compared better by it."""
        if self._reference is None or self._reference.worse_than(response_ids):
            self._reference = Reference(prompt_ids, response_ids, scores.logprobs)

    def admit_pending(self) -> None:
        """Begins to compare those that have just joined, beside what is under way."""
        for replica in self._replicas.pending():
            if self._reference is None:
                replica.admitted = True  # nothing was scored yet, so it is as good as the first
            elif replica not in self._comparisons:
                self._comparisons[replica] = asyncio.create_task(self._compare(replica, self._reference))

    def close(self) -> None:
        for proof in self._comparisons.values():
            proof.cancel()

    async def _compare(self, replica: Replica, reference: Reference) -> None:
        prompt, response = reference.prompt_ids, reference.response_ids
        try:
            gap = reference.gap_nats(await self._score(replica, prompt, response))
        except (NotAnswered, BadScore) as error:
            replica.failed(time.monotonic())
            log.warning("teacher %s: replica %s could not be compared: %s", self._teacher.name, replica.address, error)
            return
        finally:
            del self._comparisons[replica]
        replica.admitted = gap <= self._teacher.max_disagreement
        replica.rejected = not replica.admitted
        if replica.rejected:
            self._observer.add("distill_teacher_requests", 1, code=DISAGREES, teacher=self._teacher.name)
            log.error(
                "teacher %s: replica %s joined, and scores %d tokens %.4f nats per token otherwise than those before "
                "(allowed %s, maxDisagreement): it gets no requests",
                *(self._teacher.name, replica.address, len(response), gap, self._teacher.max_disagreement),
            )
