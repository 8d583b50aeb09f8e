"""A folder of an object store or a file system, by fsspec, as a place to which a model is published.

A file counts as there when it has the size and the hash of the manifest, read back from the store; so a publication
that was cut short goes on with what is missing. The manifest goes first, if there is an old one, and comes last: a
reader takes no mixture of two models for one.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distill_workers.results.manifest import NAME, Manifest, ModelFile, sha256_of
from distill_workers.results.place import PlaceRefused

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""The package that fsspec needs for a scheme; the workers' image has none of them."""
PROBE = ".probe-"
"""How the names of the files begin that are written and deleted before the first step."""
BLOCK_BYTES = 1 << 24
"""Bytes of one request while a file is read back."""


class Store:
    """One folder, of which nobody else's file is touched."""

    def __init__(self, to: str, run: str, *, begun: bool) -> None:
        """`begun` says that this run has written there before. Raises PlaceRefused without the scheme's package."""
        self._to, self._run, self._begun = to.rstrip("/"), run, begun
        try:
            options = {"auto_mkdir": True} if urlsplit(to).scheme == "file" else {}
            self._files, self._root = fsspec.url_to_fs(self._to, use_listings_cache=False, **options)
        except ImportError as error:
            package = PACKAGES.get(urlsplit(to).scheme, str(error))
            raise PlaceRefused(
                f"the Python package {package} is needed for it and not installed: build an image from the workers' "
                f"that has it, and name that in trainer.template (distill run: pip install {package})"
            ) from None

    def probe(self) -> None:
        """Write, read back and delete a file. Raises PlaceRefused where something else is there, and what the file
        system raises."""
        self._former()
        path = self._path(f"{PROBE}{uuid.uuid4().hex}")
        self._files.pipe_file(path, b"probe")
        found = self._files.cat_file(path)
        self._files.rm_file(path)
        if found != b"probe":
            raise OSError(f"a file of 5 bytes was written and came back as {len(found)} others")

    def publish(self, manifest: Manifest, folder: Path, check: Callable[[], None] = lambda: None) -> str:
        """Make the folder hold the model. Returns what is there, as a phrase. Raises as `probe`, and what `check`
        raises before a file is written or removed."""
        former = self._former()
        if former is not None and former != manifest:
            check()
            self._files.rm_file(self._path(NAME))
        for file in manifest.files:
            if not self._holds(file):
                check()
                self._write(folder / file.path, self._path(file.path))
                if not self._holds(file):
                    raise OSError(f"{file.path} was written, and what is there now is something else")
        kept = {file.path for file in manifest.files}
        for file in former.files if former else ():
            if file.path not in kept and self._files.exists(self._path(file.path)):
                check()
                self._files.rm_file(self._path(file.path))
        check()
        self._write_manifest(manifest)
        return f"{len(manifest.files)} files, {manifest.bytes / 2**20:,.1f} MiB"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _former(self) -> Manifest | None:
        """Return the manifest that is there; None without one. Raises PlaceRefused for what is not of this run."""
        try:
            found = Manifest.read(self._files.cat_file(self._path(NAME)))
        except FileNotFoundError:
            if not self._begun and self._listed():
                raise PlaceRefused(
                    "the folder is not empty, and no model of this run is there: choose another, or remove it"
                ) from None
            return None
        if found is None and self._begun:
            return None  # cut short by the end of an earlier try
        if found is None or found.run != self._run:
            whose = f"job {found.job}" if found else "somebody else"
            raise PlaceRefused(f"the model of another run ({whose}) is there: choose another folder, or remove it")
        return found

    def _listed(self) -> bool:
        """Return whether the folder has any file. A folder that is not there has none, and a bucket that is not there
        is refused once something is written."""
        try:
            names = [name.rstrip("/") for name in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return False
        return any(name != self._root and PROBE not in name.rpartition("/")[2] for name in names)

    def _holds(self, file: ModelFile) -> bool:
        path = self._path(file.path)
        try:
            if self._files.info(path)["size"] != file.bytes:
                return False
            with self._files.open(path, "rb", block_size=BLOCK_BYTES) as stream:
                return sha256_of(stream) == file.sha256
        except FileNotFoundError:
            return False

    def _write_manifest(self, manifest: Manifest) -> None:
        path, content = self._path(NAME), manifest.text().encode()
        if not isinstance(self._files, LocalFileSystem):
            self._files.pipe_file(path, content)
            return
        aside = f"{path}.partial"
        with open(aside, "wb") as written:
            written.write(content)
            written.flush()
            os.fsync(written.fileno())
        os.replace(aside, path)

    def _write(self, source: Path, path: str) -> None:
        """Write a file whole or not at all: where the store is a file system, aside, and moved."""
        if not isinstance(self._files, LocalFileSystem):
            if self._files.exists(path):
                self._files.rm_file(path)  # adlfs replaces nothing
            self._files.put_file(str(source), path)
            return
        aside = f"{path}.partial"
        self._files.put_file(str(source), aside)
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
