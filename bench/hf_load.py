"""How fast, and in how much memory, a Hugging Face checkpoint gets into parameters that exist already.

    python bench/hf_load.py [--rounds 7]

A random Llama of 513 MiB in fp32, one file, warm page cache, one thread. Beside the project's own loader: the plain
read of the tensors' bytes into one buffer (the limit), safetensors (safe_open's tensors and slices, load_file) and
transformers' from_pretrained, each followed by the copy into the parameters that it needs. GB/s are of the bytes that
are wanted, by CPU seconds of the process (the machine may be busy) and by the clock; rounds are interleaved. Memory is
the peak of a child process over what it held before, mapped pages counted, with the parameters allocated and touched.

The kernel copies between memory that is aligned alike (modulo 32 bytes) half as fast again, and the header that
safetensors writes leaves the tensors at any multiple of 8: the plain read is of the same bytes at the same offsets, and
the same model with its header padded to 64 bytes, as hf.export writes it, is read as well.

The targets (research/peer-baselines): whole model >= 0.9 of the plain read and <= 64 MB; halves of dimension 1 >= 0.5.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill_workers.megatron.architecture import Layout, Mapping, Shape, mappings, read_shape
from distill_workers.megatron.checkpoint import hugging_face
from distill_workers.megatron.checkpoint.tensor_file import TensorFile, write

CONFIG = {
    "vocab_size": 49_152, "hidden_size": 768, "intermediate_size": 2_304, "num_hidden_layers": 14,
    "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
PLAIN = "plain read of the tensors' bytes into one buffer"
Tensors = dict[str, torch.Tensor]


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder, max_shard_size="4GB")
    (folder / "aligned").mkdir()


class Parameters(torch.nn.Module):
    """The parameters that one of `size` tensor parallel ranks has, without the rest of Megatron's model."""

    def __init__(self, shape: Shape, whole: Tensors, size: int) -> None:
        super().__init__()
        self._own = {m.megatron[0]: torch.nn.Parameter(local(m, shape, whole, size)) for m in mappings(shape)}

    def named_parameters(self, *unused: Any, **also: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self._own.items()


def local(mapping: Mapping, shape: Shape, whole: Tensors, size: int) -> torch.Tensor:
    rows, *rest = whole[mapping.hf[0]].shape
    match mapping.layout:
        case Layout.COLUMNS:
            return torch.zeros(rows, rest[0] // size)
        case Layout.ROWS:
            return torch.zeros(shape.padded_vocab_size(size) // size, *rest)
        case Layout.REPLICATED:
            return torch.zeros(rows)
    return torch.zeros(sum(whole[name].shape[0] for name in mapping.hf) // size, *rest)


class Ways:
    """Every way, by name; each returns the bytes that it had to bring."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "model.safetensors"
        self._shape = read_shape(folder)
        with TensorFile(self._file) as file:
            self._whole = {name: torch.zeros(entry.shape) for name, entry in file.entries.items()}
        matrices = {name: t for name, t in self._whole.items() if t.ndim == 2}
        self._halves = [
            {name: torch.zeros(t.shape[0] // 2, t.shape[1]) for name, t in matrices.items()},
            {name: torch.zeros(t.shape[0], t.shape[1] // 2) for name, t in matrices.items()},
        ]
        with TensorFile(self._file) as file:
            self._begin = min(entry.offset for entry in file.entries.values())
        self._buffer = torch.zeros(self._file.stat().st_size, dtype=torch.uint8)
        self._models = {size: Parameters(self._shape, self._whole, size) for size in (1, 2)}
        bf16 = {name: t.bfloat16() for name, t in self._models[1]._own.items()}
        self._models[0] = Parameters(self._shape, self._whole, 1)
        self._models[0]._own = {name: torch.nn.Parameter(t) for name, t in bf16.items()}
        self.all: dict[str, Callable[[], int]] = {
            PLAIN: lambda: self.plain(self._begin),
            "plain read from the start of the file": lambda: self.plain(0),
            "own: hf.load": lambda: self.own(1),
            "own: hf.load, aligned header": lambda: self.own(1, "aligned"),
            "own: hf.load into bf16": lambda: self.own(0),
            "own: hf.load, one rank of TP2": lambda: self.own(2),
            "own: halves of dimension 0": lambda: self.own_halves(0),
            "own: halves of dimension 1": lambda: self.own_halves(1),
            "safe_open tensors + copy": self.safe_open,
            "safe_open halves of dimension 0": lambda: self.safe_open_halves(0),
            "safe_open halves of dimension 1": lambda: self.safe_open_halves(1),
            "load_file + copy": self.load_file,
            "from_pretrained + copy": self.from_pretrained,
        }

    def plain(self, begin: int) -> int:
        with self._file.open("rb", buffering=0) as file:
            file.seek(begin)
            return file.readinto(self._buffer.numpy())

    def own(self, size: int, folder: str = ".") -> int:
        ranks: Any = SimpleNamespace(
            tensor_rank=0, tensor_size=size or 1, pipeline_rank=0, pipeline_size=1, is_last_pipeline_stage=True
        )
        hugging_face.load(self._models[size], self._shape, ranks, self._folder / folder)
        elements = sum(t.numel() for t in self._models[size]._own.values())
        return 4 * elements

    def own_halves(self, dimension: int) -> int:
        with TensorFile(self._file) as file:
            for name, target in self._halves[dimension].items():
                file.read(name, target)
        return sum(t.nbytes for t in self._halves[dimension].values())

    def safe_open(self) -> int:
        with safe_open(self._file, framework="pt") as file:
            for name, target in self._whole.items():
                target.copy_(file.get_tensor(name))
        return self._bytes()

    def safe_open_halves(self, dimension: int) -> int:
        with safe_open(self._file, framework="pt") as file:
            for name, target in self._halves[dimension].items():
                rows, columns = target.shape
                target.copy_(file.get_slice(name)[:rows, :columns])
        return sum(t.nbytes for t in self._halves[dimension].values())

    def load_file(self) -> int:
        for name, tensor in load_file(self._file).items():
            self._whole[name].copy_(tensor)
        return self._bytes()

    def from_pretrained(self) -> int:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            self._whole[name].copy_(parameter.detach())
        return self._bytes()

    def _bytes(self) -> int:
        return sum(t.nbytes for t in self._whole.values())


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def child(folder: Path, way: str) -> None:
    """Prints by how many MB one way raises the peak of this process."""
    ways = Ways(folder)
    if way.startswith("from_pretrained"):
        import transformers.models.llama.modeling_llama  # noqa: F401  # its import is no part of the load
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    ways.all[way]()
    print(memory("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WAY"), help="(internal) the memory of one way")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder)
        write(folder / "aligned" / "model.safetensors", load_file(folder / "model.safetensors"), {"format": "pt"})
        gc.collect()
        ways = Ways(folder)
        cpu: dict[str, list[float]] = {way: [] for way in ways.all}
        clock: dict[str, list[float]] = {way: [] for way in ways.all}
        for number in range(arguments.rounds + 1):
            for way, run in ways.all.items():
                begin, began = time.process_time(), time.monotonic()
                wanted = run()
                spent, took = time.process_time() - begin, time.monotonic() - began
                if number:  # the first round touches memory and fills caches
                    cpu[way].append(wanted / spent / 1e9)
                    clock[way].append(wanted / took / 1e9)
        print(json.dumps({"gb_per_cpu_second": cpu}), flush=True)
        peak = {}
        for way in ways.all:
            command = [sys.executable, "-W", "ignore", __file__, "--child", str(folder), way]
            peak[way] = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    plain = cpu[PLAIN]
    print(f"{ways._bytes() / 2**20:.0f} MiB, {arguments.rounds} rounds; medians [min-max]\n")
    print(
        "| way | GB/s by CPU seconds | of the plain read | GB/s by the clock | extra peak MB |\n|---|---|---|---|---|"
    )
    for way in ways.all:
        ratios = [own / limit for own, limit in zip(cpu[way], plain, strict=True)]
        print(f"| {way} | {spread(cpu[way])} | {spread(ratios)} | {spread(clock[way])} | {peak[way]:.0f} |")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


if __name__ == "__main__":
    main()
