"""Logits in a reused buffer, worked on a few rows at a time, and the gradient of their head."""

from collections.abc import Iterator

import torch

BLOCK_BYTES = {"cpu": 2 * 1024**2, "cuda": 64 * 1024**2}
"""Size of the rows that are worked on at once: what a CPU's cache holds, or what keeps a GPU busy."""
SLICE_ROWS = 16_384
"""Rows of the head whose gradient is added at once, where that needs a temporary."""


def slices(length: int, step: int) -> Iterator[slice]:
    """Yield slices of `step` that cover `length`."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def block_rows(buffer: torch.Tensor) -> int:
    """Return how many rows of a buffer of logits are worked on at once."""
    limit = BLOCK_BYTES.get(buffer.device.type, BLOCK_BYTES["cuda"])
    return max(1, min(len(buffer), limit // (buffer.shape[1] * buffer.element_size())))


def logits(hidden: torch.Tensor, head: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return hidden [tokens, hidden] times head [rows, hidden]: [tokens, rows], in the buffer and its dtype."""
    into = buffer[: len(hidden)]
    if hidden.dtype == into.dtype:
        return torch.mm(hidden, head.t(), out=into)
    if hidden.is_cuda and into.dtype == torch.float32 and torch.version.hip is None:
        # The sums are in fp32 anyway: here they are not rounded to the dtype of the head before they are kept.
        return torch.mm(hidden, head.t(), out_dtype=torch.float32, out=into)
    return into.copy_(hidden @ head.t())


def add_outer(of_head: torch.Tensor, of_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add to the gradient of a head [rows, hidden] what the gradient of logits [tokens, rows] gives."""
    if of_head.dtype == hidden.dtype:
        of_head.addmm_(of_logits.t(), hidden)
        return
    for rows in slices(len(of_head), SLICE_ROWS):
        of_head[rows] += of_logits[:, rows].t() @ hidden
