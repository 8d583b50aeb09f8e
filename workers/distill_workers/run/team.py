"""All ranks of the trainer as one: rank 0 calls, every rank does the same, one call at a time.

Each method of `Work` is collective. Rank 0 reaches them through `Team`, from its event loop; the other ranks run
`follow` and take part in what rank 0 asks for.
"""

import asyncio
import datetime
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from distill_workers.data.sample import Sample
from distill_workers.failures import Failure, VolumeFull, is_full
from distill_workers.megatron.checkpoint import state
from distill_workers.megatron.student import MegatronStudent
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.weight_sync.buckets import Buffers, NamedTensor, WeightPass

P = ParamSpec("P")
R = TypeVar("R")

# The others wait in this group through a whole rollout or evaluation; a dead rank still ends the wait at once,
# by its closed connection.
WAIT = datetime.timedelta(days=1)


class Work:
    """What the ranks can do together."""

    def __init__(self, student: MegatronStudent) -> None:
        self._student = student
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def accumulate(self, samples: list[Sample], coefficients: StepCoefficients) -> None:
        self._student.accumulate(samples, coefficients)

    def apply(self, learning_rate: float) -> dict[str, float]:
        return self._student.apply(learning_rate)

    def discard(self) -> None:
        self._student.discard()

    def logprobs(self, samples: list[Sample]) -> list[list[float]]:
        return self._student.logprobs(samples)

    def give_weights(self) -> None:
        """The other ranks' part in `Team.weights`: each tensor is gathered on rank 0."""
        for _ in self._student.hf_tensors():
            pass

    def save(self, folder: Path) -> None:
        """Copy every rank's exact state to host memory, and begin to write it into an existing folder.

        Training may go on at once; the checkpoint is whole only after `saved`, which each `save` needs.
        """
        if self._writing is not None:
            raise RuntimeError("save was called while another is under way: call saved first")
        self._writing = self._writer.submit(state.write, folder, self._student.snapshot(copied=True))

    def saved(self) -> None:
        """Wait until every rank has its part on disk. Raises Failure, on rank 0, when one could not write it;
        VolumeFull when there was no room for it."""
        writing, self._writing = self._writing, None
        error = writing.exception() if writing is not None else None
        # An error's words, and whether it is a lack of room.
        errors: list[tuple[str, bool] | None] = [(str(error), is_full(error)) if error is not None else None]
        if dist.get_world_size() > 1:
            mine = errors[0]
            errors = [None] * dist.get_world_size()
            dist.all_gather_object(errors, mine)
        if dist.get_rank() == 0:
            for rank, found in enumerate(errors):
                if found is None:
                    continue
                text = f"rank {rank} could not write its checkpoint: {found[0]}"
                if found[1]:
                    raise VolumeFull(text)
                raise Failure(f"{text}; mend that, the next attempt goes on from the last whole one")

    def load(self, folder: Path) -> None:
        self._student.load(folder)

    def export(self, folder: Path) -> None:
        self._student.export(folder)


class Team(Work):
    """Rank 0's side. `await team.run(team.apply, rate)` runs it on every rank, off the event loop."""

    def __init__(self, student: MegatronStudent) -> None:
        super().__init__(student)
        self._group = control_group()
        # One thread: collectives must be entered in one order on every rank.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megatron")

    @property
    def replicas(self) -> int:
        """Of the student: each has a micro-batch, or a part of one, at a time."""
        return self._student.ranks.replicas

    async def run(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        def call() -> R:
            announce(self._group, (method.__name__, args, kwargs))
            return method(*args, **kwargs)

        # Shielded: a cancelled caller must not leave the other ranks in half a collective.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))

    def weights(self, buffers: Buffers) -> WeightPass:
        """A pass over the student's weights as they are in its turn among the calls of the team (a Source)."""

        def tensors() -> Iterator[NamedTensor]:
            announce(self._group, (self.give_weights.__name__, (), {}))
            yield from self._student.hf_tensors()

        return WeightPass(self._thread, tensors, buffers)

    async def written(self) -> None:
        """Until rank 0 has written what it is to save: the others are then as good as done, and `saved` is short."""
        if self._writing is not None:
            await asyncio.wait({asyncio.wrap_future(self._writing)})

    def dismiss(self) -> None:
        """Lets the other ranks end."""
        self._thread.submit(announce, self._group, None).result()
        self._thread.shutdown()


def follow(student: MegatronStudent) -> None:
    """The other ranks' whole life: do what rank 0 announces until it says that it is over."""
    work, group = Work(student), control_group()
    while (call := hear(group)) is not None:
        name, args, kwargs = call
        getattr(work, name)(*args, **kwargs)


def control_group() -> dist.ProcessGroup | None:
    if dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=WAIT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def announce(group: dist.ProcessGroup | None, call: Any) -> None:
    if group is not None:
        dist.broadcast_object_list([call], src=0, group=group, device=torch.device("cpu"))


def hear(group: dist.ProcessGroup | None) -> Any:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]
