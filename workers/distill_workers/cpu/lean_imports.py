"""Imports of SGLang and megatron-core that take less of a processor's time, for machines without an accelerator."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any


def _uncompiled(model: Any = None, **_: Any) -> Any:
    return (lambda decorated: decorated) if model is None else model


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Import what is imported within without torch.compile, wandb and the garbage collector.

    Both libraries decorate functions with torch.compile as they are imported, which loads PyTorch's compiler; it needs
    a C++ compiler to run, gains nothing for small models, and is never run here. Megatron imports wandb where it can be
    had; whoever tracks a run with it imports it afterwards. The collector would go through everything that is imported
    again and again, to find nothing; what was imported is left out of its later passes too (gc.freeze), so that
    processes forked afterwards share these pages.
    """
    import torch

    compiled: Any = torch.compile
    torch.compile = _uncompiled
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        torch.compile = compiled
        if hidden:
            del sys.modules["wandb"]
