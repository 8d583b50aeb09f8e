"""Segments: files of stored scores, each written aside, synced and renamed, and never changed.

A segment is a header, a table of keys with their places, and the entries. An entry is a SHA-256 of its key and values,
and the values, so that whatever is read is what was written under that key, or nothing.
"""

import contextlib
import hashlib
import os
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distill_workers.run_folder.atomic_file import sync_folder
from distill_workers.teacher.protocol import Scores

SEGMENT, ASIDE = ".scores", ".tmp"
HEADER = struct.Struct("<8sI32s")
"""MAGIC, the number of entries, and a SHA-256 of the table."""
MAGIC = b"scores 1"
ENTRY = struct.Struct("<32sQI")
"""Of the table: an Entry."""
DIGEST_BYTES = 32

ABANDONED_SECONDS = 3600.0
"""Age of a file aside whose writer has ended; one that is alive writes for seconds."""

Entry = tuple[bytes, int, int]
"""A key of 32 bytes, the place of its entry in the file, and the entry's size, bytes."""


class Damaged(Exception):
    """Raised for a segment whose table is not as it was written."""


def write_segment(folder: Path, values: Mapping[bytes, bytes]) -> tuple[Path, list[Entry]]:
    """Write values by their keys as a new segment. Returns it with its table; raises OSError, and leaves nothing."""
    offset, entries = HEADER.size + len(values) * ENTRY.size, list[Entry]()
    for key, of_key in values.items():
        entries.append((key, offset, DIGEST_BYTES + len(of_key)))
        offset += DIGEST_BYTES + len(of_key)
    table = b"".join(ENTRY.pack(*entry) for entry in entries)
    path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{SEGMENT}"
    bodies = (hashlib.sha256(key + of_key).digest() + of_key for key, of_key in values.items())
    publish(path, [HEADER.pack(MAGIC, len(values), hashlib.sha256(table).digest()), table, *bodies])
    return path, entries


def segments_of(folder: Path) -> list[Path]:
    """Return the segments in a folder by the time that they were written; none where it is not there. Raises
    OSError: a glob would be empty where a volume does not answer."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == SEGMENT)
    except FileNotFoundError:
        return []


def remove_abandoned(folder: Path) -> None:
    """Remove the files aside of writers that were killed. Their age is told by the volume's own clock: that of this
    machine may differ by more. Raises OSError."""
    asides = [path for path in folder.iterdir() if path.suffix == ASIDE]
    if not asides:
        return
    clock = folder / f"clock-{uuid.uuid4().hex[:8]}{ASIDE}"
    with clock.open("xb", buffering=0) as file:
        with contextlib.suppress(OSError):  # on a full volume what is abandoned is the room that is missing
            file.write(b"0")
            os.fsync(file.fileno())
        now = os.fstat(file.fileno()).st_mtime
    clock.unlink(missing_ok=True)
    for aside in asides:
        with contextlib.suppress(OSError):  # another reader was faster
            if now - aside.stat().st_mtime > ABANDONED_SECONDS:
                aside.unlink()


def read_table(path: Path) -> tuple[list[Entry], int]:
    """Return the entries that are whole, and the number of those that are cut off. Raises Damaged, OSError."""
    size = path.stat().st_size
    with _opened(path) as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise Damaged("it is cut off in its header")
        magic, count, digest = HEADER.unpack(header)
        if magic != MAGIC or HEADER.size + count * ENTRY.size > size:
            raise Damaged("it is cut off in its table, or no segment of this release")
        table = file.read(count * ENTRY.size)
    if hashlib.sha256(table).digest() != digest:
        raise Damaged("its table is not as it was written")
    whole = [(key, place, length) for key, place, length in ENTRY.iter_unpack(table) if place + length <= size]
    return whole, count - len(whole)


def read_entry(path: Path, key: bytes, offset: int, size: int) -> bytes | None:
    """Return the values of an entry; None where they are not those that were written under the key. Raises OSError."""
    with _opened(path) as file:
        file.seek(offset)
        entry = file.read(size)
    digest, values = entry[:DIGEST_BYTES], entry[DIGEST_BYTES:]
    return values if digest == hashlib.sha256(key + values).digest() else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose name is in each OSError; a read that fails has none."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def publish(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that nobody sees before it is whole, under a name of its own until then. Raises OSError."""
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


def encoded(scores: Scores) -> bytes:
    """Return scores as values: [tokens] float64, and with a top-k [tokens, k] int32 ids and float32 log-probs."""
    parts = [np.array(scores.logprobs, dtype="<f8").tobytes()]  # JSON has any float64
    if scores.top_ids is not None and scores.top_logprobs is not None:
        parts += [scores.top_ids.astype("<i4").tobytes(), scores.top_logprobs.astype("<f4").tobytes()]
    return b"".join(parts)


def decoded(values: bytes, tokens: int, top_k: int | None) -> Scores:
    """Return the scores of so many tokens that were `encoded`."""
    logprobs = np.frombuffer(values, "<f8", tokens).tolist()
    if top_k is None:
        return Scores(logprobs, None, None)
    shape, count = (tokens, top_k), tokens * top_k
    ids = np.frombuffer(values, "<i4", count, 8 * tokens).reshape(shape)
    return Scores(logprobs, ids, np.frombuffer(values, "<f4", count, 8 * tokens + 4 * count).reshape(shape))
