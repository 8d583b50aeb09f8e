"""Lets megatron-core run on a machine without CUDA, over gloo.

megatron-core supports CPU tensors almost everywhere and names "cuda" in a few places as a matter of course. `install`
redirects those, and only those. Called by entry points (and tests), before anything imports megatron, never on a GPU
machine.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = ("zeros", "ones", "empty", "tensor")


def install() -> None:
    """Redirect megatron-core's uses of CUDA to the CPU, for this process. Doing it twice is the same as once."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU mode was asked for on a machine with CUDA: set spec.accelerator, not none")
    if getattr(torch.cuda.current_device, "distill_shim", False):
        return
    # megatron decorates small functions with torch.compile at import: that needs a C++ compiler, and gains nothing.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

    def current_device() -> torch.device:
        return torch.device("cpu")

    current_device.distill_shim = True  # type: ignore[attr-defined]  # a mark on a function
    torch.cuda.current_device = current_device  # type: ignore[assignment]  # an int in torch; used as device= only
    torch.cuda.synchronize = lambda device=None: None
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _rename_types_in_optimizer()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


def _rename_types_in_optimizer() -> None:
    """The optimiser compares Tensor.type() with 'torch.cuda.FloatTensor' in two functions: name it so there alone."""
    from megatron.core.optimizer import optimizer

    optimizer.clip_grad_by_total_norm_fp32 = _with_cuda_names(optimizer.clip_grad_by_total_norm_fp32)
    mixed = optimizer.Float16OptimizerWithFloat16Params
    mixed.__init__ = _with_cuda_names(mixed.__init__)


def _with_cuda_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _cuda_names():
            return function(*args, **kwargs)

    return called


@contextlib.contextmanager
def _cuda_names() -> Iterator[None]:
    original = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = named  # type: ignore[assignment,method-assign]  # restored below
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
