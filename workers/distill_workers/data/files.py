"""Files of data: which of those that a path names are read, and each once."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from distill_workers.failures import PromptError

log = logging.getLogger(__name__)

ALWAYS = (".jsonl", ".ndjson", ".parquet")
"""Suffixes of the files of a folder that are its data."""
OTHERWISE = (".json", ".csv", ".tsv")
"""Suffixes of the files that are read in a folder without any of ALWAYS; beside data they mostly describe it."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
LEFTOVERS = ("~", "#", ".bak", ".orig", ".old", ".swp", ".tmp", ".part", ".crdownload", ".lock", ".md5", ".sha256")
"""Ends of the names that editors, downloads and locks leave beside a file."""
OF_FILE_SYSTEMS = frozenset({"lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that a file system makes at the root of a volume, and that its administrator alone may read."""
OF_SPARK = ("_SUCCESS", "_metadata", "_common_metadata", "_committed_", "_started_")
SHOWN = 5
"""Names of files left out that a line of the log has."""


def files_of(path: Path) -> list[Path]:
    """Return the data files that a path names: itself, those of a folder, or those that match a * in its last part.

    Raises PromptError where there are none. Of a folder and a pattern, hidden files and folders (a ConfigMap's `..data`
    too), editors' copies, locks, and a compressed copy beside its original are left out, and the log says so.
    """
    if "*" in path.name:
        matching = sorted(p for p in path.parent.glob(path.name) if p.is_file())
        hidden = path.name.startswith(".")
        found = _once(p for p in matching if (hidden or not p.name.startswith(".")) and not is_leftover(p.name))
        if not found:
            left = f"; left out: {_named(matching)}" if matching else ""
            raise PromptError(f"{path}: no file has such a name{left}")
        _say(path, matching, found)
        return found
    if path.is_dir():
        visible = _visible(path)
        found = _data_of(visible)
        if not found:
            left = f"; it has {_named(visible)}" if visible else ""
            raise PromptError(
                f"{path}: the folder has no *.jsonl and no *.parquet file (nor *.json, *.csv, *.tsv), and is none that "
                f"save_to_disk wrote{left}"
            )
        _say(path, [p for p in visible if data_suffix(p) in ALWAYS + OTHERWISE], found)
        return found
    if not path.exists():
        raise PromptError(
            f"{path}: does not exist; mount the volume that holds it in podTemplate (distill run: "
            f"--volume {path.parent}=FOLDER)"
        )
    return [path]


def data_suffix(file: Path) -> str:
    """Return the suffix of a file in small letters, without that of a compression: .jsonl of TRAIN.JSONL.GZ."""
    name = file.name.lower()
    return Path(next((name[: -len(c)] for c in COMPRESSED if name.endswith(c)), name)).suffix


def is_leftover(name: str) -> bool:
    """Return whether a name is that of an editor's copy, a download that did not end, a lock, or a mark of Spark."""
    return name.endswith(LEFTOVERS) or name.startswith(("#", "~$")) or name.startswith(OF_SPARK)


def _visible(folder: Path) -> list[Path]:
    """Return all files under a folder that are neither hidden nor leftovers, in order. Raises PromptError."""

    def refuse(error: OSError) -> None:
        raise PromptError(f"{error.filename}: cannot be read: {error.strerror}")

    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()  # a link to a folder above, or to one that was read
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in OF_FILE_SYSTEMS)
        found += [Path(root, n) for n in names if not n.startswith(".") and not is_leftover(n)]
    return sorted(p for p in found if p.is_file())


def _data_of(files: list[Path]) -> list[Path]:
    for suffixes in (ALWAYS, OTHERWISE):
        if found := _once(p for p in files if data_suffix(p) in suffixes):
            return found
    return []


def _once(files: Iterable[Path]) -> list[Path]:
    """Return the files without compressed copies of others among them, and without second names of one file."""
    all_files = list(files)
    plain = {str(p) for p in all_files}
    found: dict[str | tuple[int, int], Path] = {}
    for file in all_files:
        if file.suffix.lower() in COMPRESSED and str(file.with_suffix("")) in plain:
            continue
        stat = file.stat()
        # Some file systems make up the numbers of their files, and one that has a single name needs none.
        linked = stat.st_nlink > 1
        found.setdefault((stat.st_dev, stat.st_ino) if linked else os.path.realpath(file), file)
    return list(found.values())


def _say(path: Path, candidates: list[Path], found: list[Path]) -> None:
    if left := [p for p in candidates if p not in set(found)]:
        log.warning("%s: %d files are read, and %d left out: %s", path, len(found), len(left), _named(left))


def _named(files: list[Path]) -> str:
    return ", ".join(p.name for p in files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")
