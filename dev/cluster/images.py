"""Hands images to the cluster's containerd without copying their files.

    images.py --state FOLDER buildah --store STORE --ref REF NAME   an image that buildah built
    images.py --state FOLDER folder --ref REF --entrypoint CMD DIR  an image of one layer, the files of DIR
    images.py --state FOLDER whole --store STORE [NAME]             status 1 if buildah lacks the image or files of it
    images.py --state FOLDER check [--deep]                         status 1 and one sentence if files are missing

A layer enters as a snapshot made of hard links, and the image that is then imported names that snapshot as its own:
each real layer is replaced by a tiny one, whose content is the identity of the real one, so containerd finds the chain
"already unpacked" and copies nothing. 7 GB take seconds and no disk. What this rests on: both stores lie on one file
system (status 3 if not; the caller then imports plainly), and nobody writes into a layer's files in place, which
neither buildah nor an overlay mount does.

images.json in the state folder notes how many files each layer had. After a hard kill `check --deep` counts them again:
half-deleted layers look whole to containerd.
"""

from __future__ import annotations

import argparse
import base64
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
NOT_WHOLE = (FileNotFoundError, KeyError, StopIteration, json.JSONDecodeError)


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
        self.notes: dict[str, dict[str, Any]] = {}
        if self.notes_file.exists():
            self.notes = json.loads(self.notes_file.read_text())

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
        self.notes[key] = {"folder": str(upper), "files": count_files(upper)}
        self.write_notes()

    def write_notes(self) -> None:
        aside = self.notes_file.with_suffix(".new")  # replaced at once: a reader sees the old notes or the new ones
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
        entry = {
            "mediaType": manifest["mediaType"],
            **put(_json(manifest)),
            "annotations": {"io.containerd.image.name": ref},
        }
        files = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": _json({"schemaVersion": 2, "manifests": [entry]}),
        }
        files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
        self.ctr("images", "import", "-", stdin=tar_of(files))

    def missing(self, deep: bool) -> str:
        """What is wrong with the store, in one sentence; empty if nothing is."""
        try:
            states = self.ctr("images", "check").splitlines()[1:]
        except RuntimeError as error:  # a manifest that is gone fails the whole listing
            return f"the image store has lost contents: {error}"
        for line in states:
            if not re.search(r"\scomplete \(", line):
                return f"the image store has lost contents of {line.split()[0]}"
        for key, note in list(self.notes.items()):
            folder = Path(note["folder"])
            if not folder.is_dir():
                if self.has_snapshot(key):
                    return f"the image store has lost the layer {folder}"
                del self.notes[key]  # collected by containerd, because a newer image took the name
            elif deep and count_files(folder) < note["files"]:
                return f"the image store has lost files of the layer {folder}"
        return ""


def chain_id(parent: str, diff: str) -> str:
    """The name of a stack of layers, as the OCI image specification defines it."""
    return "sha256:" + hashlib.sha256(f"{parent} {diff}".encode()).hexdigest() if parent else diff


def stand_in(identity: str) -> bytes:
    """The tiny layer that takes a real one's place in the image; it is never unpacked."""
    return tar_of({".layer": identity.encode()})


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def link_tree(source: Path, target: Path) -> None:
    """Fills the empty folder `target` with hard links to what is in `source`, keeping modes, owners and attributes."""
    if source.stat().st_dev != target.stat().st_dev:
        raise OSError(errno.EXDEV, f"{source} and {target} lie on different file systems")
    subprocess.run(["cp", "-al", f"{source}/.", str(target)], check=True)
    target.chmod(0o755)


def count_files(folder: Path) -> int:
    return sum(len(files) + len(folders) for _, folders, files in os.walk(folder))


def image_of_folder(folder: Path, entrypoint: list[str], user: str) -> Image:
    listing = [f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sorted(folder.rglob("*"))]
    identity = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    return Image({"Entrypoint": entrypoint, "User": user, "Env": ["PATH=/usr/bin:/bin"]}, [Layer(identity, folder)])


def image_of_buildah(store: Path, name: str) -> Image:
    """Reads the layout of containers/storage (overlay driver); see NOT_WHOLE for what a half-deleted store raises."""
    images = json.loads((store / "overlay-images/images.json").read_text())
    image = next(image for image in images if name in (image.get("names") or []))
    layers = {layer["id"]: layer for layer in json.loads((store / "overlay-layers/layers.json").read_text())}
    stack: list[Layer] = []
    at = image["layer"]
    while at:
        stack.insert(0, Layer(layers[at]["diff-digest"], store / "overlay" / at / "diff"))
        at = layers[at].get("parent")
    for layer in stack:
        layer.folder.stat()
    # The image's id is the digest of its config, which is kept under that name: "=" and base64 of "sha256:<id>".
    config_name = "=" + base64.b64encode(f"sha256:{image['id']}".encode()).decode()
    config = store / "overlay-images" / image["id"] / config_name
    return Image(json.loads(config.read_text())["config"], stack)


def names_in_buildah(store: Path) -> list[str]:
    images = json.loads((store / "overlay-images/images.json").read_text())
    return [name for image in images for name in image.get("names") or []]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    buildah = commands.add_parser("buildah")
    buildah.add_argument("--store", type=Path, required=True)
    buildah.add_argument("--ref", required=True)
    buildah.add_argument("name")
    whole = commands.add_parser("whole")
    whole.add_argument("--store", type=Path, required=True)
    whole.add_argument("name", nargs="?", help="without it: every image that the store lists")
    folder = commands.add_parser("folder")
    folder.add_argument("--ref", required=True)
    folder.add_argument("--entrypoint", action="append", required=True)
    folder.add_argument("--user", default="")
    folder.add_argument("folder", type=Path)
    check = commands.add_parser("check")
    check.add_argument("--deep", action="store_true")
    options = parser.parse_args()

    if options.command == "whole":
        try:
            for name in [options.name] if options.name else names_in_buildah(options.store):
                image_of_buildah(options.store, name)
        except NOT_WHOLE:
            return 1
        return 0
    store = Store(options.state)
    if options.command == "check":
        wrong = store.missing(options.deep)
        if wrong:
            print(wrong)
        return 1 if wrong else 0
    if options.command == "buildah":
        image = image_of_buildah(options.store, options.name)
    else:
        image = image_of_folder(options.folder, options.entrypoint, options.user)
    try:
        store.add_image(options.ref, image)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        print(error, file=sys.stderr)
        return OTHER_FILE_SYSTEM
    return 0


if __name__ == "__main__":
    sys.exit(main())
