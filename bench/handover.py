"""CPU seconds of a short response, by how it goes over to its engine: `python bench/handover.py`, after `make models`.

A private Ray, one engine on the CPU, sixteen slots, four responses to each prompt. Two ways, interleaved: a call of the
actor and an HTTP request for each response, or for all that are given slots at one moment. CPU is that of the trainer's
process, of the actor and of the server's processes, per response; the teacher and training are left out.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from distill_api.job import parse_job
from distill_workers.engine.ray_connection import connect, disconnect
from distill_workers.engine.ray_engine import RayEngine
from distill_workers.engine.request import Request, Response
from distill_workers.rollout.request_batching import SHORT_TOKENS, RequestBatcher
from distill_workers.rollout.scheduler import SlotScheduler

SIBLINGS, SLOTS = 4, 16
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int, *, session: bool = False) -> float:
    """Of a process, or of all of its session."""
    seconds = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(path.parts[2]) == pid or (session and int(fields[3]) == pid):
            seconds += (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


async def measure(model: str, prompts: list[list[int]], rounds: int, folder: Path) -> dict[str, Any]:
    manifest = {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": "handover"},
        "spec": {
            "accelerator": "none",
            "student": {"model": model},
            "teacher": {"model": model},
            "data": {"prompts": {"path": "/prompts.jsonl"}},
            "rollout": {"maxPromptTokens": 64, "maxResponseTokens": 64},
            "schedule": {"steps": 1},
            "output": {"path": str(folder)},
        },
    }
    connect(None)
    engine = RayEngine(0, parse_job(manifest), local=True, log_folder=str(folder))
    await engine.start(model)
    where = await engine.info()
    batcher = RequestBatcher(engine)

    async def alone(request: Request) -> Response:
        [response] = await engine.generate([request])
        return response

    ways: dict[str, Any] = {
        "each alone": alone,
        "together": batcher.generate,
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, generate in ways.items():
            scheduler = SlotScheduler(SLOTS)
            scheduler.add(0)

            async def one(request: Request, generate: Any = generate, scheduler: SlotScheduler = scheduler) -> int:
                engine_number = await scheduler.acquire()
                try:
                    return len((await generate(request)).ids)
                finally:
                    scheduler.release(engine_number)

            def spent() -> tuple[float, float, float, float]:
                server = cpu_seconds(where["server_pid"], session=True)
                return time.monotonic(), time.process_time(), cpu_seconds(where["pid"]), server

            before = spent()
            requests = [Request(ids, seed, SHORT_TOKENS) for ids in prompts for seed in range(SIBLINGS)]
            lengths = await asyncio.gather(*map(one, requests))
            costs = [1000 * (b - a) / len(requests) for a, b in zip(before, spent(), strict=True)]
            names = ("wall", "trainer", "actor", "server")
            line = dict(zip(names, costs, strict=True)) | {"cpu": sum(costs[1:]), "tokens": statistics.fmean(lengths)}
            if number:  # the first warms up
                found[way].append(line)
    await engine.stop()
    disconnect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    models = Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache" / "distillation-operator")) / "models"
    arithmetic = models / "arithmetic"
    parser.add_argument(
        "--model", default=str(arithmetic / "student"), help="folder of a model whose responses are short"
    )
    parser.add_argument("--prompts", type=Path, default=arithmetic / "train.jsonl", help="a .jsonl with a field prompt")
    parser.add_argument("--prompts-per-round", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()[: args.prompts_per_round]]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(args.model, prompts, args.rounds, Path(folder)))
    print("| way | CPU ms/response | trainer | actor | server | wall | tokens |\n" + "| --- " * 7 + "|")
    for way, lines in found.items():
        values = [statistics.median(line[key] for line in lines) for key in ("trainer", "actor", "server", "wall")]
        cpu = sorted(line["cpu"] for line in lines)
        shown = " | ".join(f"{value:.2f}" for value in values)
        tokens = statistics.fmean(line["tokens"] for line in lines)
        print(f"| {way} | {statistics.median(cpu):.2f} [{cpu[0]:.2f}–{cpu[-1]:.2f}] | {shown} | {tokens:.1f} |")
    print(json.dumps({"bench": "handover", "ways": found}))


if __name__ == "__main__":
    main()
