"""How fast new weights get from the trainer into a real SGLang engine, beside a bare gloo broadcast of the same bytes.

    python bench/weight_sync.py [--rounds 7] [--buckets 64,256]

A random model of SmolLM2-135M's shape in fp32 (272 tensors, 538 MB) in a real Megatron trainer of one rank, and one
real SGLang server on the same machine, without accelerators. A push is everything that the loop waits for: pause,
transfer, the version read back, resume. The peer is one warm tensor of the same bytes, broadcast by gloo between two
processes. Rounds are interleaved; a ratio is of two neighbours in one round. Memory is the peak of the trainer in the
first push by this way over what it held before any.

The targets (research/peer-baselines, P4): distributed >= 0.55 of bare gloo, on one machine by files >= 1.0 of it. The
engine receives, then loads, strictly one after another: without a change inside it the limit is 0.69.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist

from distill_api.spec.job_spec import Spec
from distill_workers.engine.engine import Engine
from distill_workers.run.trainer_ranks import TrainerRanks
from distill_workers.serving.ports import reserve_port
from distill_workers.weight_sync.broadcast import DistributedSync
from distill_workers.weight_sync.buckets import WeightSource
from distill_workers.weight_sync.disk import DiskSync
from distill_workers.weight_sync.shared_memory import SharedMemorySync

MB = 1_000_000
CONFIG = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip


def make_model(folder: Path) -> int:
    """A folder that trainer and engine read; the bytes of its tensors."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


class Bare:
    """Two processes that broadcast one flat tensor when told so."""

    def __init__(self, size_bytes: int) -> None:
        port = str(reserve_port())
        self._ends = [
            subprocess.Popen(
                [sys.executable, __file__, "--end", str(rank), "--port", port, "--bytes", str(size_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            for rank in range(2)
        ]
        for _ in range(2):
            self.seconds()

    def seconds(self) -> float:
        begin = time.perf_counter()
        for end in self._ends:
            assert end.stdin is not None
            end.stdin.write(b"\n")
            end.stdin.flush()
        for end in self._ends:
            assert end.stdout is not None
            assert end.stdout.readline() == b"done\n"
        return time.perf_counter() - begin

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(end.pid) for end in self._ends)

    def close(self) -> None:
        for end in self._ends:
            end.kill()
            end.wait()


def bare_end(rank: int, port: int, size_bytes: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    flat = torch.zeros(size_bytes, dtype=torch.uint8)
    for _ in sys.stdin:
        dist.broadcast(flat, src=0)
        print("done", flush=True)


def cpu_seconds(group: int) -> float:
    """Of all living processes of a process group."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident() -> dict[str, int]:
    """VmRSS and VmHWM of this process, bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("VmRSS:", "VmHWM:")}


async def measured(sync: Any, source: WeightSource, version: int, engine: Engine) -> tuple[float, int]:
    """Seconds of a push, and the bytes that the trainer's process held at most meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    await sync.push(source, version, {0: engine})
    return time.perf_counter() - begin, resident()["VmHWM"]


async def run(rounds: int, buckets: list[int], folder: Path) -> dict[str, Any]:
    from distill_workers.cpu import megatron_shim

    megatron_shim.install()
    from distill_workers.megatron.student import MegatronStudent

    size = make_model(folder / "model")
    spec = Spec.model_validate(
        {
            "accelerator": "none",
            "student": {"model": str(folder / "model")},
            "teacher": {"model": str(folder / "model")},
            "data": {"prompts": {"reasoningGym": {"task": "chain_sum", "size": 8}}},
            "rollout": {"maxPromptTokens": 64, "maxResponseTokens": 64},
            "schedule": {"steps": 1},
        }
    )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(reserve_port())
    ranks = TrainerRanks(MegatronStudent(spec, folder / "model"))
    ways: dict[str, Any] = {
        f"distributed, {mb}-MB buckets": DistributedSync(spec, "127.0.0.1", bucket_bytes=mb * MB) for mb in buckets
    }
    ways |= {f"shared memory, {mb}-MB buckets": SharedMemorySync(bucket_bytes=mb * MB) for mb in buckets}
    ways["disk"] = DiskSync(folder / "sync", folder / "model")
    engine = Engine(spec, 0, host="127.0.0.1", port=None, log_folder=str(folder))
    await engine.start(str(folder / "model"))
    bare = Bare(size)
    version = 0
    found: dict[str, dict[str, list[float]]] = {
        way: {"seconds": [], "ratio": [], "cpu_seconds": [], "extra_mb": []} for way in ways
    }
    peer: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    server = (await engine.info())["server_pid"]

    def own_cpu_seconds() -> float:
        return time.process_time() + cpu_seconds(server)

    try:
        for number in range(rounds + 1):
            for way, sync in ways.items():
                bare_before = bare.cpu_seconds()
                seconds_bare = await asyncio.to_thread(bare.seconds)
                bare_cpu_seconds = bare.cpu_seconds() - bare_before
                version += 1
                before, cpu_before = resident()["VmRSS"], own_cpu_seconds()
                seconds, peak = await measured(sync, ranks.weights, version, engine)
                if number:  # the first round touches everybody's memory for the first time
                    peer["seconds"].append(seconds_bare)
                    peer["cpu_seconds"].append(bare_cpu_seconds)
                    found[way]["seconds"].append(seconds)
                    found[way]["ratio"].append(seconds_bare / seconds)
                    found[way]["cpu_seconds"].append(own_cpu_seconds() - cpu_before)
                else:
                    found[way]["extra_mb"].append((peak - before) / MB)
    finally:
        bare.close()
        for sync in ways.values():
            await sync.close()
        await engine.stop()
        ranks.dismiss()
    return {"mb": size / MB, "bare": peer, "ways": found}


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def table(result: dict[str, Any]) -> str:
    speed = spread([result["mb"] / 1000 / s for s in result["bare"]["seconds"]])
    lines = [
        f"{result['mb']:.0f} MB to one engine; median [least-most]",
        "",
        "| way | GB/s | of the bare broadcast | CPU seconds, all processes | extra MB in the trainer |",
        "| --- | --- | --- | --- | --- |",
        f"| bare gloo broadcast, one tensor | {speed} | 1 | {spread(result['bare']['cpu_seconds'])} | |",
    ]
    for way, values in result["ways"].items():
        speed = spread([result["mb"] / 1000 / s for s in values["seconds"]])
        cells = [way, speed, spread(values["ratio"]), spread(values["cpu_seconds"]), f"{max(values['extra_mb']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--buckets", default="64,256", help="sizes to try, MB")
    parser.add_argument("--end", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.end is not None:
        bare_end(arguments.end, arguments.port, arguments.bytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        buckets = [int(mb) for mb in arguments.buckets.split(",")]
        result = asyncio.run(run(arguments.rounds, buckets, Path(folder)))
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may hold up an ordinary exit
