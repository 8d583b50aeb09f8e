"""A push of weights through a folder that trainer and engines share."""

import asyncio
import shutil
from pathlib import Path

import torch

from distill_workers.weight_sync.base import Engines, Sync, on_each
from distill_workers.weight_sync.buckets import BUCKET_BYTES, Buffers, WeightSource
from distill_workers.weight_sync.model_folder import write_model_folder


class DiskSync(Sync):
    """A push through a shared folder: slower than the others, and independent of any network of ranks.

    Engines go on generating while the folder is written.
    """

    def __init__(
        self, folder: Path, model: Path, *, timeout_seconds: float = 1800.0, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """`folder` holds the weights in transit; configuration and tokenizer are copied from `model`."""
        self._folder, self._model, self._timeout = folder, model, timeout_seconds
        self._buffers = Buffers(bucket_bytes, torch.device("cpu"))

    async def push(self, source: WeightSource, version: int, engines: Engines) -> None:
        await write_model_folder(self._place(version), source, self._model, self._buffers)
        await super().push(source, version, engines)
        await asyncio.to_thread(self._remove_but, version)

    async def _once(self, source: WeightSource, version: int, engines: Engines) -> None:
        place = str(self._place(version))
        async with self._paused(version, engines):
            await on_each(engines, lambda e: e.load_folder(place, version, self._timeout))

    def _place(self, version: int) -> Path:
        return self._folder / f"version-{version:06d}"

    def _remove_but(self, version: int) -> None:
        for path in self._folder.glob("version-*"):
            if path != self._place(version):
                shutil.rmtree(path, ignore_errors=True)
