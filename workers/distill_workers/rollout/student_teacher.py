"""A teacher that is the student itself (teacher.student): the rollout engines score, with the weights that they hold.

A score is a request to an engine like a response: it takes one of the pool's slots, before the responses of training,
and ends under the weights that it began with, since new ones wait until no request is in flight. So a sample is scored
by weights that are at least as new as those it was drawn with, and at most as new as the trainer's: the same where
maxPolicyLag is 0. Which they were is told in its answer, and kept with the sample (Sample.teacher_version).
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from distill_api.spec.job_spec import NamedTeacherSource, Spec
from distill_api.teacher.student import engines_score
from distill_workers.engine.request import EngineRefused
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.scheduler import EngineAffinity
from distill_workers.teacher.pool import BadScore, Scores, TeacherPool
from distill_workers.teacher.prefix_affinity import NO_PREFERENCE, Placement
from distill_workers.teacher.protocol import Observer, TeacherRequest


class StudentTeacher(TeacherPool):
    """The TeacherPool whose replicas are the rollout engines: the engine pool chooses among them, and restarts them."""

    def __init__(self, engines: EnginePool, spec: Spec, observer: Observer, teacher: NamedTeacherSource) -> None:
        super().__init__("", spec, observer, teacher=teacher)
        self._engines = engines

    async def score_everywhere(
        self, prompt_ids: list[int], response_ids: list[int], top_k: int | None
    ) -> list[tuple[str, Scores]]:
        _, request = await self._score_request(prompt_ids, response_ids, top_k)

        async def by(affinity: EngineAffinity) -> tuple[str, Scores]:
            answer = await self._answer(request, affinity)
            scores = self._protocol.read_scores(answer, prompt_ids, response_ids, top_k)
            return f"engine {affinity.engine}", scores  # another one, where that was lost meanwhile

        return await asyncio.gather(*(by(EngineAffinity(number)) for number in self._engines.serving))

    async def prefetch(self, prompt_ids: list[int]) -> None:
        """Do nothing: the engines are busy with the group, whose first score caches the prompt as well."""

    async def _request(
        self,
        request: TeacherRequest,
        tokens: int,
        placement: Placement = NO_PREFERENCE,
        timeout_seconds: float | None = None,
    ) -> Any:
        return await self._answer(request, EngineAffinity())

    async def _answer(self, request: TeacherRequest, affinity: EngineAffinity) -> Any:
        """Return the answer of an engine to a request for scores or a response. Raises BadScore for a refusal."""
        begin, code = time.monotonic(), "error"
        try:
            answer = await self._engines.answer(request.body, affinity=affinity)
            code = "200"
        except EngineRefused as error:
            raise BadScore("refused", str(error)) from None
        finally:
            self._observer.add("distill_teacher_requests", 1, code=code, teacher=self.teacher.name)
            self._observer.observe("distill_teacher_request_duration_seconds", time.monotonic() - begin)
        return answer


def student_teachers(spec: Spec, engines: EnginePool, observer: Observer) -> Mapping[str, TeacherPool]:
    """Return the teacher of a job that is its student, by its name; none where servers score."""
    if not engines_score(spec):
        return {}
    return {t.name: StudentTeacher(engines, spec, observer, t) for t in spec.all_teachers}
