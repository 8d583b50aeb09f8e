"""Low-rank adapters (LoRA, arXiv 2106.09685) on every linear layer of the decoder: W + alpha / rank * B A.

The weights read from the checkpoint are frozen; A and B, beside them in the same module, are what is trained. Whatever
leaves the trainer as a Hugging Face tensor has the adapter added in (`merged`), so engines and the exported model need
to know nothing of it; `export` writes the adapter alone as well, as PEFT reads it.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from safetensors.torch import save_file

from distill_api.spec import LoRA
from distill_workers.megatron.architecture import Layout, Mapping, Shape, mappings
from distill_workers.megatron.parallel import Ranks
from distill_workers.megatron.shards import join

A, B = "lora_a", "lora_b"
"""Names of the parameters: [rank, in] and [out, rank]."""


def attach(model: torch.nn.Module, shape: Shape, ranks: Ranks, lora: LoRA, seed: int) -> None:
    """Freeze the model and give its linear layers adapters that change nothing yet (B is 0).

    The layers must be Megatron's own: Transformer Engine's normalise their input inside.
    """
    model.requires_grad_(False)
    # A recomputed layer is backpropagated through only if its input asks for it, and a frozen embedding's does not.
    model.embedding.register_forward_hook(_ask_for_gradient)  # type: ignore[union-attr]  # a module, on one stage
    for mapping, module in _adapted(model, shape):
        weight = module.weight
        columns = mapping.layout is Layout.COLUMNS
        width = weight.shape[1] * (ranks.tensor_size if columns else 1)
        # Drawn whole on every rank, by name: the same whatever the layout.
        name = int.from_bytes(hashlib.sha256(f"{seed}/{mapping.megatron[0]}".encode()).digest()[:7], "big")
        bound = 1 / math.sqrt(width)
        down = torch.empty(lora.rank, width).uniform_(-bound, bound, generator=torch.Generator().manual_seed(name))
        if columns:
            down = down.chunk(ranks.tensor_size, dim=1)[ranks.tensor_rank]
        module.register_parameter(A, torch.nn.Parameter(down.to(weight)))
        module.register_parameter(B, torch.nn.Parameter(weight.new_zeros(weight.shape[0], lora.rank)))
        # What one rank alone has counts once in the gradient's norm, what all have alike must not count again.
        sharded = getattr(module, A if columns else B)
        sharded.tensor_model_parallel, sharded.partition_dim, sharded.partition_stride = True, int(columns), 1
        module.lora_scale = lora.alpha / lora.rank
        module.register_forward_hook(_add_by_columns if columns else _add_by_rows)


def merged(model: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of the weight called `name`, with its adapter added in; of any other parameter, itself."""
    path, _, kind = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if kind != "weight" or not hasattr(module, A):
        return weight
    return torch.addmm(weight, getattr(module, B), getattr(module, A), alpha=module.lora_scale)


def export(model: torch.nn.Module, shape: Shape, ranks: Ranks, lora: LoRA, source: Path, folder: Path) -> None:
    """Write the adapter alone, as PEFT reads it, into a new folder beside the exported model.

    Collective over the first data parallel replica; rank 0 writes.
    """
    if ranks.data_rank != 0:
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


def _adapted(model: torch.nn.Module, shape: Shape) -> Iterator[tuple[Mapping, Any]]:
    """The mappings of the weights that get an adapter, and their modules."""
    for mapping in mappings(shape):
        path, _, kind = mapping.megatron[0].rpartition(".")
        if kind == "weight" and mapping.layout in (Layout.GROUPED_QKV, Layout.GATE_UP, Layout.COLUMNS):
            yield mapping, model.get_submodule(path)


def _ask_for_gradient(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_()


def _add_by_rows(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Column parallel layer: every rank has the whole input and its own rows of the output."""
    result, bias = output
    # The adapter's inner value is whole on each rank: its gradient is summed over the ranks that used it.
    inner = copy_to_tensor_model_parallel_region(F.linear(inputs[0], module.lora_a))
    return result + module.lora_scale * F.linear(inner, module.lora_b), bias


def _add_by_columns(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Row parallel layer: every rank has its own columns of the input, and the whole output."""
    result, bias = output
    inner = reduce_from_tensor_model_parallel_region(F.linear(inputs[0], module.lora_a))
    return result + module.lora_scale * F.linear(inner, module.lora_b), bias


def _peft(model: torch.nn.Module, shape: Shape, ranks: Ranks) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(PEFT's name, tensor) of every adapter: whole on rank 0, None on its tensor parallel peers."""
    for mapping, module in _adapted(model, shape):
        downs, ups = (_gather(getattr(module, kind).detach(), ranks) for kind in (A, B))
        for i, name in enumerate(mapping.hf):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if downs is None or ups is None:
                yield from ((f"{prefix}.lora_{kind}.weight", None) for kind in "AB")
            elif mapping.layout is Layout.COLUMNS:
                yield f"{prefix}.lora_A.weight", torch.cat(downs, dim=1)
                yield f"{prefix}.lora_B.weight", ups[0]
            else:
                yield f"{prefix}.lora_A.weight", downs[0].clone()
                yield f"{prefix}.lora_B.weight", join(ups, mapping.layout, shape)[i].clone()


def _gather(shard: torch.Tensor, ranks: Ranks) -> list[torch.Tensor] | None:
    if ranks.tensor_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(ranks.tensor_size)] if ranks.tensor_rank == 0 else None
    dist.gather(shard.contiguous(), shards, dst=dist.get_global_rank(ranks.tensor_group, 0), group=ranks.tensor_group)
    return shards
