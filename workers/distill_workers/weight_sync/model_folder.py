"""Weights as a Hugging Face folder that servers load: a file for each bucket of a pass, and the index of all files."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill_workers.run_folder.atomic_file import sync_folder
from distill_workers.weight_sync.buckets import Bucket, Buffers, WeightSource

COMPANIONS = (".json", ".jinja", ".txt", ".model")
"""Endings of the files beside the weights: configuration and tokenizer."""
SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


async def write_model_folder(
    final: Path,
    source: WeightSource,
    model: Path,
    buffers: Buffers,
    *,
    durable: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the weights of a pass beside `final`, with configuration and tokenizer of `model`, and rename the folder: a
    reader sees all of it or none. `durable`: what depends on it may be written once this has returned. `check` raises
    if the folder may not be renamed any more.

    The folder aside, FINAL.*.tmp, has a name that no other writer of it has; what one leaves that dies, the next
    caller removes.
    """
    aside = final.with_name(f"{final.name}.{uuid.uuid4().hex[:12]}.tmp")
    await asyncio.to_thread(_begin, aside, model)
    index: dict[str, str] = {}
    async with contextlib.aclosing(source(buffers)) as buckets:
        number = 0
        async for bucket in buckets:
            number += 1
            name = f"model-{number:05d}.safetensors"
            await asyncio.to_thread(write_safetensors, aside / name, bucket)
            index |= dict.fromkeys(bucket.names, name)
    (aside / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if durable:
        await asyncio.to_thread(_sync, aside)
    check()
    await asyncio.to_thread(shutil.rmtree, final, ignore_errors=True)
    aside.rename(final)
    if durable:
        await asyncio.to_thread(sync_folder, final.parent)


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


def _begin(folder: Path, model: Path) -> None:
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.suffix in COMPANIONS and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
