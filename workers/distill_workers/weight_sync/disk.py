"""A push of weights through a folder that trainer and engines share."""

import asyncio
import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from distill_workers.weight_sync.base import Engines, Sync, on_each
from distill_workers.weight_sync.buckets import BUCKET_BYTES, Bucket, Buffers, WeightSource


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
        await self._write(source, version)
        await super().push(source, version, engines)
        await asyncio.to_thread(self._remove_but, version)

    async def _once(self, source: WeightSource, version: int, engines: Engines) -> None:
        place = str(self._place(version))
        async with self._paused(version, engines):
            await on_each(engines, lambda e: e.load_folder(place, version, self._timeout))

    def _place(self, version: int) -> Path:
        return self._folder / f"version-{version:06d}"

    async def _write(self, source: WeightSource, version: int) -> None:
        """Write a Hugging Face folder: a file for each bucket, and the index of all files."""
        final = self._place(version)
        aside = final.with_suffix(".tmp")
        await asyncio.to_thread(self._begin_folder, aside)
        index: dict[str, str] = {}
        async with contextlib.aclosing(source(self._buffers)) as buckets:
            number = 0
            async for bucket in buckets:
                number += 1
                name = f"model-{number:05d}.safetensors"
                await asyncio.to_thread(write_safetensors, aside / name, bucket)
                index |= dict.fromkeys(bucket.names, name)
        (aside / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        await asyncio.to_thread(shutil.rmtree, final, ignore_errors=True)
        aside.rename(final)

    def _begin_folder(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in self._model.iterdir():
            if (
                path.is_file()
                and path.suffix in (".json", ".jinja", ".txt", ".model")
                and "safetensors" not in path.name
            ):
                shutil.copyfile(path, folder / path.name)

    def _remove_but(self, version: int) -> None:
        for path in self._folder.glob("version-*"):
            if path != self._place(version):
                shutil.rmtree(path, ignore_errors=True)


SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(path: Path, bucket: Bucket) -> None:
    """Write a bucket as a safetensors file: header length in 8 bytes, little-endian; the header as JSON, padded by
    spaces to a multiple of 8 bytes; and the flat buffer as it is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_TYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(bucket.flat.numpy().data)
