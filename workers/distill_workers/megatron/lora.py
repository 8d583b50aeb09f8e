"""Low-rank adapters (LoRA, arXiv 2106.09685) on every linear layer of the decoder: W + alpha / rank * B A.

The weights read from the checkpoint are frozen; A and B, beside them in the same module, are what is trained. Whatever
leaves the trainer as a Hugging Face tensor has the adapter added in (`merged`), so engines and the exported model need
to know nothing of it; `export` writes the adapter alone as well, as PEFT reads it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from safetensors.torch import save_file

from distill_api.spec.training import LoRA
from distill_workers.megatron.architecture import Layout, Mapping, Shape
from distill_workers.megatron.parallel import Ranks, gather_shards
from distill_workers.megatron.pipeline import OwningRanks, all_parameters, to_rank_0
from distill_workers.megatron.shards import join

A, B = "lora_a", "lora_b"
"""Names of the parameters: [rank, in] and [out, rank]."""

Passed = Callable[[torch.Tensor], torch.Tensor]


def attach(model: torch.nn.Module, shape: Shape, ranks: Ranks, lora: LoRA, seed: int) -> None:
    """Freeze the model and give its linear layers adapters that change nothing yet (B is 0).

    The layers must be Megatron's own: Transformer Engine's normalise their input inside.
    """
    model.requires_grad_(False)
    if ranks.pipeline_rank == 0:
        # A recomputed layer is backpropagated through only if its input asks for it, and a frozen embedding's does not.
        model.embedding.register_forward_hook(_ask_for_gradient)  # type: ignore[union-attr]  # a module
    in_sequence: bool = model.config.sequence_parallel  # type: ignore[union-attr,assignment]  # Megatron's
    for _, mapping, module in _adapted(model, shape, ranks):
        if module is None:
            continue
        weight = module.weight
        columns = mapping.layout is Layout.COLUMNS
        width = weight.shape[1] * (ranks.tensor_size if columns else 1)
        # Initialised whole on every rank, seeded by name: the same for every layout.
        name = int.from_bytes(hashlib.sha256(f"{seed}/{mapping.hf[0]}".encode()).digest()[:7], "big")
        bound = 1 / math.sqrt(width)
        down = torch.empty(lora.rank, width).uniform_(-bound, bound, generator=torch.Generator().manual_seed(name))
        if columns:
            down = down.chunk(ranks.tensor_size, dim=1)[ranks.tensor_rank]
        module.register_parameter(A, torch.nn.Parameter(down.to(weight)))
        module.register_parameter(B, torch.nn.Parameter(weight.new_zeros(weight.shape[0], lora.rank)))
        # What one rank alone has counts once in the gradient's norm, what all have alike must not count again.
        sharded, alike = (getattr(module, kind) for kind in ((A, B) if columns else (B, A)))
        sharded.tensor_model_parallel, sharded.partition_dim, sharded.partition_stride = True, int(columns), 1
        # Of that, each rank has the gradient of its own tokens or its own part of the layer: Megatron adds them up.
        alike.sequence_parallel = in_sequence
        # An expert that not every replica has is summed over fewer ranks: Megatron's mark of the weight.
        for parameter in (sharded, alike):
            parameter.allreduce = getattr(weight, "allreduce", True)
        module.lora_scale = lora.alpha / lora.rank
        module.lora_passed_on = _passed_on(columns, in_sequence, is_expert=mapping.expert is not None)
        module.register_forward_hook(_add)


def _passed_on(columns: bool, in_sequence: bool, *, is_expert: bool) -> Passed:
    """Return what happens to A's output on the way to B, where ranks share a layer; the same as to the layer's own
    input (its rows are split) or output (its columns are)."""
    if is_expert:
        # The token dispatcher has brought all tokens, and adds up the outputs of all ranks.
        return _itself
    if columns:
        # Each rank has its own columns of the input, so a part of the sum.
        over_ranks: Passed = (
            reduce_scatter_to_sequence_parallel_region if in_sequence else reduce_from_tensor_model_parallel_region
        )
        return over_ranks
    # Each rank has its own rows of the output, so a part of the gradient; in_sequence also its own tokens alone.
    to_ranks: Passed = gather_from_sequence_parallel_region if in_sequence else copy_to_tensor_model_parallel_region
    return to_ranks


def merged(model: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of the weight called `name` with its adapter added; any other parameter as it is."""
    path, _, kind = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if kind != "weight" or not hasattr(module, A):
        return weight
    return torch.addmm(weight, getattr(module, B), getattr(module, A), alpha=module.lora_scale)


def export(model: torch.nn.Module, shape: Shape, ranks: Ranks, lora: LoRA, source: Path, folder: Path) -> None:
    """Write the adapter alone, as PEFT reads it, into a new folder beside the exported model.

    Collective as hugging_face.iterate; rank 0 writes.
    """
    if not ranks.is_first(with_experts=True):
        return
    tensors = {}
    for name, tensor in _peft(model, shape, ranks):
        if tensor is not None:
            tensors[name] = tensor.cpu().contiguous()
    if ranks.rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _adapted(model: torch.nn.Module, shape: Shape, ranks: Ranks) -> Iterator[tuple[OwningRanks, Mapping, Any]]:
    """Yield each weight of the whole model that gets an adapter: its ranks, and its module if this rank has it."""
    for owners, mapping in all_parameters(shape, ranks):
        path, _, kind = mapping.megatron[0].rpartition(".")
        if kind == "weight" and mapping.layout in (Layout.GROUPED_QKV, Layout.GATE_UP, Layout.COLUMNS):
            yield owners, mapping, model.get_submodule(path) if owners.is_here(ranks) else None


def _ask_for_gradient(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_()


def _add(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    result, bias = output
    inner = module.lora_passed_on(F.linear(inputs[0], module.lora_a))
    return result + module.lora_scale * F.linear(inner, module.lora_b), bias


def _itself(inner: torch.Tensor) -> torch.Tensor:
    return inner


def _peft(model: torch.nn.Module, shape: Shape, ranks: Ranks) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (PEFT's name, tensor) of every adapter: whole on rank 0, None on the others that have a part in it."""
    for owners, mapping, module in _adapted(model, shape, ranks):
        names = [
            f"base_model.model.{name.removesuffix('.weight')}.lora_{kind}.weight"
            for name in mapping.hf
            for kind in "AB"
        ]
        whole = _whole(mapping, module, shape, ranks) if owners.is_first_here(ranks) else None
        dtype: torch.dtype = model.config.params_dtype  # type: ignore[union-attr,assignment]  # Megatron's
        whole = to_rank_0(whole, owners, len(names), dtype, ranks)
        if whole is None:
            yield from ((name, None) for name in names)
        else:
            yield from zip(names, whole, strict=True)


def _whole(mapping: Mapping, module: Any, shape: Shape, ranks: Ranks) -> list[torch.Tensor] | None:
    """Return A and B of each Hugging Face tensor on the module's first tensor parallel rank; None on others."""
    downs, ups = (gather_shards(getattr(module, kind).detach().contiguous(), ranks) for kind in (A, B))
    if downs is None or ups is None:
        return None
    if mapping.layout is Layout.COLUMNS:
        return [torch.cat(downs, dim=1), ups[0]]
    # q, k and v, or gate and up, have one A together, and in the file one each.
    return [tensor.clone() for up in join(ups, mapping.layout, shape) for tensor in (downs[0], up)]
