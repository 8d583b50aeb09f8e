"""`python -m distill_workers.cpu.sglang_launch ARGS`: what `distill_workers.serving.sglang_launch` is, for machines
without an accelerator.

Scheduler and detokenizer are forked from the parent, which has imported everything, instead of spawned: a third of
the start-up time and two thirds of the memory. (Not for GPUs: a CUDA context does not survive a fork.)
"""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from distill_workers.cpu.lean_imports import lean_imports

SEEDED = "DISTILL_SEEDED_SAMPLING"
"""Environment variable: with 1 each token is sampled by its request's seed and its position alone."""


def fork_instead_of_spawn() -> None:
    """Make SGLang fork its processes where it would spawn them."""
    import torch.multiprocessing

    original: Any = multiprocessing.set_start_method

    def set_start_method(method: str | None, force: bool = False) -> None:
        original("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = set_start_method
    torch.multiprocessing.set_start_method = set_start_method


def keep_receive_buffer() -> None:
    """Make SGLang receive each bucket of weights into the memory of the one before it.

    The kernel zeroes fresh memory page by page, which takes longer than the broadcast itself, and glibc gives blocks
    of this size back at once. SGLang has copied the weights into the model when the next bucket comes.
    """
    import torch
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    original: Any = FlattenedTensorBucket.empty.__func__
    kept = torch.empty(0, dtype=torch.uint8)

    def empty(cls: Any, names: Any, dtypes: Any, shapes: Any, device: Any) -> Any:
        nonlocal kept
        bucket = original(cls, names, dtypes, shapes, "meta")
        size = bucket.flattened_tensor.numel()
        if len(kept) < size:
            kept = torch.empty(size, dtype=torch.uint8)
        bucket.flattened_tensor = kept[:size]
        return bucket

    FlattenedTensorBucket.empty = classmethod(empty)


def import_sglang() -> None:
    """Import what a server needs, so that the processes that are forked from this one share the pages."""
    sys.path.insert(0, str(Path(__file__).parent / "stubs"))
    # SGLang's debug_utils/dumper.py imports Megatron where it can be had, which takes each scheduler 7 seconds.
    sys.modules["megatron"] = None  # type: ignore[assignment]
    with lean_imports():
        import sglang.launch_server
        import sglang.srt.dllm.algorithm
        import sglang.srt.entrypoints.http_server
        import sglang.srt.managers.detokenizer_manager
        import sglang.srt.managers.scheduler
        import sglang.srt.model_executor.model_runner
        import sglang.srt.models.registry  # noqa: F401


def main() -> None:
    fork_instead_of_spawn()
    import_sglang()
    keep_receive_buffer()
    if os.environ.get(SEEDED) == "1":
        from distill_workers.cpu import seeded_sampling

        seeded_sampling.install()
    from distill_workers.serving import sglang_launch

    sglang_launch.main()


if __name__ == "__main__":
    main()
