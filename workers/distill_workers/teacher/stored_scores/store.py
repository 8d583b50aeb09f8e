"""The store of scores: what a teacher has said of the data set's responses, kept on the output volume and read again.

A folder for each identity (identity.py) holds teacher.json, which says whose scores they are, and segments
(segment.py). A score is found by a SHA-256 of identity, prompt and response, and read with the checksum that it
was written with: what was cut off, has a flipped bit or belongs to another teacher is no match, and its response is
scored again. Writers share a folder without a lock, since each names its segments for itself; what two of them score at
once is there twice, and the earlier is read. Memory holds the index, some 400 bytes an entry, and what is not written
yet.

Only responses of the data set are kept, so the folder has an entry for each of its rows at most, but for those scored
twice: of 8 + 8 topK bytes a token and 76 more. Nothing is removed; a folder that no job needs any more may be.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from distill_api.spec.job_spec import Spec
from distill_api.teacher.dataset_scores import TeacherLogprobs
from distill_workers.failures import ConfigurationError
from distill_workers.teacher.protocol import Observer, Scores
from distill_workers.teacher.stored_scores.identity import ScoreIdentity, identity_of
from distill_workers.teacher.stored_scores.segment import (
    ASIDE,
    SEGMENT,
    Damaged,
    Entry,
    decoded,
    encoded,
    publish,
    read_entry,
    read_table,
    write_segment,
)

log = logging.getLogger(__name__)

FOLDER = "teacher_scores"
"""Beside the run folders on the output volume; no job can have a name with an underscore."""
LABEL = "teacher.json"
SEGMENT_BYTES = 16 << 20
"""Values after which a segment is written."""
FLUSH_SECONDS = 300.0
"""Time after which one is written with fewer: what a kill loses is scored again."""
ABANDONED_SECONDS = 3600.0
"""Age of a file aside whose writer has ended; one that is alive writes for seconds."""

Place = tuple[int, int, int]
"""Number of the segment, and place and size of the entry in it, bytes."""


class ScoreStore:
    """The stored scores of one teacher. `open` comes first, and a last `flush` writes what is left."""

    def __init__(
        self, root: Path, teacher: str, identity: ScoreIdentity, observer: Observer, *, read_only: bool = False
    ) -> None:
        """`root` is FOLDER of the output volume, `teacher` the name by which the job calls it."""
        self.folder = root / identity.digest[:32]
        self.identity, self.read_only = identity, read_only
        self._teacher, self._observer, self._writable = teacher, observer, not read_only
        self._segments: list[Path] = []
        self._index: dict[bytes, tuple[Place, ...]] = {}
        self._unwritten: dict[bytes, bytes] = {}
        self.unwritten_bytes = 0
        """Of the values that wait for the next segment."""
        self._being_written: dict[bytes, bytes] = {}
        # Of each response that is looked up at this moment; without those who hold it, a lock is gone.
        self._in_flight: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._flushed_at = time.monotonic()
        self._flushing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the tables of all segments. A folder that cannot be had is a store of nothing, which the log says."""
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            self._stop_writing(error)
        log.info("teacher %s: %d responses have stored scores in %s", self._teacher, len(self), self.folder)

    def __len__(self) -> int:
        """Responses whose scores are on disk."""
        return len(self._index)

    async def scored_once(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], score: Callable[[], Awaitable[Scores]]
    ) -> Scores:
        """Return the scores of a response: those that are stored, else what `score` returns, which is kept.

        A response that is in flight twice is scored once. Raises what `score` raises.
        """
        async with self._in_flight.setdefault(self._key(prompt_ids, response_ids), asyncio.Lock()):
            scores = await self.find(prompt_ids, response_ids)
            if scores is None:
                scores = await score()
                await self.add(prompt_ids, response_ids, scores)
            return scores

    async def find(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Scores | None:
        """Return the scores of a response as the teacher gave them, to the bit; None where they are not stored."""
        scores = await self.read(prompt_ids, response_ids)
        self._count("miss" if scores is None else "hit")
        return scores

    async def read(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Scores | None:
        """Return what `find` does, but count neither a hit nor a miss."""
        key = self._key(prompt_ids, response_ids)
        values = self._unwritten.get(key) or self._being_written.get(key)
        for place in () if values is not None else self._index.get(key, ()):
            values = await asyncio.to_thread(self._read, key, place)
            if values is not None:
                break
            self._refuse(key, place)
        return None if values is None else decoded(values, len(response_ids), self.identity.top_k)

    async def add(self, prompt_ids: Sequence[int], response_ids: Sequence[int], scores: Scores) -> None:
        """Keep the scores of a response, unless it has some or the volume was full."""
        key = self._key(prompt_ids, response_ids)
        if key in self._index or key in self._unwritten or key in self._being_written:
            return
        if not self._writable:
            self._count("unwritten")
            return
        self._unwritten[key] = values = encoded(scores)
        self.unwritten_bytes += len(values)
        if self.unwritten_bytes >= SEGMENT_BYTES or time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            await self.flush()

    async def flush(self) -> None:
        """Write a segment of what is not written yet; what is added meanwhile waits for the next."""
        while self._flushing is not None:
            await asyncio.shield(self._flushing)
        if self._unwritten:
            # A task of its own: a sample that is cancelled must not leave a segment that no index has.
            self._flushing = asyncio.create_task(self._flush())
            await asyncio.shield(self._flushing)

    async def _flush(self) -> None:
        self._being_written, self._unwritten, self.unwritten_bytes = self._unwritten, {}, 0
        self._flushed_at = time.monotonic()
        try:
            path, table = await asyncio.to_thread(write_segment, self.folder, self._being_written)
            self._add_segment(path, table)
        except OSError as error:
            self._stop_writing(error)
            self._count("unwritten", len(self._being_written))
        finally:
            self._being_written, self._flushing = {}, None

    def _open(self) -> None:
        if not self.read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            for aside in self.folder.glob(f"*{ASIDE}"):
                with contextlib.suppress(OSError):  # another reader was faster
                    if time.time() - aside.stat().st_mtime > ABANDONED_SECONDS:
                        aside.unlink()
            if not (self.folder / LABEL).exists():
                publish(self.folder / LABEL, [json.dumps(asdict(self.identity), indent=1).encode()])
        for path in sorted(self.folder.glob(f"*{SEGMENT}")):  # by the time that they were written
            try:
                whole, cut_off = read_table(path)
            except (OSError, Damaged) as error:
                whole, cut_off = [], 1
                log.warning("%s is refused, its responses are scored again: %s", path, error)
            self._add_segment(path, whole)
            if cut_off:
                self._count("refused", cut_off)

    def _add_segment(self, path: Path, table: Iterable[Entry]) -> None:
        self._segments.append(path)
        for key, offset, size in table:
            self._index[key] = (*self._index.get(key, ()), (len(self._segments) - 1, offset, size))

    def _read(self, key: bytes, place: Place) -> bytes | None:
        segment, offset, size = place
        try:
            return read_entry(self._segments[segment], key, offset, size)
        except OSError as error:
            log.warning("%s: %s", self._segments[segment], error)
            return None

    def _key(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
        found = hashlib.sha256(f"{self.identity.digest}/{len(prompt_ids)}/{len(response_ids)}/".encode())
        found.update(np.array([*prompt_ids, *response_ids], dtype="<i8").tobytes())
        return found.digest()

    def _refuse(self, key: bytes, place: Place) -> None:
        """Forget an entry that is damaged; another reader of it may have done so already."""
        if place in (places := self._index.get(key, ())):
            self._index[key] = left = tuple(other for other in places if other != place)
            if not left:
                del self._index[key]
            self._count("refused")

    def _stop_writing(self, error: OSError) -> None:
        if self._writable:
            log.warning(
                "teacher %s: no more scores are stored: %s; the run goes on, and later epochs ask the teacher again",
                self._teacher,
                error,
            )
        self._writable = False

    def _count(self, result: str, amount: int = 1) -> None:
        self._observer.add("distill_stored_scores", amount, result=result, teacher=self._teacher)


def stores_of_job(spec: Spec, student_tokens: int, observer: Observer) -> dict[str, ScoreStore]:
    """Return the store of each teacher of a job, by name; none where it scores everything anew.

    Without a live teacher its files may be gone too: then it is the one whose scores are there under its name. Raises
    ConfigurationError where those are several.
    """
    how = spec.objective.teacher_logprobs
    if how is TeacherLogprobs.LIVE:
        return {}
    root, read_only = Path(spec.output.path) / FOLDER, how is TeacherLogprobs.PRECOMPUTED
    stores = {}
    for teacher in spec.all_teachers:
        identity = identity_of(spec, teacher, student_tokens)
        if read_only and not identity.weights:
            there = [found for found in stored_identities(root) if replace(found, weights="") == identity]
            if len(there) > 1:
                raise ConfigurationError(
                    f"{root} has {len(there)} stores of teacher {identity.teacher} with different weights, and no "
                    f"{teacher.path}.model/config.json is here to tell which is meant: mount the teacher's files, or "
                    "remove the other stores (teacher.json in each says whose it is)"
                )
            identity = there[0] if there else identity
        stores[teacher.name] = ScoreStore(root, teacher.name, identity, observer, read_only=read_only)
    return stores


def stored_identities(root: Path) -> list[ScoreIdentity]:
    """Return the identities of which there are stores."""
    found = []
    for label in sorted(root.glob(f"*/{LABEL}")):
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # what is damaged belongs to nobody
            found.append(ScoreIdentity.of_fields(json.loads(label.read_text(encoding="utf-8"))))
    return found
