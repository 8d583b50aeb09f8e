"""The cluster as the controllers see it: reads from memory, writes to the API server and into memory.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from distill_operator.kinds import Kind, kind_of
from distill_operator.runtime.client import Cluster
from distill_operator.runtime.errors import AlreadyExists, ApiError, Conflict, NotServed
from distill_operator.runtime.ownership import Key, Ownership
from distill_operator.runtime.store import Json, Store

logger = logging.getLogger(__name__)

KEY_BYTES = 32
BOUND_CLAIM_SECONDS = 30.0
"""How long a claim that was bound is not read again: it stays bound, and many jobs may share one."""
DRY_RUN_SECONDS = 600.0
"""How long the API server is not asked again about an object that differs from an accepted one in its owner's name."""
SERVED_AGAIN_SECONDS = 5.0
"""At most this often the API server is asked whether it knows a kind by now."""


class Cache:
    """All that was seen of the watched namespaces."""

    def __init__(
        self,
        cluster: Cluster,
        ownership: Ownership,
        namespaces: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cluster = cluster
        self.ownership = ownership
        self.store = Store(ownership)
        self.namespaces = tuple(namespaces) or ("",)
        """The namespaces that are watched; one that is empty is all of them. They may change."""
        self._clock = clock
        self._not_served: dict[Kind, float] = {}
        """Kinds that the API server does not know, and when it was asked last."""
        self._unwatched: set[Kind] = set()
        """Kinds that came to be known later: their watch may never have begun."""
        self._applied: dict[Key, set[tuple[Kind, str]]] = {}
        """What was applied for an owner since the process began."""
        self._foreign: dict[Key, set[tuple[Kind, str]]] = {}
        """Objects without an owner's labels under names that it needs: no watch tells of them."""
        self._claims: dict[tuple[str, str], tuple[float, Json]] = {}
        self._accepted: dict[bytes, float] = {}
        """Digests of what a dry run accepted, and until when that holds."""
        self._dry_runs: dict[bytes, asyncio.Future[None]] = {}
        """Dry runs that are under way."""

    async def sync(self, *namespaces: str) -> set[Key]:
        """List everything in these namespaces, or in all. Return the owners about which that told something new.

        Raises ApiError.
        """
        changed: set[Key] = set()
        for kind in (*self.ownership.owner_labels, *self.ownership.watched, *self.ownership.listed):
            for namespace in namespaces or self.namespaces:
                changed |= await self._sync(kind, namespace)
        if not namespaces:
            self.expire()
        return changed

    def expire(self) -> None:
        """Forget what need not be known any more; to be called about as often as everything is listed."""
        self.store.prune()
        now = self._clock()
        self._claims = {key: claim for key, claim in self._claims.items() if claim[0] > now}
        self._accepted = {digest: until for digest, until in self._accepted.items() if until > now}

    def leave(self, namespace: str) -> None:
        """Forget everything in a namespace that may not be read any more."""
        for kind in (*self.ownership.owner_labels, *self.ownership.watched, *self.ownership.listed):
            self.store.drop(kind, namespace)

    def observe(self, kind: Kind, raw: Mapping[str, Any], *, gone: bool) -> bool:
        """Take in an event of a watch. Return whether it told something new."""
        meta = raw["metadata"]
        self._unwatched.discard(kind)
        if gone:
            return self.store.remove(kind, meta["namespace"], meta["name"], meta["uid"])
        return self.store.put(kind, raw)

    @property
    def not_served(self) -> Collection[Kind]:
        """Kinds that the API server does not know."""
        return self._not_served.keys()

    @property
    def unwatched(self) -> bool:
        """Whether there is a kind whose watch has told nothing since the kind came to be known."""
        return bool(self._unwatched)

    def owner(self, key: Key) -> Json | None:
        """Return the owner itself; None when it does not exist."""
        return self.store.get(*key)

    async def children(self, key: Key, uid: str) -> list[Json]:
        """Return all children but pods. An object under a child's name that is not the owner's is read anew."""
        found, doubtful = [], set(self._foreign.get(key, ()))
        for kind, raw in self.store.made_for(key, self.ownership.child_kinds):
            if controlled_by(raw, uid) and kind not in self._unwatched:
                found.append(raw)
            else:
                doubtful.add((kind, raw["metadata"]["name"]))
        for kind, name in sorted(doubtful, key=str):
            if other := await self._refresh(kind, key, name):
                found.append(other)
        return found

    async def pods(self, key: Key, *, live: bool) -> list[Json]:
        """Return the pods that carry the owner's label: from memory, or with `live` from the API server."""
        if live:
            labels = f"{self.ownership.managed_selector},{self.ownership.owner_labels[key.kind]}={key.name}"
            return await self.cluster.list(Kind.POD, key.namespace, labels=labels)
        return [raw for _, raw in self.store.made_for(key, (Kind.POD,))]

    async def serves(self, kind: Kind) -> bool:
        """Return whether the API server knows the kind."""
        asked = self._not_served.get(kind)
        if asked is not None and self._clock() - asked >= SERVED_AGAIN_SECONDS:
            for namespace in self.namespaces:
                # One that is forbidden says nothing of the others.
                with contextlib.suppress(ApiError):
                    await self._sync(kind, namespace)
        return kind not in self._not_served

    async def claim(self, namespace: str, name: str) -> Json | None:
        """Return a PersistentVolumeClaim; a bound one may have been read BOUND_CLAIM_SECONDS ago."""
        until, known = self._claims.get((namespace, name), (0.0, None))
        if known is not None and self._clock() < until:
            return known
        found = await self.cluster.get(Kind.CLAIM, namespace, name)
        if found is not None and found.get("status", {}).get("phase") == "Bound":
            self._claims[namespace, name] = (self._clock() + BOUND_CLAIM_SECONDS, found)
        return found

    async def storage_class(self, name: str) -> Json | None:
        """Return a StorageClass; None when it does not exist or may not be read."""
        return await self.cluster.get(Kind.STORAGE_CLASS, "", name)

    async def check(self, body: Mapping[str, Any]) -> None:
        """Let the API server judge an object without storing it. Raises Refused, and Conflict as apply() does."""
        digest = self._digest(body)
        while digest in self._dry_runs:
            # It was sent for another owner. Should that fail, this one asks for itself.
            await asyncio.wait([self._dry_runs[digest]])
        if self._accepted.get(digest, -1.0) > self._clock():
            return
        self._dry_runs[digest] = answered = asyncio.get_running_loop().create_future()
        try:
            await self._apply(body, dry_run=True)
            self._accepted[digest] = self._clock() + DRY_RUN_SECONDS
        finally:
            del self._dry_runs[digest]
            answered.set_result(None)

    async def apply(self, body: Mapping[str, Any]) -> None:
        """Apply an object by server-side apply.

        Raises Conflict when the object, or its owner, is not what memory says; memory is right afterwards.
        """
        kind, meta = kind_of(body), body["metadata"]
        owner = self._owner_of(body)
        applied = self._applied.setdefault(owner, set())
        if (kind, meta["name"]) in applied and not self.store.uid(kind, meta["namespace"], meta["name"]):
            # It vanished: by somebody's hand, or because its owner has gone unnoticed, which would happen for ever.
            await self._confirm(owner)
        applied.add((kind, meta["name"]))
        self.store.put(kind, await self._apply(body, dry_run=False))

    async def create_secret(self, body: Mapping[str, Any], entry: str) -> None:
        """Create a Secret with a fresh key under `entry`, unless it exists. Memory holds no Secret."""
        with contextlib.suppress(AlreadyExists):
            await self.cluster.create({**body, "stringData": {entry: secrets.token_urlsafe(KEY_BYTES)}})

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """Delete this very object; one of the same name and another uid stays."""
        left = await self.cluster.delete(kind, namespace, name, uid)
        if left is None:
            self.store.remove(kind, namespace, name, uid)
        else:
            self.store.put(kind, left)

    async def patch_status(self, key: Key, patch: Mapping[str, Any], child: tuple[Kind, str] | None = None) -> None:
        """Write the status of an owner, or of its child. Raises Conflict, with memory brought up to date."""
        kind, name = child or (key.kind, key.name)
        try:
            self.store.put(kind, await self.cluster.patch_status(kind, key.namespace, name, patch))
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            await self._refresh(kind, key, name)
            raise Conflict(409, error.message) from None

    def forget(self, key: Key) -> None:
        """Forget what belongs to an owner that is gone: its objects follow, and not every one's end is told."""
        self._foreign.pop(key, None)
        self._applied.pop(key, None)
        for kind, raw in list(self.store.made_for(key, self.ownership.listed)):
            self.store.remove(kind, key.namespace, raw["metadata"]["name"], raw["metadata"]["uid"])

    async def _apply(self, body: Mapping[str, Any], *, dry_run: bool) -> Json:
        kind, meta = kind_of(body), body["metadata"]
        uid = self.store.uid(kind, meta["namespace"], meta["name"])
        try:
            return await self.cluster.apply(body, uid=uid, dry_run=dry_run)
        except Conflict:
            await self._refresh(kind, self._owner_of(body), meta["name"])
            raise
        except ApiError as error:
            if error.status == 404 and kind in self.ownership.optional:
                self._not_served.setdefault(kind, 0.0)
            raise

    async def _confirm(self, key: Key) -> None:
        """Raise Conflict unless the owner is still the one that memory knows."""
        before = self.store.uid(*key)
        found = await self._refresh(key.kind, key, key.name)
        if found is None or found["metadata"]["uid"] != before:
            raise Conflict(409, f"{key} is another object by now")

    async def _refresh(self, kind: Kind, key: Key, name: str) -> Json | None:
        """Read one object from the API server, and remember whether it is the owner's or foreign."""
        foreign = self._foreign.setdefault(key, set())
        foreign.discard((kind, name))
        listed = self.store.begin_list()
        found = await self.cluster.list(kind, key.namespace, name=name)
        uid = self.store.uid(kind, key.namespace, name)
        if uid and (not found or found[0]["metadata"]["uid"] != uid):
            self.store.remove(kind, key.namespace, name, uid)
        if found and self.ownership.owner_of(kind, found[0]["metadata"]) == key:
            self.store.put(kind, found[0], listed)
        elif found:
            foreign.add((kind, name))
        if not foreign:
            del self._foreign[key]
        return found[0] if found else None

    async def _sync(self, kind: Kind, namespace: str) -> set[Key]:
        """List one kind in one namespace. Return the owners about which that told something new."""
        changed: set[Key] = set()
        labels = "" if self.ownership.is_owner(kind) else self.ownership.managed_selector
        found: set[tuple[str, str]] = set()
        version, listed = 0, self.store.begin_list()
        try:
            async for page, as_of in self.cluster.pages(kind, namespace, labels=labels):
                version = as_of
                for raw in page:
                    meta = raw["metadata"]
                    found.add((meta["namespace"], meta["name"]))
                    if self.store.put(kind, raw, listed) and (owner := self.ownership.owner_of(kind, meta)):
                        changed.add(owner)
        except NotServed:
            if kind not in self.ownership.optional:
                raise
            self._not_served[kind] = self._clock()
            return changed | self.store.drop(kind, namespace)
        if self._not_served.pop(kind, None) is not None:
            self._unwatched.add(kind)
        return changed | self.store.keep_only(kind, namespace, found, version, listed)

    def _owner_of(self, body: Mapping[str, Any]) -> Key:
        """Return the owner of an object of ours."""
        owner = self.ownership.owner_of(kind_of(body), body["metadata"])
        if owner is None:
            raise ValueError(f"{body['kind']} {body['metadata']['name']} carries no owner's label")
        return owner

    def _digest(self, body: Mapping[str, Any]) -> bytes:
        """Return what is the same for the same object of another owner. What a ConfigMap says is not judged."""
        meta = body["metadata"]
        content = {key: value for key, value in body.items() if key not in ("metadata", "data")}
        text = json.dumps([meta["namespace"], content], sort_keys=True)
        for own in self.ownership.private_names(self._owner_of(body).name, meta["ownerReferences"][0]["uid"]):
            # JSON has no such character of its own.
            text = text.replace(own, "\0")
        return hashlib.sha256(text.encode()).digest()


def controlled_by(raw: Mapping[str, Any], uid: str) -> bool:
    """Return whether an object's controller is the one of this uid."""
    return any(o.get("controller") and o.get("uid") == uid for o in raw["metadata"].get("ownerReferences", []))
