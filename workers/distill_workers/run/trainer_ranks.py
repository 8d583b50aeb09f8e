"""The trainer's ranks: rank 0 calls a method of the student, and every rank runs it, one call at a time.

Each method that is called so is collective (megatron/student.py). Rank 0 calls them through `TrainerRanks`, from its
event loop; the other ranks run `follow`, which takes part in whatever rank 0 broadcasts.
"""

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from distill_workers import stacks
from distill_workers.megatron.student import MegatronStudent
from distill_workers.weight_sync.buckets import Buffers, NamedTensor, WeightPass

STALL_SECONDS = 600.0
"""A call that takes longer, or as long as a run may stall, leaves the stacks of its rank in the log. The longest usual
one saves a large checkpoint."""

P = ParamSpec("P")
R = TypeVar("R")

# The others wait in this group through a whole rollout or evaluation; a dead rank still ends the wait at once,
# by its closed connection.
WAIT = datetime.timedelta(days=1)


def on_every_rank(
    method: Callable[Concatenate[MegatronStudent, P], R],
) -> Callable[Concatenate["TrainerRanks", P], Awaitable[R]]:
    """Return a method of TrainerRanks that runs the student's `method` on every rank, and returns rank 0's result."""

    async def call(ranks: "TrainerRanks", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await ranks.call(method, *args, **kwargs)

    return call


class TrainerRanks:
    """Rank 0's side: the student on all ranks as one, off the event loop."""

    accumulate = on_every_rank(MegatronStudent.accumulate)
    update = on_every_rank(MegatronStudent.update)
    discard = on_every_rank(MegatronStudent.discard)
    logprobs = on_every_rank(MegatronStudent.logprobs)
    begin_save = on_every_rank(MegatronStudent.begin_save)
    finish_save = on_every_rank(MegatronStudent.finish_save)
    load = on_every_rank(MegatronStudent.load)
    export = on_every_rank(MegatronStudent.export)

    def __init__(self, student: MegatronStudent) -> None:
        self._student = student
        self._group = control_group()
        # One thread: collectives must be entered in one order on every rank.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megatron")

    @property
    def model_path(self) -> Path:
        """The folder of the model that the student began with."""
        return self._student.model_path

    @property
    def replicas(self) -> int:
        """The number of replicas of the student: each has a micro-batch, or a part of one, at a time."""
        return self._student.ranks.replicas

    async def call(self, method: Callable[Concatenate[MegatronStudent, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a method of the student on every rank, after the calls that were made before."""

        def work() -> R:
            with _stacks_of_a_stall(self._student):
                broadcast_call(self._group, (method.__name__, args, kwargs))
                return method(self._student, *args, **kwargs)

        # Shielded: a cancelled caller must not leave the other ranks in half a collective.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    def weights(self, buffers: Buffers) -> WeightPass:
        """A pass over the student's weights, as they are when it is its turn among the calls (a Source)."""
        return self._pass(buffers, averaged=False)

    def averages(self, buffers: Buffers) -> WeightPass:
        """A pass over the moving average of its weights (weight_average.py) likewise."""
        return self._pass(buffers, averaged=True)

    def _pass(self, buffers: Buffers, *, averaged: bool) -> WeightPass:
        def tensors() -> Iterator[NamedTensor]:
            broadcast_call(self._group, (MegatronStudent.export_shard.__name__, (), {"averaged": averaged}))
            yield from self._student.hf_tensors(averaged=averaged)

        return WeightPass(self._thread, tensors, buffers)

    async def written(self) -> None:
        """Wait until rank 0 has written its part of a checkpoint: the others are then as good as done, and
        `finish_save` is short."""
        await self._student.writer.written()

    def dismiss(self) -> None:
        """End `follow` on the other ranks."""
        self._thread.submit(broadcast_call, self._group, None).result()
        self._thread.shutdown()


def follow(student: MegatronStudent) -> None:
    """Run what rank 0 calls, on any other rank, until rank 0 dismisses it."""
    group = control_group()
    while (call := receive_call(group)) is not None:
        name, args, kwargs = call
        with _stacks_of_a_stall(student):
            getattr(student, name)(*args, **kwargs)


def _stacks_of_a_stall(student: MegatronStudent) -> AbstractContextManager[None]:
    return stacks.dumped_after(min(STALL_SECONDS, student.spec.stall_timeout_seconds))


def control_group() -> dist.ProcessGroup | None:
    """The group in which calls are broadcast; None where rank 0 is alone."""
    if dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=WAIT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def broadcast_call(group: dist.ProcessGroup | None, call: Any) -> None:
    """Send (name, args, kwargs) of a method of MegatronStudent to the other ranks; None dismisses them."""
    if group is not None:
        dist.broadcast_object_list([call], src=0, group=group, device=torch.device("cpu"))


def receive_call(group: dist.ProcessGroup | None) -> Any:
    """Wait for the next call that rank 0 broadcasts, and return it."""
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]
