"""The student's weights as a stream of buckets, in bounded memory.

A bucket is many tensors in one flat buffer, the form in which they are sent and written fastest. Two buffers are
reused: while one bucket is being sent, the next is filled from the trainer's parameters. Nothing keeps a copy of the
model; each further push is another pass over the parameters.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

Acquire = Callable[[int], tuple[int, torch.Tensor]]
"""A function that waits for a free buffer of at least so many bytes, and returns its number and the buffer."""
NamedTensor = tuple[str, torch.Tensor | None]
"""A Hugging Face name, and the whole tensor on rank 0, None on other ranks."""
BUCKET_BYTES = 256 * 1024**2
"""Measured (bench/weight_sync.py): each bucket costs some milliseconds besides its bytes, and its memory twice."""
FIRST_PART = 4
"""The first bucket is smaller by this factor; measured (bench/weight_sync.py) against the cost of one more bucket."""


@dataclass(frozen=True)
class Bucket:
    """Tensors one after another in a flat buffer, each in its own dtype. Valid until the next bucket is requested."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[list[int]]
    flat: torch.Tensor
    """uint8 [bytes]"""
    buffer: int
    """Number of the buffer."""
    last: bool
    """Whether it is the last bucket of the pass."""


def pack(tensors: Iterable[NamedTensor], limit_bytes: int, acquire: Acquire) -> Iterator[Bucket]:
    """Yield buckets of up to `limit_bytes`; a larger tensor has a bucket of its own.

    The first bucket is small, since nothing is sent while it is filled.
    """
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
    """Two flat buffers on a device for buckets of `limit_bytes`.

    They are allocated at the first use and kept from push to push, since fresh memory costs more than a copy.
    """

    COUNT = 2

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        self.limit_bytes, self._device = limit_bytes, device
        self._flat: list[torch.Tensor | None] = [None] * self.COUNT

    def get(self, number: int, size_bytes: int) -> torch.Tensor:
        """Return a buffer, uint8, of at least `size_bytes`: a single tensor may be larger than the limit."""
        flat = self._flat[number]
        if flat is None or len(flat) < size_bytes:
            flat = self._flat[number] = None  # the old one is freed first
            flat = self._flat[number] = self._make(number, size_bytes)
        return flat

    def _make(self, number: int, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)


class PassAbandoned(Exception):
    """Raised inside a pass whose consumer has closed it."""


class WeightPass:
    """One pass over the weights: an async iterator of buckets, to be closed (contextlib.aclosing).

    The thread fills the first two buckets at once, and each further one when the consumer requests its next. The thread
    runs `tensors` to its end even if the pass is closed early: it is a collective of the trainer's ranks, and a push
    that fails must not leave the other ranks waiting.
    """

    def __init__(self, thread: Executor, tensors: Callable[[], Iterator[NamedTensor]], buffers: Buffers) -> None:
        """`thread` has one worker, so that a pass has ended before the next uses the buffers."""
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
            await self._filling  # raises the error that ended the pass early
            raise StopAsyncIteration
        return self._at

    async def aclose(self) -> None:
        """Fill no more buckets."""
        self._closed = True
        self._free.put(None)
        # A later error of the collective is raised by the team's next call too, so it is not raised here.
        self._filling.add_done_callback(lambda filling: filling.cancelled() or filling.exception())

    def _fill(self, tensors: Callable[[], Iterator[NamedTensor]]) -> None:
        stream = tensors()
        try:
            for bucket in pack(stream, self._buffers.limit_bytes, self._acquire):
                if bucket.flat.is_cuda:
                    # The consumer uses another stream.
                    torch.cuda.current_stream(bucket.flat.device).synchronize()
                self._loop.call_soon_threadsafe(self._filled.put_nowait, bucket)
        except PassAbandoned:
            pass
        finally:
            for _ in stream:
                pass

    def _acquire(self, size_bytes: int) -> tuple[int, torch.Tensor]:
        number = self._free.get()
        if number is None or self._closed:
            raise PassAbandoned
        return number, self._buffers.get(number, size_bytes)


WeightSource = Callable[[Buffers], WeightPass]
"""A source of the current weights: each call begins a new pass over them."""
