"""The manifest of a published model: its files with their sizes and hashes, and the run that it is of.

It is written last, so a folder that has one has every file that it lists.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

NAME = "distillation.json"
"""The file with the manifest, beside those of the model."""
CHUNK_BYTES = 1 << 22
"""Bytes that are read and hashed at once: also a slow volume gives them in less than a second."""


@dataclass(frozen=True)
class ModelFile:
    """A file of a model."""

    path: str
    """Relative to the model's folder, with slashes."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is published."""

    job: str
    run: str
    """A random word of the run folder: nobody else's model has it."""
    step: int
    files: tuple[ModelFile, ...]

    @classmethod
    def of_folder(
        cls, folder: Path, *, job: str, run: str, step: int, check: Callable[[], None] = lambda: None
    ) -> "Manifest":
        """Return the manifest of the model in a folder, each file of which is read. Raises OSError, and what `check`
        raises, which is called before each few MiB."""
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != NAME)
        return cls(job, run, step, tuple(_described(path, folder, check) for path in paths))

    @classmethod
    def read(cls, text: str | bytes) -> "Manifest | None":
        """Return the manifest that `text` gave; None where the text is something else."""
        try:
            found = json.loads(text)
            files = tuple(ModelFile(**entry) for entry in found.pop("files"))
            return cls(**found, files=files)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def text(self) -> str:
        """Return the manifest as it is published."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def content(self) -> str:
        """Return a hash that two manifests of the same files have in common."""
        return hashlib.sha256(json.dumps([asdict(file) for file in self.files]).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Return the size of all files together."""
        return sum(file.bytes for file in self.files)


def sha256_of(stream: BinaryIO, check: Callable[[], None] = lambda: None) -> str:
    """Return the hash of what is left of an open file. `check` is called before each CHUNK_BYTES of it, and may
    raise."""
    found, chunk = hashlib.sha256(), b" "
    while chunk:
        check()
        chunk = stream.read(CHUNK_BYTES)
        found.update(chunk)
    return found.hexdigest()


def _described(path: Path, folder: Path, check: Callable[[], None]) -> ModelFile:
    with path.open("rb") as file:
        sha256 = sha256_of(file, check)
    return ModelFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256)
