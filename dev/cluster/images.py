"""Hands images to the cluster's containerd without copying their files.

    images.py --state FOLDER buildah --store STORE --ref REF NAME   an image that buildah built
    images.py --state FOLDER folder --ref REF --entrypoint CMD DIR  an image of one layer, the files of DIR
    images.py --state FOLDER check [--deep]                         status 1 and one sentence if files are missing

A layer enters as a snapshot made of hard links, and the image that is then imported names that snapshot as its own: each
real layer is replaced by a tiny one, whose content is the identity of the real one, so containerd finds the chain
"already unpacked" and copies nothing. 7 GB take seconds and no disk. What this rests on: both stores lie on one file
system (status 3 if not; the caller then imports plainly), and nobody writes into a layer's files in place, which neither
buildah nor an overlay mount does.

images.json in the state folder notes how many files each layer had. After a hard kill `check --deep` counts them again:
half-deleted layers look whole to containerd.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OTHER_FILE_SYSTEM = 3


@dataclass(frozen=True)
class Layer:
    identity: str
    folder: Path


@dataclass(frozen=True)
class Image:
    config: dict[str, Any]  # the "config" of an OCI image: Env, User, Entrypoint, ...
    layers: list[Layer]  # base first


class Store:
    """The cluster's containerd and our notes about what it should hold."""

    def __init__(self, state: Path) -> None:
        self.socket = state / "run/containerd.sock"
        self.notes_file = state / "images.json"
        self.notes: dict[str, int] = json.loads(self.notes_file.read_text()) if self.notes_file.exists() else {}

    def ctr(self, *arguments: str, stdin: bytes | None = None) -> str:
        command = ["ctr", "-a", str(self.socket), "-n", "k8s.io", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode().strip()}")
        return done.stdout.decode()

    def has_snapshot(self, key: str) -> bool:
        try:
            self.ctr("snapshots", "info", key)
        except RuntimeError:
            return False
        return True

    def add_snapshot(self, key: str, parent: str, folder: Path) -> None:
        """Commits the files of `folder`, hard-linked, as the snapshot `key` on top of `parent`."""
        draft = f"draft-{os.getpid()}"
        self.ctr("snapshots", "prepare", draft, *([parent] if parent else []))
        try:
            mount = self.ctr("snapshots", "mounts", "/unused", draft)
            upper = Path(_found(r"upperdir=([^,\s]+)", mount) or _found(r"-t bind (\S+)", mount))
            link_tree(folder, upper)
            self.ctr("snapshots", "commit", key, draft)
        except BaseException:
            self.ctr("snapshots", "rm", draft)
            raise
        self.notes[str(upper)] = count_files(upper)
        # Replaced at once: a reader sees the old notes or the new ones.
        aside = self.notes_file.with_suffix(".new")
        aside.write_text(json.dumps(self.notes, indent=1))
        aside.replace(self.notes_file)

    def add_image(self, ref: str, image: Image) -> None:
        blobs: dict[str, bytes] = {}

        def put(data: bytes) -> dict[str, Any]:
            digest = hashlib.sha256(data).hexdigest()
            blobs[digest] = data
            return {"digest": f"sha256:{digest}", "size": len(data)}

        chain, diffs, descriptors = "", [], []
        for layer in image.layers:
            descriptor = put(stand_in(layer.identity))
            descriptors.append({"mediaType": "application/vnd.oci.image.layer.v1.tar", **descriptor})
            diffs.append(descriptor["digest"])
            parent, chain = chain, chain_id(chain, descriptor["digest"])
            if not self.has_snapshot(chain):
                self.add_snapshot(chain, parent, layer.folder)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": image.config,
            "rootfs": {"type": "layers", "diff_ids": diffs},
            "history": [{"created_by": "dev/cluster/images.py"}] * len(diffs),
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **put(_json(config))},
            "layers": descriptors,
        }
        entry = {"mediaType": manifest["mediaType"], **put(_json(manifest)), "annotations": {"io.containerd.image.name": ref}}
        files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": _json({"schemaVersion": 2, "manifests": [entry]})}
        files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
        self.ctr("images", "import", "-", stdin=tar_of(files))

    def missing(self, deep: bool) -> str:
        """What is wrong with the store, in one sentence; empty if nothing is."""
        for line in self.ctr("images", "check").splitlines()[1:]:
            if "incomplete" in line or "unavailable" in line or "error" in line:
                return f"the image store has lost contents of {line.split()[0]}"
        for folder, count in self.notes.items():
            path = Path(folder)
            if not path.is_dir():
                # An image replaced by a newer one takes its layer with it: gone from the list of snapshots as well.
                if (path.parent.parent / path.parent.name).exists() or self.is_listed(path):
                    return f"the image store has lost the layer {folder}"
                continue
            if deep and count_files(path) < count:
                return f"the image store has lost files of the layer {folder}"
        return ""


def chain_id(parent: str, diff: str) -> str:
    """The name of a stack of layers, as the OCI image specification defines it."""
    return "sha256:" + hashlib.sha256(f"{parent} {diff}".encode()).hexdigest() if parent else diff
