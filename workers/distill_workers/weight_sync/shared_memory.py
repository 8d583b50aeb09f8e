"""A push of weights through shared memory, where trainer and engines are on one machine: no network, one copy each.

The trainer's two buffers are files in memory. SGLang maps them too, and copies a bucket from there into its model while
the trainer fills the other. `load` runs in SGLang's process: serving/server.py names it as a custom weight loader.
"""

import asyncio
import base64
import contextlib
import json
import math
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from distill_workers.engine.engine import EngineRefused, EngineUnavailable
from distill_workers.weight_sync.base import Engines, Sync, on_each
from distill_workers.weight_sync.buckets import BUCKET_BYTES, Bucket, Buffers, WeightSource

FOLDER = Path("/dev/shm")
PREFIX = "distill-weights-"


class SharedBuffers(Buffers):
    """Buffers that are files in memory, each mapped as a whole by trainer and engines."""

    def __init__(self, limit_bytes: int, folder: Path) -> None:
        super().__init__(limit_bytes, torch.device("cpu"))
        self._folder = folder

    def path(self, number: int) -> Path:
        """Return the file of a buffer."""
        return self._folder / str(number)

    def _make(self, number: int, size_bytes: int) -> torch.Tensor:
        path = self.path(number)
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            # A lack of memory is an error here; in a mapping it would kill the process.
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        return torch.from_file(str(path), shared=True, size=size_bytes, dtype=torch.uint8)


class SharedMemorySync(Sync):
    """A push through files in shared memory."""

    def __init__(self, *, timeout_seconds: float = 300.0, bucket_bytes: int = BUCKET_BYTES) -> None:
        remove_left_behind()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=FOLDER))
        self._buffers, self._timeout = SharedBuffers(bucket_bytes, self._folder), timeout_seconds

    async def _once(self, source: WeightSource, version: int, engines: Engines) -> None:
        async with contextlib.aclosing(source(self._buffers)) as buckets, self._paused(version, engines):
            await on_each(engines, lambda e: e.begin_update())
            async for bucket in buckets:
                await self._load(bucket, version if bucket.last else None, engines)
            await on_each(engines, lambda e: e.end_update())

    async def _load(self, bucket: Bucket, version: int | None, engines: Engines) -> None:
        message = load_message(bucket, self._buffers.path(bucket.buffer))
        await on_each(engines, lambda e: e.load_shared(message, version, self._timeout))

    async def _clean_up(self, engines: Engines) -> None:
        for engine in engines.values():
            with contextlib.suppress(EngineUnavailable, EngineRefused):
                await engine.end_update()

    async def close(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


def load_message(bucket: Bucket, path: Path) -> str:
    """Return the message to `load`: a file and the tensors in it, pickled in base64 as SGLang takes named tensors.

    The names carry it as JSON; the one tensor is empty.
    """
    dtypes = [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]
    tensors = list(zip(bucket.names, dtypes, bucket.shapes, strict=True))
    return base64.b64encode(pickle.dumps([(json.dumps([str(path), tensors]), torch.empty(0))])).decode()


_mapped: dict[str, tuple[int, torch.Tensor]] = {}
"""Inode and mapping of each file, by path. Mapping anew for every bucket costs more than the copy out of it."""


def load(model: Any, message: list[tuple[str, torch.Tensor]]) -> None:
    """Load the tensors of a file into SGLang's model, which copies them."""
    [(text, _)] = message
    path, tensors = json.loads(text)
    status = os.stat(path)
    if path not in _mapped or _mapped[path][0] != status.st_ino:
        _mapped[path] = status.st_ino, torch.from_file(path, shared=True, size=status.st_size, dtype=torch.uint8)
    flat, begin, weights = _mapped[path][1], 0, []
    for name, dtype, shape in tensors:
        kind = getattr(torch, dtype)
        end = begin + math.prod(shape) * kind.itemsize
        weights.append((name, flat[begin:end].view(kind).view(shape)))
        begin = end
    model.load_weights(weights)


def bucket_bytes(model: Path) -> int | None:
    """Return the bucket size for the model in a folder; None where memory lacks room for two buckets."""
    # Engines may use a dtype of twice the size, and one tensor may be nearly the whole model.
    whole = 2 * sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if not FOLDER.is_dir() or shutil.disk_usage(FOLDER).free < 2 * whole:
        return None
    return min(BUCKET_BYTES, whole)


def remove_left_behind() -> None:
    """Remove the folders of processes that were killed."""
    for folder in FOLDER.glob(f"{PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(PREFIX).split("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)
