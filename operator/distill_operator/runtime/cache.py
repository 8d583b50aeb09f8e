"""The cluster as the reconciler sees it: reads from memory, writes to the API server and into memory.

The memory may be behind. That delays, but neither duplicates nor destroys: an object that memory lacks is applied only
if nothing of its name exists, one that it has only if it is still the same by uid, deletions and status writes carry
uid and resourceVersion, and attempt numbers are the maximum of status and children. What a write shows to be wrong is
read again at once; what the watches missed, by the resync's lists.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_api import names
from distill_operator.runtime.client import Cluster
from distill_operator.runtime.errors import AlreadyExists, ApiError, Conflict, NotServed
from distill_operator.runtime.kinds import Kind, kind_of
from distill_operator.runtime.store import OWNERS, Json, Store, job_of
from distill_operator.runtime.work_queue import Key

logger = logging.getLogger(__name__)

MANAGED = f"{names.LABEL_MANAGED_BY}={names.FIELD_MANAGER}"
WATCHED = (Kind.DISTILLATION_JOB, Kind.TEACHER, Kind.DEPLOYMENT, Kind.JOB, Kind.RAY_CLUSTER, Kind.POD)
LISTED = (Kind.CONFIG_MAP, Kind.SERVICE, Kind.NETWORK_POLICY)
"""Nothing happens to these by itself, so the resync's lists are enough, and the right to watch them is not needed."""
CHILD_KINDS = frozenset((*WATCHED, *LISTED)) - OWNERS - {Kind.POD}
"""Of others, such as the groups of gang schedulers, memory knows only what we wrote."""
OPTIONAL = frozenset({Kind.RAY_CLUSTER, Kind.TEACHER})
"""The API server may not know these."""
KEY_BYTES = 32
BOUND_CLAIM_SECONDS = 30.0
"""A claim that is bound stays so; many jobs may share one."""
JUDGED_SECONDS = 600.0
"""For so long the API server is not asked again about an object that differs from an accepted one in the job's name."""
SERVED_AGAIN_SECONDS = 5.0
"""At most this often the API server is asked whether it knows a kind by now."""


