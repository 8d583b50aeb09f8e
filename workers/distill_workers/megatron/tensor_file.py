"""safetensors files, read without mapping them: bytes go from the file into the memory of the tensor they belong to.

A mapped file counts as memory of the process until the kernel takes its pages back, and is copied once more than need
be. Here the header is parsed, and preadv(2) writes blocks of rows and columns into a destination; only what must be
converted, or lies on another device, or is narrower than the file's rows, goes through one small buffer.

Format: https://huggingface.co/docs/safetensors – eight bytes of header length, JSON, then the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BUFFER_BYTES = 4 * 1024**2
"""Fits the processor's cache, so that what passes through it costs one trip to memory, not two."""
SKIPPED_BYTES = 16 * 1024
"""From so many unwanted bytes between two rows on, a call for each row is faster than reading them."""
ALIGNMENT = 64
MAX_HEADER_BYTES = 100 * 1024**2
MAX_CALL_BYTES = 1024**3


class BadTensorFile(ValueError):
    """The file is not what its header, or its user, says."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. `offset` is counted from the beginning of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def columns(self) -> int:
        """Elements in one row; a vector is a column of rows of one."""
        return math.prod(self.shape[1:])


class TensorFile:
    """An open safetensors file. Raises BadTensorFile when it is truncated or none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadTensorFile(f"{path} cannot be read: {error.strerror}") from error
        try:
            self.metadata, self.entries = _parse(path, self._descriptor)
        except BaseException:
            self.close()
            raise
        self._buffer: torch.Tensor | None = None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, name: str, destination: torch.Tensor, *, first_row: int = 0, first_column: int = 0) -> None:
        """Fill `destination` [rows, columns] (or [rows]) with the block of the tensor that begins at row and column.

        The destination's rows must lie one after the other; dtype and device may differ from the file's.
        """
        entry = self.entries[name]
        if destination.numel() == 0:
            return
        target = destination.detach().view(destination.shape[0], -1)
        rows, columns = target.shape
        if first_row + rows > entry.shape[0] or first_column + columns > entry.columns:
            raise BadTensorFile(f"{self.path}: {name} is {list(entry.shape)}: too small for what is read from it")
        item = entry.dtype.itemsize
        row_bytes, run_bytes = entry.columns * item, columns * item
        offset = entry.offset + first_row * row_bytes + first_column * item
        whole_rows = run_bytes == row_bytes
        if target.dtype == entry.dtype and target.device.type == "cpu":
            if whole_rows:
                self._fill(_memory(target), offset)
                return
            if row_bytes - run_bytes >= SKIPPED_BYTES:
                self._fill_runs(_memory(target), run_bytes, offset, row_bytes)
                return
        by_row = row_bytes - run_bytes >= SKIPPED_BYTES
        # Without the last row's tail, which may be the end of the file.
        stride = run_bytes if by_row else row_bytes
        at_once = max(1, BUFFER_BYTES // stride)
        buffer = self._scratch(min(at_once, rows) * stride, pinned=target.device.type == "cuda")
        for begin in range(0, rows, at_once):
            count = min(at_once, rows - begin)
            into, start = _memory(buffer)[: (count - 1) * stride + run_bytes], offset + begin * row_bytes
            if by_row:
                self._fill_runs(into, run_bytes, start, row_bytes)
            else:
                self._fill(into, start)
            block = buffer[: count * stride].view(entry.dtype).view(count, -1)[:, :columns]
            # Synchronous, also from pinned memory: the buffer is filled again at once.
            target[begin : begin + count].copy_(block)

    def _scratch(self, size: int, *, pinned: bool) -> torch.Tensor:
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, BUFFER_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer

    def _fill_runs(self, memory: memoryview, run_bytes: int, offset: int, row_bytes: int) -> None:
        for row in range(len(memory) // run_bytes):
            self._fill(memory[row * run_bytes : (row + 1) * run_bytes], offset + row * row_bytes)

    def _fill(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(self._descriptor, [memory[done : done + MAX_CALL_BYTES]], offset + done)
            if count == 0:
                raise BadTensorFile(f"{self.path} ended while it was read: it is being written, or was cut off")
            done += count


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Write CPU tensors as a new safetensors file, without a copy of them, and wait until it is on disk.

    Returns the file's size in bytes. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The kernel copies half as fast again between places that are aligned alike, and torch's memory begins at 64.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), [memoryview(len(text).to_bytes(8, "little") + text)])
        _write_all(file.fileno(), (_memory(t.detach().contiguous()) for t in tensors.values() if t.numel()))
        os.fsync(file.fileno())
    return 8 + len(text) + offset


def _write_all(descriptor: int, parts: Iterable[memoryview]) -> None:
    for part in parts:
        done = 0
        while done < len(part):
            done += os.write(descriptor, part[done : done + MAX_CALL_BYTES])


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to be read or written."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _parse(path: Path, descriptor: int) -> tuple[dict[str, str], dict[str, Entry]]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise BadTensorFile(f"{path} is no safetensors file, or is cut off: it has {size} bytes")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BadTensorFile):
            raise
        raise BadTensorFile(f"{path} has a broken safetensors header: {error}") from error
    return metadata, entries


def _entry(path: Path, name: str, value: dict[str, Any], data: int, size: int) -> Entry:
    dtype, shape = DTYPES.get(value["dtype"]), tuple(int(n) for n in value["shape"])
    begin, end = value["data_offsets"]
    if dtype is None:
        raise BadTensorFile(f"{path}: {name} has the dtype {value['dtype']}; supported are {', '.join(DTYPES)}")
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise BadTensorFile(f"{path}: {name} is {list(shape)} of {value['dtype']}, but has {end - begin} bytes")
    if data + end > size:
        raise BadTensorFile(f"{path} is cut off: {name} ends at byte {data + end}, the file at {size}")
    return Entry(dtype, shape, data + begin)
