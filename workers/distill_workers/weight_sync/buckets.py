"""The student's weights as a stream of buckets, in bounded memory.

A bucket is many tensors in one flat buffer, which is what engines and files take best. There are two buffers, used over
and over: while one bucket is being sent, the next is filled from the trainer's parameters. Nothing keeps a copy of the
model; whoever wants the weights again asks for another pass over the parameters.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

Acquire = Callable[[int], tuple[int, torch.Tensor]]
"""The number of a free buffer of at least so many bytes, and the buffer."""
NamedTensor = tuple[str, torch.Tensor | None]
"""A Hugging Face name, and the whole tensor on rank 0."""
FIRST_PART = 4
"""Measured (bench/weight_sync.py), against what a bucket more costs: the first is this part of the others."""


@dataclass(frozen=True)
class Bucket:
    """Tensors one after another in a flat buffer, in their own precision. Valid until the next bucket is asked for."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[list[int]]
    flat: torch.Tensor
    """uint8 [bytes]"""
    buffer: int
    last: bool


def pack(tensors: Iterable[NamedTensor], limit_bytes: int, acquire: Acquire) -> Iterator[Bucket]:
    """Runs of tensors up to a size; a larger tensor has a bucket of its own. The first is small: nothing is sent while
    it is filled."""
    names: list[str] = []
    dtypes: list[torch.dtype] = []
    shapes: list[list[int]] = []
    used, number, flat, at_most = 0, 0, torch.empty(0), limit_bytes // FIRST_PART
    for name, tensor in tensors:
        assert tensor is not None, "buckets are made on rank 0"
        # SGLang wants each tensor aligned to its own element size within the bucket.
        if names and (used + tensor.nbytes > at_most or used % tensor.element_size()):
            yield Bucket(names, dtypes, shapes, flat[:used], number, last=False)
            names, dtypes, shapes, used, at_most = [], [], [], 0, limit_bytes
        if not names:
            number, flat = acquire(max(limit_bytes, tensor.nbytes))
        place = flat[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor.detach())
        names.append(name)
        dtypes.append(tensor.dtype)
        shapes.append(list(tensor.shape))
        used += tensor.nbytes
    if names:
        yield Bucket(names, dtypes, shapes, flat[:used], number, last=True)


class Buffers:
    """Two flat buffers on a device, for buckets of at most limit_bytes: made when first wanted, and kept from push to
    push, as fresh memory costs more than a copy."""

    COUNT = 2

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        self.limit_bytes, self._device = limit_bytes, device
        self._flat: list[torch.Tensor | None] = [None] * self.COUNT

    def get(self, number: int, size_bytes: int) -> torch.Tensor:
        """uint8, at least size_bytes: a single tensor may be larger than the limit."""
        flat = self._flat[number]
        if flat is None or len(flat) < size_bytes:
            flat = self._flat[number] = None  # the old one goes first
            flat = self._flat[number] = self._make(number, size_bytes)
        return flat

    def _make(self, number: int, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)


class Abandoned(Exception):
    """Nobody wants the rest of the pass."""


class WeightPass:
    """One pass over the weights: an async iterator of buckets, to be closed (contextlib.aclosing).

    It begins at once, in the thread, with the first two buckets; each further one is filled when the consumer asks for
    its next. `tensors` runs to its end there, whatever becomes of the pass: it is a collective of the trainer's ranks,
    and a push that fails half-way must not leave the others waiting.
    """

    def __init__(self, thread: Executor, tensors: Callable[[], Iterator[NamedTensor]], buffers: Buffers) -> None:
        """`thread` has one worker: a pass is over before the next may use the buffers."""
        self._loop = asyncio.get_running_loop()
        self._buffers = buffers
        self._free: SimpleQueue[int | None] = SimpleQueue()
        for number in range(buffers.COUNT):
            self._free.put(number)
        self._filled: asyncio.Queue[Bucket | None] = asyncio.Queue()
        self._at: Bucket | None = None
        self._closed = False
        self._filling = self._loop.run_in_executor(thread, self._fill, tensors)
        self._filling.add_done_callback(lambda _: self._filled.put_nowait(None))

    def __aiter__(self) -> "WeightPass":
        return self

    async def __anext__(self) -> Bucket:
        if self._at is not None:
            self._free.put(self._at.buffer)
        self._at = await self._filled.get()
        if self._at is None:
            await self._filling  # raises what ended it early
            raise StopAsyncIteration
        return self._at

    async def aclose(self) -> None:
        self._closed = True
        self._free.put(None)
        # Whatever still goes wrong on the way to its end concerns the next call of the team, which meets it too.
        self._filling.add_done_callback(lambda filling: filling.cancelled() or filling.exception())

    def _fill(self, tensors: Callable[[], Iterator[NamedTensor]]) -> None:
        stream = tensors()
        try:
            for bucket in pack(stream, self._buffers.limit_bytes, self._acquire):
                if bucket.flat.is_cuda:
                    # Its consumer works on another stream.
                    torch.cuda.current_stream(bucket.flat.device).synchronize()
                self._loop.call_soon_threadsafe(self._filled.put_nowait, bucket)
        except Abandoned:
            pass
        finally:
            for _ in stream:
                pass

    def _acquire(self, size_bytes: int) -> tuple[int, torch.Tensor]:
        number = self._free.get()
        if number is None or self._closed:
            raise Abandoned
        return number, self._buffers.get(number, size_bytes)


WeightSource = Callable[[Buffers], WeightPass]
"""Where the current weights are to be had, as often as they are wanted: each call is a pass of its own."""