class Cache:
    """All that was seen of the watched namespaces."""

    def __init__(
        self, cluster: Cluster, namespaces: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.cluster = cluster
        self.store = Store()
        self._namespaces = tuple(namespaces) or ("",)
        self._clock = clock
        self._not_served: dict[Kind, float] = {}
        """And when that was asked last."""
        self._unwatched: set[Kind] = set()
        """Kinds that came to be known later: their watch may never have begun."""
        self._made: dict[Key, set[tuple[Kind, str]]] = {}
        """What was applied to a job's names since we began."""
        self._strangers: dict[Key, set[tuple[Kind, str]]] = {}
        """Objects without our labels under names that jobs need: no watch tells of them."""
        self._claims: dict[tuple[str, str], tuple[float, Json]] = {}
        self._judged: dict[bytes, float] = {}
        """Digests of what a dry run accepted, and until when that holds."""
        self._asking: dict[bytes, asyncio.Future[None]] = {}
        """Of dry runs that are under way."""

    async def sync(self) -> set[Key]:
        """Lists everything. The jobs about which that told something new. Raises ApiError; then ask again."""
        news: set[Key] = set()
        for kind in (*WATCHED, *LISTED):
            news |= await self._sync(kind)
        self.store.prune()
        now = self._clock()
        self._claims = {key: claim for key, claim in self._claims.items() if claim[0] > now}
        self._judged = {digest: until for digest, until in self._judged.items() if until > now}
        return news

    def saw(self, kind: Kind, raw: Mapping[str, Any], *, gone: bool) -> bool:
        """From a watch. Whether it is news."""
        meta = raw["metadata"]
        self._unwatched.discard(kind)
        if gone:
            return self.store.remove(kind, meta["namespace"], meta["name"], meta["uid"])
        return self.store.put(kind, raw)

    @property
    def unwatched(self) -> bool:
        """Whether there is a kind whose watch has told nothing since the kind came to be known."""
        return bool(self._unwatched)

    def job(self, key: Key) -> Json | None:
        """The object itself."""
        kind, name = _owner(key)
        return self.store.get(kind, key.namespace, name)

    async def children(self, key: Key, uid: str) -> list[Json]:
        """All but pods. What stands under a name of the job and is not the job's is looked at anew each time."""
        found, doubtful = [], set(self._strangers.get(key, ()))
        for kind, raw in self.store.of_job(key, CHILD_KINDS):
            if owned_by(raw, uid) and kind not in self._unwatched:
                found.append(raw)
            else:
                doubtful.add((kind, raw["metadata"]["name"]))
        for kind, name in sorted(doubtful, key=str):
            if other := await self._look(kind, key, name):
                found.append(other)
        return found

    async def pods(self, key: Key, *, live: bool) -> list[Json]:
        if live:
            label = names.LABEL_JOB if key.teacher is None else names.LABEL_SHARED_TEACHER
            labels = f"{MANAGED},{label}={key.teacher or key.name}"
            return await self.cluster.list(Kind.POD, key.namespace, labels=labels)
        return [raw for _, raw in self.store.of_job(key, (Kind.POD,))]

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server knows the kind."""
        asked = self._not_served.get(kind)
        if asked is not None and self._clock() - asked >= SERVED_AGAIN_SECONDS:
            await self._sync(kind)
        return kind not in self._not_served

    async def claim(self, namespace: str, name: str) -> Json | None:
        """A bound one may have been seen half a minute ago."""
        until, known = self._claims.get((namespace, name), (0.0, None))
        if known is not None and self._clock() < until:
            return known
        found = await self.cluster.get(Kind.CLAIM, namespace, name)
        if found is not None and found.get("status", {}).get("phase") == "Bound":
            self._claims[namespace, name] = (self._clock() + BOUND_CLAIM_SECONDS, found)
        return found

    async def storage_class(self, name: str) -> Json | None:
        return await self.cluster.get(Kind.STORAGE_CLASS, "", name)

    async def check(self, body: Mapping[str, Any]) -> None:
        """Lets the API server judge an object without storing it. Raises Refused, and Conflict as apply() does."""
        digest = _digest(body)
        while digest in self._asking:
            # For another job. Should that fail, this one asks for itself.
            await asyncio.wait([self._asking[digest]])
        if self._judged.get(digest, -1.0) > self._clock():
            return
        self._asking[digest] = answered = asyncio.get_running_loop().create_future()
        try:
            await self._apply(body, dry_run=True)
            self._judged[digest] = self._clock() + JUDGED_SECONDS
        finally:
            del self._asking[digest]
            answered.set_result(None)

    async def apply(self, body: Mapping[str, Any]) -> None:
        """Raises Conflict when the object, or its job, is not what memory says; memory says it afterwards."""
        kind, meta = kind_of(body), body["metadata"]
        made = self._made.setdefault(job_of(kind, meta), set())
        if (kind, meta["name"]) in made and not self.store.uid(kind, meta["namespace"], meta["name"]):
            # It vanished: by somebody's hand, or because its job has gone unnoticed, which would happen for ever.
            await self._confirm(job_of(kind, meta))
        made.add((kind, meta["name"]))
        self.store.put(kind, await self._apply(body, dry_run=False))

    async def create_secret(self, body: Mapping[str, Any], entry: str) -> None:
        """With a fresh key under `entry`, unless it exists. Memory holds no Secret."""
        with contextlib.suppress(AlreadyExists):
            await self.cluster.create({**body, "stringData": {entry: secrets.token_urlsafe(KEY_BYTES)}})

    async def _apply(self, body: Mapping[str, Any], *, dry_run: bool) -> Json:
        kind, meta = kind_of(body), body["metadata"]
        uid = self.store.uid(kind, meta["namespace"], meta["name"])
        try:
            return await self.cluster.apply(body, uid=uid, dry_run=dry_run)
        except Conflict:
            await self._look(kind, job_of(kind, meta), meta["name"])
            raise
        except ApiError as error:
            if error.status == 404 and kind in OPTIONAL:
                self._not_served.setdefault(kind, 0.0)
            raise

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        left = await self.cluster.delete(kind, namespace, name, uid)
        if left is None:
            self.store.remove(kind, namespace, name, uid)
        else:
            self.store.put(kind, left)

    async def patch_status(self, key: Key, patch: Mapping[str, Any]) -> None:
        """Raises Conflict, with memory brought up to date."""
        kind, name = _owner(key)
        try:
            self.store.put(kind, await self.cluster.patch_status(kind, key.namespace, name, patch))
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            await self._look(kind, key, name)
            raise Conflict(409, error.message) from None

    def forget(self, key: Key) -> None:
        """The job is gone. Its objects follow, and not every one's end is told."""
        self._strangers.pop(key, None)
        self._made.pop(key, None)
        for kind, raw in list(self.store.of_job(key, LISTED)):
            self.store.remove(kind, key.namespace, raw["metadata"]["name"], raw["metadata"]["uid"])

    async def _confirm(self, key: Key) -> None:
        kind, name = _owner(key)
        before = self.store.uid(kind, key.namespace, name)
        found = await self._look(kind, key, name)
        if found is None or found["metadata"]["uid"] != before:
            raise Conflict(409, f"{key} is another job by now")

    async def _look(self, kind: Kind, key: Key, name: str) -> Json | None:
        """At one object itself."""
        strangers = self._strangers.setdefault(key, set())
        strangers.discard((kind, name))
        found = await self.cluster.list(kind, key.namespace, name=name)
        uid = self.store.uid(kind, key.namespace, name)
        if uid and (not found or found[0]["metadata"]["uid"] != uid):
            self.store.remove(kind, key.namespace, name, uid)
        if found and job_of(kind, found[0]["metadata"]) == key:
            self.store.revive(found[0]["metadata"]["uid"])
            self.store.put(kind, found[0])
        elif found:
            strangers.add((kind, name))
        if not strangers:
            del self._strangers[key]
        return found[0] if found else None

    async def _sync(self, kind: Kind) -> set[Key]:
        news: set[Key] = set()
        labels = "" if kind in OWNERS else MANAGED
        for namespace in self._namespaces:
            seen: set[tuple[str, str]] = set()
            version = 0
            try:
                async for page, as_of in self.cluster.pages(kind, namespace, labels=labels):
                    version = as_of
                    for raw in page:
                        meta = raw["metadata"]
                        seen.add((meta["namespace"], meta["name"]))
                        if self.store.put(kind, raw):
                            news.add(job_of(kind, meta))
            except NotServed:
                if kind not in OPTIONAL:
                    raise
                self._not_served[kind] = self._clock()
                news |= self.store.drop(kind, namespace)
                continue
            if self._not_served.pop(kind, None) is not None:
                self._unwatched.add(kind)
            news |= self.store.keep_only(kind, namespace, seen, version)
        return news


def _owner(key: Key) -> tuple[Kind, str]:
    """What a key stands for."""
    return (Kind.DISTILLATION_JOB, key.name) if key.teacher is None else (Kind.TEACHER, key.teacher)


def owned_by(raw: Mapping[str, Any], uid: str) -> bool:
    return any(o.get("controller") and o.get("uid") == uid for o in raw["metadata"].get("ownerReferences", []))


def _digest(body: Mapping[str, Any]) -> bytes:
    """The same for the same object of another job. What a ConfigMap says is not judged."""
    meta = body["metadata"]
    content = {key: value for key, value in body.items() if key not in ("metadata", "data")}
    text = json.dumps([meta["namespace"], content], sort_keys=True)
    name, uid = job_of(kind_of(body), meta).name, meta["ownerReferences"][0]["uid"]
    for own in (names.key_secret(name, uid), uid, name):
        # JSON has no such character of its own.
        text = text.replace(own, "\0")
    return hashlib.sha256(text.encode()).digest()
