"""Host memory that snapshots of a GPU's tensors are copied into, one after the other."""

import torch


class HostCopies:
    """Copies by name, in memory that is kept from snapshot to snapshot.

    The copies of a GPU's tensors are in pinned memory: into fresh pageable memory the same copy is staged by the driver
    and page by page, while training waits. Tensors on a CPU are copied anew each time: there the memory is worth more.
    """

    def __init__(self, *, pinned: bool = True) -> None:
        self._pinned = pinned
        self._kept: dict[str, torch.Tensor] = {}

    def copy(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of `value`: not to be read before `wait`, and gone with the next copy of this name."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            self._kept.pop(name, None)  # freed first
            kept = self._kept[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=self._pinned)
        return kept.copy_(value, non_blocking=True)

    def wait(self) -> None:
        """Wait until all copies are whole."""
        if self._pinned:
            torch.cuda.current_stream().synchronize()
