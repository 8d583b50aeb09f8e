"""The store of scores: what a teacher has said of the data set's responses, kept on the output volume and read again.

A folder for each identity (score_identity.py) holds teacher.json, which says whose scores they are, and segments. A
segment is written aside, synced and renamed, and never changed: a header, a table of keys with their places, and the
entries. A key is a SHA-256 of identity, prompt and response; an entry is a SHA-256 of key and values, and the values.
So whatever was cut off, has a flipped bit or belongs to another teacher is no match, and its response is scored again.
Writers share a folder without a lock, since each names its segments for itself; what two score at once is there twice,
and the earlier is read. Memory holds the index, some 400 bytes an entry, and the values that are not written yet.

Only responses of the data set are kept, so the folder has an entry for each of its rows at most, but for those scored
twice: of 8 + 8 topK bytes a token and 76 more. Nothing is removed; a folder that no job needs any more may be.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from distill_api.spec.job_spec import Spec
from distill_api.teacher.dataset_scores import TeacherLogprobs
from distill_workers.failures import ConfigurationError
from distill_workers.run_folder.atomic_file import sync_folder
from distill_workers.teacher.protocol import Observer, Scores
from distill_workers.teacher.score_identity import ScoreIdentity, identity_of

log = logging.getLogger(__name__)

FOLDER = "teacher_scores"
"""Beside the run folders on the output volume; no job can have a name with an underscore."""
SEGMENT, ASIDE, LABEL = ".scores", ".tmp", "teacher.json"
HEADER = struct.Struct("<8sI32s")
"""MAGIC, the number of entries, and a SHA-256 of the table."""
MAGIC = b"scores 1"
ENTRY = struct.Struct("<32sQI")
"""Of the table: a key, the place of its entry in the file, and the entry's size, bytes."""
DIGEST_BYTES = 32
SEGMENT_BYTES = 16 << 20
"""Values after which a segment is written."""
FLUSH_SECONDS = 300.0
"""Time after which one is written with fewer: what a kill loses is scored again."""
ABANDONED_SECONDS = 3600.0
"""Age of a file aside whose writer has ended; one that is alive writes for seconds."""

Place = tuple[int, int, int]
"""Number of the segment, and place and size of the entry in it, bytes."""


class _Damaged(Exception):
    """Raised for a segment whose table cannot be believed."""


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
        return None if values is None else _decoded(values, len(response_ids), self.identity.top_k)

    async def add(self, prompt_ids: Sequence[int], response_ids: Sequence[int], scores: Scores) -> None:
        """Keep the scores of a response, unless it has some or the volume was full."""
        key = self._key(prompt_ids, response_ids)
        if key in self._index or key in self._unwritten or key in self._being_written:
            return
        if not self._writable:
            self._count("unwritten")
            return
        self._unwritten[key] = values = _encoded(scores)
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
            path, places = await asyncio.to_thread(self._write, self._being_written)
            self._segments.append(path)
            for key, (offset, size) in places.items():
                self._index[key] = (*self._index.get(key, ()), (len(self._segments) - 1, offset, size))
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
                _publish(self.folder / LABEL, [json.dumps(asdict(self.identity), indent=1).encode()])
        for path in sorted(self.folder.glob(f"*{SEGMENT}")):  # by the time that they were written
            self._segments.append(path)
            size, cut_off = path.stat().st_size, 0
            try:
                for key, offset, length in _table(path, size):
                    if offset + length > size:
                        cut_off += 1
                        continue
                    self._index[key] = (*self._index.get(key, ()), (len(self._segments) - 1, offset, length))
            except (OSError, _Damaged) as error:
                cut_off = 1
                log.warning("%s is refused, its responses are scored again: %s", path, error)
            if cut_off:
                self._count("refused", cut_off)

    def _read(self, key: bytes, place: Place) -> bytes | None:
        """Return the values of an entry; None where they are not those that were written."""
        segment, offset, size = place
        try:
            with self._segments[segment].open("rb") as file:
                file.seek(offset)
                entry = file.read(size)
        except OSError as error:
            log.warning("%s: %s", self._segments[segment], error)
            return None
        digest, values = entry[:DIGEST_BYTES], entry[DIGEST_BYTES:]
        return values if digest == hashlib.sha256(key + values).digest() else None

    def _write(self, values: dict[bytes, bytes]) -> tuple[Path, dict[bytes, tuple[int, int]]]:
        """Write a segment, and return it with place and size of each entry, bytes."""
        offset, places = HEADER.size + len(values) * ENTRY.size, dict[bytes, tuple[int, int]]()
        for key, of_key in values.items():
            places[key] = (offset, DIGEST_BYTES + len(of_key))
            offset += DIGEST_BYTES + len(of_key)
        table = b"".join(ENTRY.pack(key, *place) for key, place in places.items())
        path = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{SEGMENT}"
        entries = (hashlib.sha256(key + of_key).digest() + of_key for key, of_key in values.items())
        _publish(path, [HEADER.pack(MAGIC, len(values), hashlib.sha256(table).digest()), table, *entries])
        return path, places

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


def _table(path: Path, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Return key, place and size of each entry, bytes, of a segment of `size` bytes. Raises _Damaged."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise _Damaged("it is cut off in its header")
        magic, entries, digest = HEADER.unpack(header)
        if magic != MAGIC or HEADER.size + entries * ENTRY.size > size:
            raise _Damaged("it is cut off in its table, or no segment of this release")
        table = file.read(entries * ENTRY.size)
    if hashlib.sha256(table).digest() != digest:
        raise _Damaged("its table is not as it was written")
    return ((key, place, length) for key, place, length in ENTRY.iter_unpack(table))


def _publish(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that nobody sees before it is whole, under a name of its own until then."""
    aside = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}{ASIDE}")
    try:
        with aside.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path.parent)


def _encoded(scores: Scores) -> bytes:
    parts = [np.array(scores.logprobs, dtype="<f8").tobytes()]  # JSON has any float64
    if scores.top_ids is not None and scores.top_logprobs is not None:
        parts += [scores.top_ids.astype("<i4").tobytes(), scores.top_logprobs.astype("<f4").tobytes()]
    return b"".join(parts)


def _decoded(values: bytes, tokens: int, top_k: int | None) -> Scores:
    logprobs = np.frombuffer(values, "<f8", tokens).tolist()
    if top_k is None:
        return Scores(logprobs, None, None)
    shape, count = (tokens, top_k), tokens * top_k
    ids = np.frombuffer(values, "<i4", count, 8 * tokens).reshape(shape)
    return Scores(logprobs, ids, np.frombuffer(values, "<f4", count, 8 * tokens + 4 * count).reshape(shape))
