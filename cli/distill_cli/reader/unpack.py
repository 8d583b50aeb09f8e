"""The tar that the reader pod writes, as files of a folder: each checked by its size and its hash."""

import hashlib
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO

from distill_api.protocol import READER_SUMS
from distill_cli.failure import CommandFailed

CHUNK_BYTES = 1 << 20
SUMS_BYTES = 16 << 20
"""Upper bound of the list of hashes, which is read into memory: a hundred thousand files."""


class Incomplete(CommandFailed):
    """Raised for a tar that is cut short, or holds other files than were sent."""


def unpack(stream: IO[bytes], folder: Path) -> None:
    """Write the files of a tar into an empty folder.

    Raises Incomplete where one is missing or is not what was sent: then the folder is of no use.
    """
    found: dict[str, str] = {}
    sums = b""
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK_BYTES) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    raise Incomplete(f"{member.name} is no file: the pod sent something else than a run folder")
                if member.name == READER_SUMS:
                    if member.size > SUMS_BYTES:
                        text = f"{READER_SUMS} has {member.size >> 20} MiB, and at most {SUMS_BYTES >> 20} are read"
                        raise Incomplete(f"{text}: the pod sent something else than a run folder")
                    sums = content.read()
                else:
                    found[member.name] = _written(content, _inside(folder, member.name), member.size)
    except tarfile.TarError as error:
        raise Incomplete(f"what the pod sent was cut short ({error}): try again") from error
    wanted = {name: sha256 for sha256, _, name in (line.partition("  ") for line in sums.decode().splitlines())}
    if not wanted:
        raise Incomplete("what the pod sent was cut short (its list of hashes is missing): try again")
    if other := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise Incomplete(f"{other[0]} has not arrived as it was sent: try again")


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise Incomplete(f"{name} is outside of the folder: the pod sent something else than a run folder")
    return folder / path


def _written(content: IO[bytes], path: Path, size: int) -> str:
    """Write a file, and return its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256, left = hashlib.sha256(), size
    with path.open("wb") as file:
        while left and (chunk := content.read(min(CHUNK_BYTES, left))):
            sha256.update(chunk)
            file.write(chunk)
            left -= len(chunk)
    if left:
        raise Incomplete(f"{path.name} was cut short: try again")
    return sha256.hexdigest()
