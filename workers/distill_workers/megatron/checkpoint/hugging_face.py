"""Hugging Face checkpoints: read straight into this rank's shard, and written back.

Reading takes this rank's blocks of the safetensors files into the parameters themselves: no tensor exists twice, and no
file is mapped. Writing gathers one tensor at a time on rank 0. There is no conversion step and no second format.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from distill_workers.megatron import lora, parallel
from distill_workers.megatron.architecture import Mapping, Shape, UnsupportedModel, mappings
from distill_workers.megatron.checkpoint import companions, tensor_file
from distill_workers.megatron.checkpoint.tensor_file import BadTensorFile, Block, TensorFile
from distill_workers.megatron.model import HiddenStateModel
from distill_workers.megatron.parallel import Ranks
from distill_workers.megatron.pipeline import all_parameters, local_parameters, to_rank_0
from distill_workers.megatron.shards import join, pieces, whole_shapes
from distill_workers.run_folder.atomic_file import sync_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4 * 1024**3


def load(model: torch.nn.Module, shape: Shape, ranks: Ranks, model_path: Path) -> None:
    """Fill every parameter of this rank's shard from the safetensors files of a folder; dtypes are converted.

    Raises UnsupportedModel when a file is broken, or a tensor is missing, has another shape, or would be left unread.
    """
    unset = dict(model.named_parameters())
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(TensorFile(path)) for path in sorted(set(_weight_files(model_path)))]
            where = {name: file for file in files for name in file.entries}
            wanted: dict[TensorFile, list[Block]] = {file: [] for file in files}
            for mapping in local_parameters(shape, ranks):
                parameter = unset.pop(_name_in(unset, mapping))
                for block in _blocks(parameter.data, mapping, shape, ranks, where, model_path):
                    wanted[where[block.name]].append(block)
            for file, blocks in wanted.items():
                file.read_all(blocks)
        except BadTensorFile as error:
            raise UnsupportedModel(str(error)) from error
        if unset:
            raise UnsupportedModel(f"{model_path}: nothing to read for {', '.join(sorted(unset))}")
        read = {name for mapping in mappings(shape) for name in mapping.hf}
        # A tied checkpoint may carry the head as well; old ones carry rotary frequencies, which are computed.
        extra = [n for n in where if n not in read and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")]
        if extra:
            raise UnsupportedModel(
                f"{model_path}: tensor {extra[0]} and {len(extra) - 1} more have no place in the model"
            )


def _blocks(
    parameter: torch.Tensor,
    mapping: Mapping,
    shape: Shape,
    ranks: Ranks,
    where: dict[str, TensorFile],
    model_path: Path,
) -> Iterator[Block]:
    """Yield the blocks that one parameter is read from; rows that no block fills are set to zero."""
    wholes = whole_shapes(mapping.layout, shape, parameter.shape, size=ranks.tensor_size)
    for name, expected in zip(mapping.hf, wholes, strict=True):
        if name not in where:
            raise UnsupportedModel(f"{model_path} has no tensor {name}")
        found = where[name].entries[name].shape
        if found != expected:
            raise UnsupportedModel(f"{model_path}: {name} is {list(found)}, but config.json asks for {list(expected)}")
    filled = 0
    for piece in pieces(mapping.layout, shape, parameter.shape, rank=ranks.tensor_rank, size=ranks.tensor_size):
        name = mapping.hf[piece.source]
        yield Block(name, parameter[piece.to], piece.rows.start, piece.columns.start or 0)
        filled = piece.to.stop
    parameter[filled:].zero_()  # the padding of a vocabulary


def iterate(
    model: HiddenStateModel, shape: Shape, ranks: Ranks, values: dict[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (name, tensor) of every Hugging Face tensor: whole on rank 0, None on the others that have a part in it.
    They are of the model's parameters, or of `values` by the same names, in the parameters' dtype.

    Collective over the first replica or, with expert parallelism, the first that hold all experts together, one
    Megatron tensor at a time: each of those ranks must run the iterator to the end. The other replicas get nothing, and
    need not call. A tensor may be a view of a parameter: who keeps it beyond the next training step copies it.
    """
    if not ranks.is_first(with_experts=True):
        return
    parameters = dict(model.named_parameters())
    for owners, mapping in all_parameters(shape, ranks):
        whole: list[torch.Tensor] | None = None
        if owners.is_first_here(ranks):
            name = _name_in(parameters, mapping)
            own = parameters[name].detach()
            if values is not None:
                own = values[name].to(own.dtype)
            shard = lora.merged(model, name, own).contiguous()
            shards = parallel.gather_shards(shard, ranks)
            whole = None if shards is None else join(shards, mapping.layout, shape)
        whole = to_rank_0(whole, owners, len(mapping.hf), model.config.params_dtype, ranks)
        if whole is None:
            yield from ((name, None) for name in mapping.hf)
        else:
            yield from zip(mapping.hf, whole, strict=True)


def export(
    model: HiddenStateModel,
    shape: Shape,
    ranks: Ranks,
    source: Path,
    folder: Path,
    *,
    trust_remote_code: bool = False,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model as a Hugging Face checkpoint that differs from `source` in its weights and its dtype, and has its
    code only with `trust_remote_code`; `card` is its README.md.

    Collective as `iterate`; rank 0 writes, beside the folder, and renames when all is on disk: a reader sees the whole
    model or none. An earlier export in the folder is replaced.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    if ranks.rank != 0:
        for _ in iterate(model, shape, ranks):
            pass
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_weights(iterate(model, shape, ranks), aside, shard_bytes)
    dtype = next(model.parameters()).dtype
    (aside / "config.json").write_text(json.dumps(_config_with_dtype(source, dtype), indent=2) + "\n")
    companions.copy(source, aside, trust_remote_code=trust_remote_code)
    if card is not None:
        (aside / "README.md").write_text(card, encoding="utf-8")
    _sync(aside)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _weight_files(model_path: Path) -> list[Path]:
    if (model_path / INDEX).exists():
        try:
            index = json.loads((model_path / INDEX).read_text(encoding="utf-8"))
            return [model_path / name for name in index["weight_map"].values()]
        except (ValueError, KeyError, AttributeError) as error:
            raise UnsupportedModel(f"{model_path / INDEX} is no index of safetensors files: {error}") from error
    if (model_path / SINGLE).exists():
        return [model_path / SINGLE]
    raise UnsupportedModel(f"{model_path} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")


def _name_in(parameters: dict[str, Any], mapping: Mapping) -> str:
    return next(name for name in mapping.megatron if name in parameters)


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor | None]], folder: Path, shard_bytes: int) -> None:
    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        # The number of files is known at the end only, and is part of their names.
        tensor_file.write(folder / f"{len(files)}.part", pending, {"format": "pt"})
        files.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        assert tensor is not None  # rank 0
        pending[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= shard_bytes:
            flush()
    if pending:
        flush()
    if len(files) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _config_with_dtype(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    # transformers 5 writes dtype, earlier ones torch_dtype; a reader casts to it.
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
