"""Writing a checkpoint while training goes on."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from distill_workers.failures import Failure, VolumeFull, is_full
from distill_workers.megatron.checkpoint import state


class CheckpointWriter:
    """Writes this rank's part of one checkpoint at a time, in a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._writing is not None and not self._writing.done()

    def check_free(self) -> None:
        """Raise RuntimeError unless every save that was begun is finished."""
        if self._writing is not None:
            raise RuntimeError("a save was begun while another is under way: finish that first")

    def begin(self, folder: Path, snapshot: state.Snapshot) -> None:
        """Begin to write a snapshot that training does not touch into an existing folder.

        The checkpoint is whole only after `finish`, which each `begin` needs.
        """
        self.check_free()
        self._writing = self._thread.submit(state.write, folder, snapshot)

    async def written(self) -> None:
        """Wait until this rank has written its part; `finish` says whether it could."""
        if self._writing is not None:
            await asyncio.wait({asyncio.wrap_future(self._writing)})

    def finish(self) -> None:
        """Wait until every rank has its part on disk: collective. Raises Failure, on rank 0, when one could not write
        it; VolumeFull when there was no room for it."""
        writing, self._writing = self._writing, None
        error = writing.exception() if writing is not None else None
        # What the error says, and whether it is a lack of room.
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
