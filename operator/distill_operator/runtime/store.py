"""What is known of the cluster: the newest version seen of every object, found by its name and by its job.

Objects come from lists, from watches and from the answers to our own writes, in any order and more than once. A
resourceVersion decides which is newer, and a uid that was seen to go never comes back. Bodies are kept as JSON text
without what nobody reads: a thousand jobs fit into 40 MB, as Python's dicts they would need ten times as much.
"""

import json
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill_api import names
from distill_operator.runtime.kinds import Kind
from distill_operator.runtime.work_queue import Key

Json = dict[str, Any]
OWNERS = frozenset({Kind.DISTILLATION_JOB, Kind.TEACHER})
Place = tuple[Kind, str, str]
"""Kind, namespace, name."""


@dataclass(frozen=True, slots=True)
class _Held:
    version: int
    uid: str
    job: Key
    text: bytes


class Store:
    """An index without input or output."""

    def __init__(self) -> None:
        self._held: dict[Place, _Held] = {}
        self._by_job: defaultdict[Key, set[Place]] = defaultdict(set)
        self._gone: dict[str, bool] = {}
        """uids of what has gone; True when that was seen since the last prune()."""

    def __len__(self) -> int:
        return len(self._held)

    def put(self, kind: Kind, raw: Mapping[str, Any]) -> bool:
        """False when it says nothing new."""
        meta = raw["metadata"]
        place = (kind, meta["namespace"], meta["name"])
        version, uid = version_of(meta.get("resourceVersion")), meta.get("uid", "")
        known = self._held.get(place)
        if uid in self._gone or (known is not None and known.version >= version):
            return False
        if known is not None:
            self._by_job[known.job].discard(place)
        held = _Held(version, uid, job_of(kind, meta), json.dumps(_kept(kind, raw), separators=(",", ":")).encode())
        self._held[place] = held
        self._by_job[held.job].add(place)
        return True

    def revive(self, uid: str) -> None:
        """It is there after all."""
        self._gone.pop(uid, None)

    def remove(self, kind: Kind, namespace: str, name: str, uid: str) -> bool:
        """This very object is gone; one of the same name and another uid stays. False when it was not known."""
        self._gone[uid] = True
        place = (kind, namespace, name)
        held = self._held.get(place)
        if held is None or held.uid != uid:
            return False
        self._drop(place, held)
        return True

    def drop(self, kind: Kind, namespace: str) -> set[Key]:
        """Of a kind that is not served nothing is known, not even that it is gone. The jobs that had some."""
        lost = [(place, held) for place, held in self._held.items() if place[0] is kind and namespace in ("", place[1])]
        for place, held in lost:
            self._drop(place, held)
        return {held.job for _, held in lost}

    def _drop(self, place: Place, held: _Held) -> None:
        del self._held[place]
        self._by_job[held.job].discard(place)
        if not self._by_job[held.job]:
            del self._by_job[held.job]

    def keep_only(self, kind: Kind, namespace: str, names_found: set[tuple[str, str]], version: int) -> set[Key]:
        """After a whole list, as of `version`: what it lacks is gone, unless it is newer. The jobs of what is gone."""
        lost = [
            (place, held)
            for place, held in self._held.items()
            if place[0] is kind and namespace in ("", place[1]) and place[1:] not in names_found
            if held.version <= version
        ]
        for (_, at, name), held in lost:
            self.remove(kind, at, name, held.uid)
        return {held.job for _, held in lost}

    def prune(self) -> None:
        """Called now and then: a uid that went two calls ago is heard of no more."""
        self._gone = {uid: False for uid, fresh in self._gone.items() if fresh}

    def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        held = self._held.get((kind, namespace, name))
        return _read(kind, held) if held else None

    def uid(self, kind: Kind, namespace: str, name: str) -> str:
        """Empty for what is not known."""
        held = self._held.get((kind, namespace, name))
        return held.uid if held else ""

    def of_job(self, key: Key, kinds: Container[Kind]) -> Iterator[tuple[Kind, Json]]:
        """What was made for a job of these kinds, in order of kinds and names."""
        for place in sorted(self._by_job.get(key, ()), key=lambda place: (place[0].name, place[2])):
            if place[0] in kinds and place[0] not in OWNERS:
                yield place[0], _read(place[0], self._held[place])

    def owners(self) -> set[Key]:
        """All jobs and Teachers."""
        return {held.job for (kind, _, _), held in self._held.items() if kind in OWNERS}


def version_of(text: str | None) -> int:
    """resourceVersions are numbers that grow, over all kinds of one API server."""
    return int(text) if text and text.isdecimal() else 0


def job_of(kind: Kind, meta: Mapping[str, Any]) -> Key:
    """The job, or the Teacher, that an object is or was made for: by label, as pods are owned by other controllers."""
    namespace, labels = meta["namespace"], meta.get("labels") or {}
    if kind is Kind.TEACHER:
        return Key.of_teacher(namespace, meta["name"])
    if kind is not Kind.DISTILLATION_JOB and names.LABEL_SHARED_TEACHER in labels:
        return Key.of_teacher(namespace, labels[names.LABEL_SHARED_TEACHER])
    return Key(namespace, meta["name"] if kind is Kind.DISTILLATION_JOB else labels.get(names.LABEL_JOB, ""))


def _read(kind: Kind, held: _Held) -> Json:
    found: Json = json.loads(held.text)
    return {**found, "apiVersion": kind.value.api_version, "kind": kind.value.kind}


def _kept(kind: Kind, raw: Mapping[str, Any]) -> Json:
    meta = {key: value for key, value in raw["metadata"].items() if key not in ("managedFields", "selfLink")}
    kept = {key: raw[key] for key in ("spec", "data", "status") if key in raw}
    if kind is Kind.POD:
        kept["spec"] = {"nodeName": raw.get("spec", {}).get("nodeName", "")}
    return {"metadata": meta, **kept}
