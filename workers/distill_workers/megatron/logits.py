"""Logits in a buffer that is used over and over, worked on a few rows at a time, and the gradient of their head."""

from collections.abc import Iterator

import torch

BLOCK_BYTES = {"cpu": 2 * 1024**2, "cuda": 64 * 1024**2}
"""Of the rows that are worked on at once: on a CPU what its cache holds, on a GPU what keeps it busy."""
SLICE_ROWS = 16_384
"""Of the head, whose gradient is added to at once where that takes a temporary."""


def slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def block_rows(buffer: torch.Tensor) -> int:
    """Rows of a buffer of logits that are worked on at once."""
    limit = BLOCK_BYTES.get(buffer.device.type, BLOCK_BYTES["cuda"])
    return max(1, min(len(buffer), limit // (buffer.shape[1] * buffer.element_size())))


def logits(hidden: torch.Tensor, head: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """hidden [tokens, hidden] times head [rows, hidden] into the first rows of a buffer, in its own type."""
    into = buffer[: len(hidden)]
    if hidden.dtype == into.dtype:
        return torch.mm(hidden, head.t(), out=into)
    return into.copy_(hidden @ head.t())


def add_outer(of_head: torch.Tensor, of_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """Adds to the gradient of a head [rows, hidden] those of logits [tokens, rows]."""
    if of_head.dtype == hidden.dtype:
        of_head.addmm_(of_logits.t(), hidden)
        return
    for rows in slices(len(of_head), SLICE_ROWS):
        of_head[rows] += of_logits[:, rows].t() @ hidden
