"""A folder of the cache that a recipe fills once: made aside, renamed when whole, stamped by the recipe's own text.

Nothing here imports torch, so that a recipe whose folder is already there answers at once.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Card = dict[str, Any]
STAMP = "stamp"


def models_folder() -> Path:
    cache = os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distillation-operator"
    return Path(cache) / "models"


def say(text: str) -> None:
    """Print a line, within `make demo` with the seconds since its first one."""
    print(_clock() + text, flush=True)


def _clock() -> str:
    started = os.environ.get("DISTILL_STARTED")
    return f"[{time.time() - float(started):6.1f} s] " if started else ""


class Live:
    """A context in which long work shows that it goes on: a line rewritten on a terminal, elsewhere one each 30 s."""

    def __init__(self, title: str) -> None:
        self.detail = "begins"
        """What is done now; the work writes it."""
        self._title, self._began, self._terminal = title, time.monotonic(), sys.stdout.isatty()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Live":
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._ticker.join()
        say(f"{self._title} ... {time.monotonic() - self._began:.1f} s, {self.detail}")

    def _tick(self) -> None:
        while not self._ended.wait(1 if self._terminal else 30):
            text = f"{self._title} ... {time.monotonic() - self._began:.0f} s, {self.detail}"
            if self._terminal:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\033[K{(_clock() + text)[:width]}", end="", flush=True)
            else:
                say(text)
        if self._terminal:
            print("\r\033[K", end="")


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
