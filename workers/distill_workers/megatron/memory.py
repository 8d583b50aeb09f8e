"""What keeps a step of the trainer within the bytes that docs/guides/sizing.md counts, on a GPU above all."""

from collections.abc import Sequence
from typing import Any

import torch


def all_finite(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return a bool scalar on `device`: no value of any tensor is infinite or NaN.

    The gradient is one flat fp32 buffer of all parameters, so nothing of its size may be made besides: the least and
    the greatest value tell, and both are NaN where one value is.
    """
    finite = torch.ones((), dtype=torch.bool, device=device)
    for tensor in tensors:
        if tensor.numel():
            least, greatest = torch.aminmax(tensor)
            finite = finite & torch.isfinite(least).to(device) & torch.isfinite(greatest).to(device)
    return finite


def fuse(optimizer: Any, device: torch.device) -> None:
    """Make torch's AdamW of Megatron's `optimizer` one kernel on a GPU.

    Without Apex and Transformer Engine Megatron takes torch.optim.AdamW (core/optimizer/__init__.py,
    USING_PYTORCH_OPTIMIZER) and hands no choice of kernel on. On CUDA torch then takes the foreach kernels, whose
    square roots of all second moments at once are four more bytes for each parameter. Other optimisers stay as is.
    """
    if device.type != "cuda":
        return
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(inner, torch.optim.AdamW):
            inner.defaults |= FUSED
            for group in inner.param_groups:
                group |= FUSED


FUSED = {"fused": True, "foreach": False}


def step_count(steps: float, parameter: torch.Tensor) -> torch.Tensor:
    """Return torch's count of the steps of one parameter: beside it on a GPU, where the fused kernel reads it."""
    return torch.tensor(steps, dtype=torch.float32, device=parameter.device)
