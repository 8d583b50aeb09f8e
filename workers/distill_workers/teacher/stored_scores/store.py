"""The store of scores: what a teacher has said of the data set's responses, kept on the output volume and read again.

A folder for each identity (identity.py) holds teacher.json, which says whose scores they are, and segments
(segment.py). A score is found by a SHA-256 of identity, prompt and response, and read with the checksum that it
was written with: what was cut off, has a flipped bit or belongs to another teacher is no match, and its response is
scored again. Writers share a folder without a lock, since each names its segments for itself; what two of them score at
once is there twice, and the earlier is read. Memory holds the index, some 400 bytes an entry, and what is not written
yet: where that fails it is tried again, with HELD_SEGMENTS of values at most.

A store that is only read has no teacher to score what it lacks, so what a volume does not give at the moment is an
error and not a miss.

Only responses of the data set are kept, so the folder has an entry for each of its rows at most, but for those scored
twice: of 8 + 8 topK bytes a token and 76 more. Nothing is removed; a folder that no job needs any more may be.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from distill_workers.teacher.protocol import Observer, Scores
from distill_workers.teacher.stored_scores.identity import ScoreIdentity
from distill_workers.teacher.stored_scores.label import folder_of, write_label
from distill_workers.teacher.stored_scores.segment import (
    Damaged,
    Entry,
    decoded,
    encoded,
    read_entry,
    read_table,
    remove_abandoned,
    segments_of,
    write_segment,
)

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 << 20
"""Values after which a segment is written."""
FLUSH_SECONDS = 300.0
"""Time after which one is written with fewer, and after which a write that failed is tried again: what a kill loses is
scored again."""
HELD_SEGMENTS = 4
"""Segments of values that memory holds at most where they cannot be written; what comes then is not stored."""

Place = tuple[int, int, int]
"""Number of the segment, and place and size of the entry in it, bytes."""


class ScoreStore:
    """The stored scores of one teacher. `open` comes first, and `close` writes what is left."""

    def __init__(
        self,
        root: Path,
        teacher: str,
        identity: ScoreIdentity,
        observer: Observer,
        *,
        model: str = "",
        read_only: bool = False,
    ) -> None:
        """`root` is the folder of all stores, `teacher` the name by which the job calls it, `model` its path or hub
        id, if it has one."""
        self.folder = folder_of(root, identity)
        self.identity, self.read_only = identity, read_only
        self._root, self._model, self._teacher, self._observer = root, model, teacher, observer
        self._segments: list[Path] = []
        self._index: dict[bytes, tuple[Place, ...]] = {}
        self._unwritten: dict[bytes, bytes] = {}
        self.unwritten_bytes = 0
        """Of the values that wait for the next segment."""
        self._being_written: dict[bytes, bytes] = {}
        self._bytes_being_written = 0
        # Of each response that is looked up at this moment; without those who hold it, a lock is gone.
        self._in_flight: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._flushing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        """Of the next flush, where something waits for it: hits alone, or nothing at all, may come meanwhile."""
        self._failing = False
        """Whether the last write failed."""

    async def open(self) -> None:
        """Read the tables of all segments. A folder that cannot be had is a store of nothing, which the log says; of a
        store that is only read, raises OSError."""
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            if self.read_only:
                raise
            self._failed(error)
        log.info("teacher %s: %d responses have stored scores in %s", self._teacher, len(self), self.folder)

    async def close(self) -> None:
        """Write what is not written yet; what cannot be is lost, and counted."""
        await self.flush()
        self._stop_timer()
        if self._unwritten:
            self._count("unwritten", len(self._unwritten))

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

    def has(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bool:
        """Return whether a response has an entry, which is not read."""
        key = self._key(prompt_ids, response_ids)
        return key in self._index or key in self._unwritten or key in self._being_written

    async def find(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Scores | None:
        """Return the scores of a response as the teacher gave them, to the bit; None where they are not stored, or
        damaged. Of a store that is only read, raises OSError."""
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
        """Keep the scores of a response, unless it has some or too many could not be written."""
        if self.has(prompt_ids, response_ids):
            return
        values = encoded(scores)
        held = self.unwritten_bytes + self._bytes_being_written + len(values)
        if self.read_only or (self._failing and held > HELD_SEGMENTS * SEGMENT_BYTES):
            self._count("unwritten")
            return
        self._unwritten[self._key(prompt_ids, response_ids)] = values
        self.unwritten_bytes += len(values)
        self._start_timer()
        if self.unwritten_bytes >= SEGMENT_BYTES and not self._failing:
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
        self._stop_timer()
        self._being_written, self._unwritten = self._unwritten, {}
        self._bytes_being_written, self.unwritten_bytes = self.unwritten_bytes, 0
        try:
            path, table = await asyncio.to_thread(self._write, self._being_written)
            self._add_segment(path, table)
            if self._failing:
                log.info("teacher %s: scores are stored again", self._teacher)
            self._failing = False
        except OSError as error:
            self._failed(error)
            self._unwritten = self._being_written | self._unwritten
            self.unwritten_bytes += self._bytes_being_written
            self._start_timer()
        finally:
            self._being_written, self._bytes_being_written, self._flushing = {}, 0, None

    def _write(self, values: Mapping[bytes, bytes]) -> tuple[Path, list[Entry]]:
        write_label(self._root, self.identity, self._model)  # also where the folder could not be made before
        return write_segment(self.folder, values)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._flush_in_time)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _flush_in_time(self) -> None:
        self._timer = None
        if self._flushing is not None:  # for all this time
            self._start_timer()
        elif self._unwritten:
            self._flushing = asyncio.create_task(self._flush())

    def _open(self) -> None:
        for path in segments_of(self.folder):
            try:
                whole, cut_off = read_table(path)
            except (OSError, Damaged) as error:
                if self.read_only and isinstance(error, OSError):
                    raise
                whole, cut_off = [], 1
                log.warning("%s is refused, its responses are scored again: %s", path, error)
            self._add_segment(path, whole)
            if cut_off:
                self._count("refused", cut_off)
        if not self.read_only:
            write_label(self._root, self.identity, self._model)
            remove_abandoned(self.folder)

    def _add_segment(self, path: Path, table: Iterable[Entry]) -> None:
        self._segments.append(path)
        for key, offset, size in table:
            self._index[key] = (*self._index.get(key, ()), (len(self._segments) - 1, offset, size))

    def _read(self, key: bytes, place: Place) -> bytes | None:
        segment, offset, size = place
        try:
            return read_entry(self._segments[segment], key, offset, size)
        except OSError as error:
            if self.read_only:
                raise
            log.warning("%s is refused and scored again: %s", self._segments[segment], error)
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

    def _failed(self, error: OSError) -> None:
        """Say once that nothing can be stored, until it can be again."""
        if not self._failing:
            log.warning(
                "teacher %s: no scores can be stored: %s; the run goes on, and it is tried again every %.0f s",
                self._teacher,
                error,
                FLUSH_SECONDS,
            )
        self._failing = True

    def _count(self, result: str, amount: int = 1) -> None:
        self._observer.add("distill_stored_scores", amount, result=result, teacher=self._teacher)
