"""A repository of the Hugging Face hub, as a place to which a model is published.

One commit has the whole model, so a reader sees the one before or this one. What was uploaded before a cut is known to
the hub by its hash, and is not uploaded again.
"""

import hashlib
import uuid
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from distill_workers.results.manifest import NAME, Manifest, ModelFile
from distill_workers.results.place import PlaceRefused

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
"""Files of an earlier model that a reader might load in place of the new ones: they go. Others stay."""


class Hub:
    """One repository, which is made if it is not there."""

    def __init__(self, repository: str, *, private: bool, endpoint: str | None = None) -> None:
        """The token is that of HF_TOKEN, or of `hf auth login` on this machine."""
        self._repository, self._private = repository, private
        self._api = HfApi(endpoint=endpoint, library_name="distillation-operator")

    def probe(self) -> None:
        """Make the repository if it is not there, and a branch, which is deleted again: that needs the right to write
        and leaves nothing in the history. Raises PlaceRefused for a public repository where a private one is wanted."""
        self._make()
        branch = f"probe-{uuid.uuid4().hex[:12]}"
        self._api.create_branch(self._repository, branch=branch)
        self._api.delete_branch(self._repository, branch=branch)

    def publish(self, manifest: Manifest, folder: Path, check: Callable[[], None] = lambda: None) -> str:
        """Commit the model, unless it is what is there. Returns the commit. Raises as `probe`, and what `check` raises
        before a file is uploaded or the commit is made."""
        check()
        self._make()
        paths = {file.path for file in manifest.files}
        there = self._api.list_repo_files(self._repository)
        stale = [name for name in there if name not in paths and any(fnmatch(name, p) for p in WEIGHTS)]
        added = [CommitOperationAdd(file.path, str(folder / file.path)) for file in manifest.files]
        for each in added:
            check()
            self._api.preupload_lfs_files(self._repository, [each])
        check()
        commit = self._api.create_commit(
            self._repository,
            operations=[
                *added,
                CommitOperationAdd(NAME, manifest.text().encode()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"{manifest.job}: the model of step {manifest.step}",
        )
        self._check(manifest, folder, commit.oid)
        return f"commit {commit.oid[:12]}"

    def _make(self) -> None:
        self._api.create_repo(self._repository, private=self._private, exist_ok=True)
        if self._private and not self._api.repo_info(self._repository).private:
            raise PlaceRefused("the repository is public, and private is true: set private: false, or choose another")

    def _check(self, manifest: Manifest, folder: Path, commit: str) -> None:
        """Raise OSError where a file of the commit is not that of the manifest, by its size and its hash."""
        info = self._api.repo_info(self._repository, revision=commit, files_metadata=True)
        found = {each.rfilename: each for each in info.siblings or ()}
        for file in manifest.files:
            there = found.get(file.path)
            if there is None or there.size != file.bytes or not _same(there, file, folder):
                raise OSError(f"{file.path} was committed, and what is there now is something else")


def _same(there: Any, file: ModelFile, folder: Path) -> bool:
    """Return whether a file of the hub has the hash of ours: its own of a large file, git's of any other."""
    if there.lfs:
        return bool(there.lfs.sha256 == file.sha256)
    content = (folder / file.path).read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(there.blob_id == git.hexdigest())
