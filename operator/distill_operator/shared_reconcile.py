"""One look at one Teacher, as reconcile.py does it for jobs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from distill_api.base import API_VERSION
from distill_api.job import InvalidManifest
from distill_api.shared_teacher import KIND, SharedTeacher, SharedTeacherStatus, parse_teacher
from distill_operator import observed as reading
from distill_operator.cache import Cache
from distill_operator.cluster import Conflict, NamespaceEnding, QuotaExceeded, Refused
from distill_operator.effects import Apply, CreateSecret
from distill_operator.jobs import Jobs
from distill_operator.observed import Observed
from distill_operator.queue import Key, Retry
from distill_operator.settings import Settings
from distill_operator.shared_plan import SharedPlan, plan_shared, refused
from distill_operator.wire_status import read_status, status_patch

logger = logging.getLogger(__name__)
LOOK_SECONDS = 10.0
"""At one that jobs learn from: what they have for it to do is known from their progress."""


@dataclass
class SharedReconciler:
    """Brings one Teacher after another to where its spec wants it."""

    cache: Cache
    settings: Settings
    jobs: Jobs
    clock: Callable[[], datetime]

    async def reconcile(self, key: Key) -> float | None:
        """In how many seconds to look again, if time alone will change something. Raises Retry after a conflict."""
        raw = self.cache.job(key)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # The garbage collector takes the children, by their owner references.
            self.cache.forget(key)
            return None
        status, now = read_status(raw, SharedTeacherStatus), self.clock()
        generation = raw["metadata"].get("generation", 0)
        try:
            teacher = parse_teacher({"apiVersion": API_VERSION, "kind": KIND, **raw})
        except InvalidManifest as error:
            decided = refused(generation, status, "; ".join(error.problems), now)
        else:
            requests = self.jobs.requests_of(key.namespace, teacher.metadata.name)
            observed = await self._observe(key, teacher)
            decided = plan_shared(teacher, status, observed, requests, self.settings, now)
            if requests:
                again = min(LOOK_SECONDS, decided.requeue_after or LOOK_SECONDS)
                decided = SharedPlan(decided.effects, decided.status, again)
        try:
            await self._do(key, decided)
        except NamespaceEnding:
            return None
        except (Refused, QuotaExceeded) as error:
            decided = refused(generation, status, f"the API server refused it: {error.message}", now)
        if (patch := status_patch(raw, decided.status)) is not None:
            await self._checked(self.cache.patch_status(key, patch))
        return decided.requeue_after

    async def _observe(self, key: Key, teacher: SharedTeacher) -> Observed:
        uid = teacher.metadata.uid
        children = tuple(reading.read_child(raw, uid) for raw in await self.cache.children(key, uid))
        return Observed(children=children, pods=reading.read_pods(await self.cache.pods(key, live=False)))

    async def _do(self, key: Key, decided: SharedPlan) -> None:
        for effect in decided.effects:
            match effect:
                case Apply(body):
                    logger.info("%s: apply %s %s", key, body["kind"], body["metadata"]["name"])
                    await self._checked(self.cache.apply(body))
                case CreateSecret(body, entry):
                    await self.cache.create_secret(body, entry)

    @staticmethod
    async def _checked(work: Any) -> None:
        try:
            await work
        except Conflict:
            raise Retry from None
