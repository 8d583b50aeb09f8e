"""safetensors files, read without mapping them: bytes go from the file into the memory of the tensor they belong to.

A mapped file counts as memory of the process until the kernel takes its pages back, and is copied once more than need
be. Here the header is parsed, and preadv(2) writes blocks of rows and columns into a destination; only what must be
converted, or lies on another device, or is narrower than the file's rows, goes through one small buffer.

Format: https://huggingface.co/docs/safetensors – eight bytes of header length, JSON, then the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
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
"""With more unwanted bytes than this between two rows, a call for each row is faster than reading them."""
ALIGNMENT = 64
MAX_HEADER_BYTES = 100 * 1024**2
MAX_CALL_BYTES = 1024**3
MAX_PARTS = 1024
"""Buffers that one preadv(2) can fill: IOV_MAX."""


class BadTensorFile(ValueError):
    """Raised when a file is damaged, or lacks what is read from it."""


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


@dataclass(frozen=True)
class Block:
    """A block of a tensor to be read, which begins at row and column.

    It goes into `destination` [rows, columns], or [rows] of a vector. The destination's rows must lie one after the
    other; dtype and device may differ from the file's.
    """

    name: str
    destination: torch.Tensor
    first_row: int = 0
    first_column: int = 0


class TensorFile:
    """An open safetensors file. Raises BadTensorFile when it is truncated or of another format."""

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
        """Close the file."""
        os.close(self._descriptor)

    def read(self, name: str, destination: torch.Tensor, *, first_row: int = 0, first_column: int = 0) -> None:
        """Fill one block: see Block."""
        self.read_all([Block(name, destination, first_row, first_column)])

    def read_all(self, blocks: Iterable[Block]) -> None:
        """Fill every block, in the order of the file. What lies side by side there is read by one call."""
        waiting: list[memoryview] = []
        begin = end = 0
        for offset, block, target in sorted(self._placed(blocks), key=lambda placed: placed[0]):
            direct = self._direct(block, target)
            if direct is None:
                self._read_by_buffer(offset, block, target)
                continue
            if offset != end or len(waiting) == MAX_PARTS or offset - begin > MAX_CALL_BYTES:
                self._fill(waiting, begin)
                waiting, begin, end = [], offset, offset
            waiting.append(direct)
            end += len(direct)
        self._fill(waiting, begin)

    def _placed(self, blocks: Iterable[Block]) -> Iterator[tuple[int, Block, torch.Tensor]]:
        """Where in the file each block begins, and its destination as [rows, columns]. Empty ones are left out."""
        for block in blocks:
            entry = self.entries[block.name]
            if block.destination.numel() == 0:
                continue
            target = block.destination.detach().view(block.destination.shape[0], -1)
            rows, columns = target.shape
            if block.first_row + rows > entry.shape[0] or block.first_column + columns > entry.columns:
                raise BadTensorFile(
                    f"{self.path}: {block.name} is {list(entry.shape)}: too small for what is read from it"
                )
            begin = (block.first_row * entry.columns + block.first_column) * entry.dtype.itemsize
            yield entry.offset + begin, block, target

    def _direct(self, block: Block, target: torch.Tensor) -> memoryview | None:
        """Return the destination's memory if the file has the same bytes in one piece, else None."""
        entry = self.entries[block.name]
        same = target.dtype == entry.dtype and target.device.type == "cpu"
        return _memory(target) if same and target.shape[1] == entry.columns else None

    def _read_by_buffer(self, offset: int, block: Block, target: torch.Tensor) -> None:
        """Read a block that must be converted, or lies on another device, or is narrower than the file's rows."""
        entry = self.entries[block.name]
        rows, columns = target.shape
        item = entry.dtype.itemsize
        row_bytes, run_bytes = entry.columns * item, columns * item
        by_row = row_bytes - run_bytes >= SKIPPED_BYTES
        if by_row and target.dtype == entry.dtype and target.device.type == "cpu":
            self._fill_runs(_memory(target), run_bytes, offset, row_bytes)
            return
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
                self._fill([into], start)
            rows_read = buffer[: count * stride].view(entry.dtype).view(count, -1)[:, :columns]
            # Synchronous, also from pinned memory: the buffer is filled again at once.
            target[begin : begin + count].copy_(rows_read)

    def _scratch(self, size: int, *, pinned: bool) -> torch.Tensor:
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, BUFFER_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer

    def _fill_runs(self, memory: memoryview, run_bytes: int, offset: int, row_bytes: int) -> None:
        for row in range(len(memory) // run_bytes):
            self._fill([memory[row * run_bytes : (row + 1) * run_bytes]], offset + row * row_bytes)

    def _fill(self, parts: list[memoryview], offset: int) -> None:
        """Fill one after the other with what the file has from `offset` on."""
        while parts:
            count = os.preadv(self._descriptor, parts, offset)
            if count == 0:
                raise BadTensorFile(f"{self.path} ended while it was read: it is being written, or was cut off")
            offset += count
            # One call brings two gigabytes at most.
            filled = 0
            while filled < len(parts) and count >= len(parts[filled]):
                count -= len(parts[filled])
                filled += 1
            parts = parts[filled:]
            if count:
                parts[0] = parts[0][count:]


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
    """Return the bytes of a contiguous CPU tensor, to be read or written."""
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
