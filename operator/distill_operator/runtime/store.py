"""What is known of the cluster: the newest version seen of every object, found by its name and by its owner.

Objects come from lists, from watches and from the answers to our own writes, in any order and more than once. A
resourceVersion decides which is newer, and a uid that was seen to go never comes back, but by a list: a list that was
begun later than something was learnt overrules it, also backwards, as after etcd was restored from a snapshot. Bodies
are kept as JSON text without what nobody reads: a thousand jobs fit into 40 MB, as Python's dicts they would need ten
times as much.
"""

import json
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill_operator.kinds import Kind
from distill_operator.runtime.ownership import Key, Ownership

Json = dict[str, Any]
Place = tuple[Kind, str, str]
"""Kind, namespace, name."""


@dataclass(frozen=True, slots=True)
class _Held:
    version: int
    uid: str
    owner: Key | None
    text: bytes
    learnt: int
    """When, by the store's count of lists."""


class Store:
    """An index of objects without input or output."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership
        self._held: dict[Place, _Held] = {}
        self._by_owner: defaultdict[Key | None, set[Place]] = defaultdict(set)
        self._gone: dict[str, int] = {}
        """uids of objects that have gone, and when that was learnt."""
        self._lists = 0
        self._pruned = 0
        self.went_back = 0
        """How many objects a list showed in an older version than was known."""

    def __len__(self) -> int:
        return len(self._held)

    def begin_list(self) -> int:
        """Return a mark for a list that begins now: what was learnt before it, the list overrules."""
        self._lists += 1
        return self._lists

    def put(self, kind: Kind, raw: Mapping[str, Any], listed: int | None = None) -> bool:
        """Keep an object, which came by the list of a mark if there is one; return False when it says nothing new."""
        meta = raw["metadata"]
        place = (kind, meta["namespace"], meta["name"])
        version, uid = version_of(meta.get("resourceVersion")), meta.get("uid", "")
        known = self._held.get(place)
        if known is not None and known.version == version:
            return False
        if known is not None and known.version > version:
            if listed is None or known.learnt >= listed:
                return False
            self.went_back += 1
        if uid in self._gone:
            if listed is None or self._gone[uid] >= listed:
                return False
            del self._gone[uid]
        if known is not None:
            self._by_owner[known.owner].discard(place)
        text = json.dumps(_kept(kind, raw), separators=(",", ":")).encode()
        held = _Held(version, uid, self._ownership.owner_of(kind, meta), text, self._lists)
        self._held[place] = held
        self._by_owner[held.owner].add(place)
        return True

    def remove(self, kind: Kind, namespace: str, name: str, uid: str) -> bool:
        """Forget this very object, which is gone; one of the same name and another uid stays.

        Return False when it was not known.
        """
        self._gone[uid] = self._lists
        place = (kind, namespace, name)
        held = self._held.get(place)
        if held is None or held.uid != uid:
            return False
        self._drop(place, held)
        return True

    def drop(self, kind: Kind, namespace: str) -> set[Key]:
        """Forget all objects of a kind that is not served, without taking them for gone. Return their owners."""
        lost = [(place, held) for place, held in self._held.items() if place[0] is kind and namespace in ("", place[1])]
        for place, held in lost:
            self._drop(place, held)
        return {held.owner for _, held in lost if held.owner is not None}

    def _drop(self, place: Place, held: _Held) -> None:
        del self._held[place]
        self._by_owner[held.owner].discard(place)
        if not self._by_owner[held.owner]:
            del self._by_owner[held.owner]

    def keep_only(
        self, kind: Kind, namespace: str, names_found: set[tuple[str, str]], version: int, listed: int
    ) -> set[Key]:
        """Forget what the whole list of a mark, as of `version`, lacks, unless it is newer. Return the owners of it."""
        lost = [
            (place, held)
            for place, held in self._held.items()
            if place[0] is kind and namespace in ("", place[1]) and place[1:] not in names_found
            if held.learnt < listed or held.version <= version
        ]
        for (_, at, name), held in lost:
            self.went_back += held.version > version
            self.remove(kind, at, name, held.uid)
        return {held.owner for _, held in lost if held.owner is not None}

    def prune(self) -> None:
        """Forget the uids that had gone before the last call, of which no late event can come any more."""
        self._gone = {uid: learnt for uid, learnt in self._gone.items() if learnt >= self._pruned}
        self._pruned = self.begin_list()

    def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """Return an object by its name; None when it is not known."""
        held = self._held.get((kind, namespace, name))
        return _read(kind, held) if held else None

    def uid(self, kind: Kind, namespace: str, name: str) -> str:
        """Return the uid of an object; empty when it is not known."""
        held = self._held.get((kind, namespace, name))
        return held.uid if held else ""

    def made_for(self, owner: Key, kinds: Container[Kind]) -> Iterator[tuple[Kind, Json]]:
        """Yield the objects of these kinds that were made for an owner, in order of kinds and names."""
        for place in sorted(self._by_owner.get(owner, ()), key=lambda place: (place[0].name, place[2])):
            if place[0] in kinds and not self._ownership.is_owner(place[0]):
                yield place[0], _read(place[0], self._held[place])

    def owners(self) -> set[Key]:
        """Return all known owners."""
        return {
            held.owner
            for (kind, _, _), held in self._held.items()
            if self._ownership.is_owner(kind) and held.owner is not None
        }


def version_of(text: str | None) -> int:
    """Return a resourceVersion as a number; they grow over all kinds of one API server."""
    return int(text) if text and text.isdecimal() else 0


def _read(kind: Kind, held: _Held) -> Json:
    found: Json = json.loads(held.text)
    return {**found, "apiVersion": kind.value.api_version, "kind": kind.value.kind}


def _kept(kind: Kind, raw: Mapping[str, Any]) -> Json:
    meta = {key: value for key, value in raw["metadata"].items() if key not in ("managedFields", "selfLink")}
    kept = {key: raw[key] for key in ("spec", "data", "status") if key in raw}
    if kind is Kind.POD:
        kept["spec"] = {"nodeName": raw.get("spec", {}).get("nodeName", "")}
    return {"metadata": meta, **kept}
