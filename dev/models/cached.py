"""A folder of the cache that a recipe fills once: made aside, renamed when whole, stamped by the recipe's own text.

Nothing here imports torch, so that a recipe whose folder is already there answers at once.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Card = dict[str, Any]
STAMP = "stamp"


def models_folder() -> Path:
    cache = os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distillation-operator"
    return Path(cache) / "models"


def ensure(name: str, recipe: Path, build: Callable[[Path], Card]) -> Path:
    """The folder models/<name>; `build` fills an empty one and returns its card, unless the stamp says it is made."""
    folder = models_folder() / name
    stamp = hashlib.sha256(recipe.read_bytes()).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would each train; the second one waits and finds it made
        if _stamp_of(folder) != stamp:
            _make(folder, stamp, build)
    return folder


def read_card(folder: Path) -> Card:
    card: Card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return card


def _stamp_of(folder: Path) -> str | None:
    path = folder / STAMP
    return path.read_text(encoding="utf-8") if path.exists() else None


def _make(folder: Path, stamp: str, build: Callable[[Path], Card]) -> None:
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    began = time.monotonic()
    card = {**build(aside), "seconds": round(time.monotonic() - began, 1)}
    (aside / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    for path in aside.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600, and pods read as another user
    (aside / STAMP).write_text(stamp, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def line(name: str, card: Card) -> str:
    """One line for people: the numbers of a card."""
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in card.items() if isinstance(value, int | float))
