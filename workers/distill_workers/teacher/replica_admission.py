"""Admission of replicas: one that joins later is used once it has scored a response as the others did.

A replica with other weights than the rest would change the objective without a trace. The first replicas are compared
with each other by the preflight.
"""

import asyncio
import logging
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from distill_api.spec.job_spec import NamedTeacherSource
from distill_workers.teacher.protocol import BadScore, Observer, Scores
from distill_workers.teacher.replicas import NotAnswered, Replica, Replicas

log = logging.getLogger(__name__)

ENOUGH_TOKENS = 16
"""A response of so many tokens is enough: a longer one tells no more about a replica's weights."""
DISAGREES = "disagrees"
"""Label `code` of distill_teacher_requests for a replica that is rejected."""


@dataclass(frozen=True)
class Reference:
    """A response and the log-probs that admitted replicas gave it."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    """[response], nats"""

    def worse_than(self, response_ids: list[int]) -> bool:
        """Return whether another response is a better reference, by its length."""
        return len(self.response_ids) < min(len(response_ids), ENOUGH_TOKENS)

    def gap_nats(self, scores: Scores) -> float:
        """Return the mean absolute difference of the log-probs, per token."""
        return statistics.fmean(abs(a - b) for a, b in zip(self.logprobs, scores.logprobs, strict=True))


class ReplicaAdmission:
    """The admission of one teacher's replicas."""

    def __init__(
        self,
        replicas: Replicas,
        teacher: NamedTeacherSource,
        score: Callable[[Replica, list[int], list[int]], Awaitable[Scores]],
        observer: Observer,
    ) -> None:
        """`score` has one replica score a response to a prompt; it raises BadScore, NotAnswered."""
        self._replicas, self._teacher, self._score, self._observer = replicas, teacher, score, observer
        self._reference: Reference | None = None
        self._forgotten = False
        """Whether there was a reference before: those that it admitted will score another."""
        self._comparisons: dict[Replica, asyncio.Task[None]] = {}

    def observe(self, prompt_ids: list[int], response_ids: list[int], scores: Scores) -> None:
        """Take a scored response as the reference, if it is a better one than the present."""
        if self._reference is None or self._reference.worse_than(response_ids):
            self._reference = Reference(prompt_ids, response_ids, scores.logprobs)

    def reset(self) -> None:
        """Forget the reference, and what was compared with it and is not admitted: the weights of all replicas
        change."""
        self.close()
        self._comparisons.clear()  # one that is cancelled before it first runs would not do it
        self._forgotten = self._forgotten or self._reference is not None
        self._reference = None
        for replica in self._replicas.all():
            replica.rejected = False

    def admit_pending(self) -> None:
        """Start the comparison of each replica that has joined, in the background."""
        others_score = self._forgotten and any(replica.admitted for replica in self._replicas.all())
        for replica in self._replicas.pending_admission():
            if self._reference is None:
                replica.admitted = not others_score  # without, there is no other replica to differ from
            elif replica not in self._comparisons:
                self._comparisons[replica] = asyncio.create_task(self._compare(replica, self._reference))

    def close(self) -> None:
        """Cancel the comparisons under way."""
        for proof in self._comparisons.values():
            proof.cancel()

    async def _compare(self, replica: Replica, reference: Reference) -> None:
        prompt, response, sent = reference.prompt_ids, reference.response_ids, time.monotonic()
        try:
            gap = reference.gap_nats(await self._score(replica, prompt, response))
        except (NotAnswered, BadScore) as error:
            replica.failed(sent)
            log.warning("teacher %s: replica %s could not be compared: %s", self._teacher.name, replica.address, error)
            return
        finally:
            if self._comparisons.get(replica) is asyncio.current_task():
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
