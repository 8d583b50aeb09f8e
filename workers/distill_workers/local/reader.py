"""What the reader pod of `distill report`, `export`, `samples` and `compare` runs: files of a run folder as a tar.

`python3 -m distill_workers.local.reader WHAT FOLDER` writes the tar to stdout, and to stderr the one sentence that says
why there is none. It changes nothing in the folder, which the pod mounts read-only. The last member, SHA256SUMS, has
the hash of every file before it, as sha256sum writes them: a stream without it was cut short.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from distill_api.job import parse_job
from distill_api.protocol import READER_SUMS
from distill_workers.failures import ConfigurationError, Failure
from distill_workers.local.model_source import chosen

RECORDS = ("run.json", "state.json", "exit.json", "metrics.jsonl", "samples.1.jsonl", "samples.jsonl")
"""Files of a run folder that tell of the run, as far as they are there."""
CHUNK_BYTES = 1 << 20


class What(StrEnum):
    """What of a run folder is read."""

    RECORDS = "records"
    """RECORDS alone."""
    REPORT = "report"
    """report.html and curve.png, which are made anew."""
    MODEL = "model"
    """RECORDS, and the exported model or the checkpoint that it can be made of."""


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        found = self._file.read(size)
        self.sha256.update(found)
        return found


def write_tar(files: Sequence[tuple[Path, str]], sink: BinaryIO) -> None:
    """Write the files, each with its name in the tar, and their hashes. Raises OSError for one that gets shorter."""
    sums = []
    with tarfile.open(fileobj=sink, mode="w|", bufsize=CHUNK_BYTES) as tar:
        for path, name in files:
            with path.open("rb") as file:
                info = tarfile.TarInfo(name)
                # A file that a running trainer appends to is read as long as it is now.
                info.size = os.fstat(file.fileno()).st_size
                hashed = _Hashed(file)
                tar.addfile(info, hashed)
            sums.append(f"{hashed.sha256.hexdigest()}  {name}\n")
        text = "".join(sums).encode()
        info = tarfile.TarInfo(READER_SUMS)
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))


def files_of(
    what: What, folder: Path, scratch: Path, *, step: int | None = None, best: bool = False
) -> list[tuple[Path, str]]:
    """Return the files to read, with their names; `scratch` is a folder for what is made for it.

    Raises ConfigurationError where the folder has no run, or no such model.
    """
    if not (folder / "run.json").is_file():
        raise ConfigurationError(f"{folder} has no run yet: wait until the trainer has begun")
    records = [(folder / name, name) for name in RECORDS if (folder / name).is_file()]
    if what is What.RECORDS:
        return records
    if what is What.MODEL:
        return records + list(_below(chosen(folder, step=step, best=best).folder, folder))
    from distill_workers.reporting.report import write_report

    write_report(folder, parse_job(json.loads((folder / "run.json").read_text(encoding="utf-8"))["job"]), scratch)
    return [(path, path.name) for path in sorted(scratch.iterdir())]


def _below(part: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(part.rglob("*")):
        if path.is_file():
            yield path, path.relative_to(folder).as_posix()


def main(arguments: Sequence[str], sink: BinaryIO) -> int:
    """Write what `arguments` ask for to the sink. Return the exit code."""
    parser = argparse.ArgumentParser(prog="reader")
    parser.add_argument("what", type=What)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--best", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            write_tar(files_of(asked.what, asked.folder, Path(scratch), step=asked.step, best=asked.best), sink)
            sink.flush()
    except Failure as error:
        print(error, file=sys.stderr)
        return int(error.code)
    except (OSError, ValueError, LookupError) as error:
        print(f"{asked.folder} cannot be read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # What a library prints must not end up in the tar.
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with stream:
        code = main(sys.argv[1:], stream)
    sys.exit(code)
