"""A shim with which megatron-core runs on a machine without CUDA, over gloo.

megatron-core supports CPU tensors almost everywhere, and hard-codes "cuda" in a few places. `install` redirects those,
and only those. Entry points (and tests) call it before a model is built, never on a GPU machine.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

_FACTORIES = ("zeros", "tensor")


def install() -> None:
    """Redirect megatron-core's uses of CUDA to the CPU, for this process; a second call does nothing."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU mode was asked for on a machine with CUDA: set spec.accelerator, not none")
    if getattr(torch.cuda.current_device, "distill_shim", False):
        return
    # megatron decorates small functions with torch.compile: that needs a C++ compiler, and gains nothing. The variable
    # is read when a function is decorated, the setting when it is called: either order of imports is covered.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True

    def current_device() -> torch.device:
        return torch.device("cpu")

    current_device.distill_shim = True  # type: ignore[attr-defined]  # a mark on a function
    torch.cuda.current_device = current_device  # type: ignore[assignment]  # an int in torch; used as device= only
    torch.cuda.synchronize = lambda device=None: None
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    optimizer.get_grad_norm_fp32 = _pretending(optimizer.get_grad_norm_fp32)
    optimizer.clip_grad_by_total_norm_fp32 = _pretending(optimizer.clip_grad_by_total_norm_fp32)
    for kind in (optimizer.FP32Optimizer, optimizer.Float16OptimizerWithFloat16Params, DistributedOptimizer):
        kind.__init__ = _pretending(kind.__init__)
    # Recomputed layers restore the state of CUDA's random generator, which does not exist here.
    random._get_cuda_rng_state = lambda *args, **kwargs: None
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    # Mixtures of experts copy token counts to the host on a CUDA stream; here they are on the host already.
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_at_hand
    # With tensor parallelism they gather token counts that differ between ranks.
    from megatron.core.tensor_parallel import mappings

    mappings._gather_along_first_dim = _gathering(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _scattering(mappings._reduce_scatter_along_first_dim)
    # A context parallel rank picks its part of the rotary embedding by indices in pinned memory.
    from megatron.core.models.common.embeddings import rotary_pos_embedding as rotary

    rotary.get_pos_emb_on_this_cp_rank = _pretending(rotary.get_pos_emb_on_this_cp_rank)
    # Pipeline stages only: the copy of a tied embedding, and the 1F1B schedule's counter of tokens.
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.pipeline_parallel import schedules

    LanguageModule.setup_embeddings_and_output_layer = _pretending(LanguageModule.setup_embeddings_and_output_layer)
    schedules.forward_backward_pipelining_without_interleaving = _pretending(
        schedules.forward_backward_pipelining_without_interleaving
    )


def _counts_at_hand(dispatcher: Any, point: str, counts: torch.Tensor | None = None) -> torch.Tensor | None:
    """Turn the token counts to and from each rank into lists, as torch.distributed takes them."""
    if point == "before_ep_alltoall" and dispatcher.input_splits is not None:
        dispatcher.input_splits, dispatcher.output_splits = (
            splits.tolist() for splits in (dispatcher.input_splits, dispatcher.output_splits)
        )
    return counts


def _gathering(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return an all-gather of parts of different lengths, which gloo lacks: padded to the longest, and cut."""

    @functools.wraps(function)
    def gathered(own: torch.Tensor, group: Any, lengths: list[int] | None = None, *others: Any) -> torch.Tensor:
        if lengths is None or group.size() == 1:
            return function(own, group, lengths, *others)
        padded = own.new_zeros(max(lengths), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    return gathered


def _scattering(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the reduce-scatter to parts of different lengths: an all-reduce, of which each rank keeps its part."""

    @functools.wraps(function)
    def scattered(whole: torch.Tensor, group: Any, lengths: list[int] | None = None, *others: Any) -> torch.Tensor:
        if lengths is None or group.size() == 1:
            return function(whole, group, lengths, *others)
        total = whole.contiguous().clone()
        dist.all_reduce(total, group=group)
        own: torch.Tensor = torch.split_with_sizes(total, lengths)[group.rank()]
        return own.contiguous()

    return scattered


def _pretending(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _pretended_cuda():
            return function(*args, **kwargs)

    return called


@contextlib.contextmanager
def _pretended_cuda() -> Iterator[None]:
    """While it lasts, device="cuda" makes a CPU tensor, Tensor.cuda() is the tensor itself, and Tensor.type() names
    torch.cuda.FloatTensor.

    Not for the whole process: transformers loads models under torch.device("meta") as a context, which looks for
    torch's own factories, and with replaced ones it silently loads something else.
    """
    factories = {name: getattr(torch, name) for name in _FACTORIES}
    original, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = named  # type: ignore[assignment,method-assign]  # restored below
    torch.Tensor.cuda = _itself  # type: ignore[assignment,method-assign]  # restored below
    for name, factory in factories.items():
        setattr(torch, name, _on_cpu(factory))
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
        torch.Tensor.cuda = original_cuda  # type: ignore[method-assign]
        for name, factory in factories.items():
            setattr(torch, name, factory)


def _itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made
