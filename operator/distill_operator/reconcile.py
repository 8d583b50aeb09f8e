"""One look at one job: read it and what belongs to it, plan, do the effects in order, write the status once.

Everything is read anew each time, by name and by label. Watches only say when to look, so a missed or late event
costs time and nothing else.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from distill_api import names
from distill_api.base import API_VERSION, KIND
from distill_api.job import DistillationJob, InvalidManifest, parse_job
from distill_api.names import Role
from distill_api.status import Status
from distill_operator import observed as reading
from distill_operator.cluster import AlreadyExists, Cluster, Conflict, NotServed, Refused
from distill_operator.effects import Apply, Check, CreateSecret, Delete, Effect, Event
from distill_operator.events import EventRecorder
from distill_operator.jobs import Jobs
from distill_operator.kinds import Kind
from distill_operator.observed import Claim, Observed, Pod
from distill_operator.plan import Plan, invalid, plan, refused
from distill_operator.progress import ProgressPoller
from distill_operator.queue import Key, Retry
from distill_operator.settings import Settings
from distill_operator.wire_status import read_status, status_patch

logger = logging.getLogger(__name__)
KEY_BYTES = 32
Json = dict[str, Any]


@dataclass
class Reconciler:
    """Brings one job after another to where its spec wants it."""

    cluster: Cluster
    settings: Settings
    events: EventRecorder
    progress: ProgressPoller
    jobs: Jobs
    clock: Callable[[], datetime]

    async def reconcile(self, key: Key) -> float | None:
        """In how many seconds to look again, if time alone will change something. Raises Retry after a conflict."""
        raw = await self.cluster.get(Kind.DISTILLATION_JOB, key.namespace, key.name)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # The garbage collector takes the children, by their owner references.
            self._forget(key)
            return None
        status = read_status(raw)
        decided = await self._decide(key, raw, status)
        for effect in decided.effects:
            try:
                await self._do(key, raw, effect)
            except Refused as error:
                decided = self._refused(raw, status, error)
                for event in decided.effects:
                    await self._do(key, raw, event)
                break
        await self._write(key, raw, decided.status)
        self.jobs.put(key, raw, decided.status)
        return decided.requeue_after

    async def _decide(self, key: Key, raw: Json, status: Status) -> Plan:
        meta = raw["metadata"]
        try:
            job = parse_job({"apiVersion": API_VERSION, "kind": KIND, **raw})
        except InvalidManifest as error:
            return invalid(meta["uid"], status, error.problems, meta.get("generation", 0), self.clock())
        observed = await self._observe(key, job)
        return plan(job, status, observed, self.settings, self.clock())

    def _refused(self, raw: Json, status: Status, error: Refused) -> Plan:
        job = parse_job({"apiVersion": API_VERSION, "kind": KIND, **raw})
        return refused(job, status, f"the API server refused it: {error.message}", self.clock())

    async def _observe(self, key: Key, job: DistillationJob) -> Observed:
        namespace, name = key
        by_job = f"{names.LABEL_MANAGED_BY}={names.FIELD_MANAGER},{names.LABEL_JOB}={name}"

        def one(kind: Kind, child: str) -> Any:
            # By name, whatever its labels: a stranger's object of this name must be seen too.
            return self.cluster.list(kind, namespace, name=child)

        clusters, claim, *rest = await asyncio.gather(
            self._ray_clusters(namespace, names.ray_cluster(name)),
            self._claim(namespace, job),
            one(Kind.CONFIG_MAP, names.config_map(name)),
            one(Kind.NETWORK_POLICY, names.network_policy(name)),
            one(Kind.SERVICE, names.teacher(name)),
            one(Kind.SERVICE, names.trainer(name)),
            one(Kind.DEPLOYMENT, names.teacher(name)),
            self.cluster.list(Kind.JOB, namespace, labels=by_job),
        )
        # After the Jobs: a Job that has failed is then seen with the pod that tells why.
        pods = reading.read_pods(await self.cluster.list(Kind.POD, namespace, labels=by_job))
        raws = [raw for found in (*rest, clusters or []) for raw in found]
        return Observed(
            children=tuple(reading.read_child(raw, job.metadata.uid) for raw in raws),
            pods=pods,
            claim=claim,
            kuberay_installed=clusters is not None,
            report=self._report(key, pods),
        )

    async def _ray_clusters(self, namespace: str, name: str) -> list[Json] | None:
        """None where KubeRay is not installed."""
        try:
            return await self.cluster.list(Kind.RAY_CLUSTER, namespace, name=name)
        except NotServed:
            return None

    async def _claim(self, namespace: str, job: DistillationJob) -> Claim:
        if job.spec.output.volume is None:
            return Claim.ABSENT
        claim = await self.cluster.get(Kind.CLAIM, namespace, job.spec.output.volume.claim_name)
        storage_class = None
        if claim is not None and claim.get("status", {}).get("phase") != "Bound":
            class_name = claim.get("spec", {}).get("storageClassName")
            # A claim without a class waits for a volume made by hand, or for a default class.
            storage_class = await self.cluster.get(Kind.STORAGE_CLASS, "", class_name) if class_name else {}
        return reading.read_claim(claim, storage_class)

    def _report(self, key: Key, pods: tuple[Pod, ...]) -> Any:
        """What rank 0 of the newest attempt said last."""
        ranks = [p for p in pods if p.role is Role.TRAINER and p.index == 0]
        if not ranks:
            self.progress.rest(key)
            return None
        newest = max(ranks, key=lambda p: (p.attempt, not p.deleting, p.running))
        if newest.running and newest.ip:
            self.progress.follow(key, newest.uid, newest.ip)
        else:
            self.progress.rest(key)
        # A trainer that ends says its last numbers in its termination message: no poll has to be in time for them.
        ended = reading.exit_report(newest.exit_message) if newest.exit_message else None
        return ended.final if ended and ended.final else self.progress.latest(key, newest.uid)

    async def _do(self, key: Key, raw: Mapping[str, Any], effect: Effect) -> None:
        uid = raw["metadata"]["uid"]
        match effect:
            case Check(body):
                await self.cluster.apply(body, dry_run=True)
            case Apply(body):
                logger.info("%s: apply %s %s", key, body["kind"], body["metadata"]["name"])
                await self.cluster.apply(body)
            case CreateSecret(body, entry):
                with contextlib.suppress(AlreadyExists):
                    await self.cluster.create({**body, "stringData": {entry: secrets.token_urlsafe(KEY_BYTES)}})
            case Delete(kind, name, child_uid):
                logger.info("%s: delete %s %s", key, kind.value.kind, name)
                await self.cluster.delete(kind, key.namespace, name, child_uid)
            case Event():
                await self.events.record(key.namespace, key.name, uid, effect)

    async def _write(self, key: Key, raw: Json, status: Status) -> None:
        patch = status_patch(raw, status)
        if patch is None:
            return
        try:
            await self.cluster.patch_status(key.namespace, key.name, patch)
        except Conflict:
            raise Retry from None

    def _forget(self, key: Key) -> None:
        uid = self.jobs.remove(key)
        self.progress.forget(key)
        if uid:
            self.events.forget(uid)
