"""Files that a reader, or a crash of process or machine, finds whole."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a crash, sees the old or the new text."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names and renames in the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
