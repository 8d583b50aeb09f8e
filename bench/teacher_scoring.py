"""What the teacher client costs, beside what slime's on-policy distillation hook does, on one SGLang server.

    workers/.venv/bin/python bench/teacher_scoring.py [--rounds 5] [--prompts 4] [--shape 1024/64]

Each prompt has 8 samples. The variants take turns in each round, every one with prompts that the server has never seen:
  slime      all samples at once, a new connection each, log-probs from position 0, answers parsed by json
  leader     TeacherPool: first sibling alone, then the others, log-probs of the response only
  prefetched the same, with the prompts sent ahead; the clock starts when the responses are there
  no scores  the requests of `leader` without log-probs: what the engine needs anyway
  top JSON   `leader` with the 64 likeliest tokens, as nested JSON lists made into tensors
  top        TeacherPool with the 64 likeliest tokens, into the same tensors
The teacher is a random Qwen3 of 5 M parameters, made here. CPU seconds are those of the server's processes and of this
one; those of `prefetched` contain the prefetch. Prints a Markdown table (medians, ranges) and one line of JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill_api.spec.job_spec import Spec
from distill_workers.metrics import Metrics
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.protocol import TeacherRequest

VOCABULARY, SIBLINGS, TOP_K = 4096, 8, 64
SHAPES = ("1024/64", "256/256", "64/512")
Work = list[tuple[list[int], list[list[int]]]]
"""Prompts, each with its responses."""


@dataclass(frozen=True)
class Cost:
    """Of one variant in one round."""

    wall_seconds: float
    server_seconds: float
    client_seconds: float
    received_bytes: int

    @property
    def cpu_seconds(self) -> float:
        return self.server_seconds + self.client_seconds


def make_teacher(folder: Path) -> int:
    """Its number of parameters."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


class Bench:
    """The variants, and what they cost."""

    def __init__(self, server: SGLangServer, spec: Spec, prompts: int, seed: int) -> None:
        self._server, self._prompts, self._draw = server, prompts, random.Random(seed)
        self._url = f"http://127.0.0.1:{server.port}/generate"
        self._pool = TeacherPool(f"127.0.0.1:{server.port}", spec, Metrics())
        self._received = 0
        self._trace = aiohttp.TraceConfig()
        self._trace.on_response_chunk_received.append(self._count)
        self._trace.freeze()

    async def __aenter__(self) -> "Bench":
        await self._pool.start(60)
        assert self._pool._session is not None
        self._pool._session.trace_configs.append(self._trace)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def _count(self, session: Any, context: Any, chunk: Any) -> None:
        self._received += len(chunk.chunk)

    def work(self, prompt_tokens: int, response_tokens: int) -> Work:
        def ids(count: int) -> list[int]:
            return [self._draw.randrange(2, VOCABULARY - 1) for _ in range(count)]

        return [(ids(prompt_tokens), [ids(response_tokens) for _ in range(SIBLINGS)]) for _ in range(self._prompts)]

    async def cost(self, variant: Callable[["Bench", Work], Awaitable[None]], work: Work) -> Cost:
        ahead = (0.0, 0.0)
        if variant is Bench.prefetched:
            server, client = self._server_seconds(), time.process_time()
            await asyncio.gather(*(self._pool.prefetch(prompt) for prompt, _ in work))
            ahead = self._server_seconds() - server, time.process_time() - client
        self._received = 0
        server, client, wall = self._server_seconds(), time.process_time(), time.monotonic()
        await variant(self, work)
        return Cost(
            time.monotonic() - wall,
            self._server_seconds() - server + ahead[0],
            time.process_time() - client + ahead[1],
            self._received,
        )

    def _server_seconds(self) -> float:
        main = psutil.Process(self._server.pid)
        return sum(sum(p.cpu_times()[:2]) for p in [main, *main.children(recursive=True)])

    async def slime(self, work: Work) -> None:
        async def one(prompt: list[int], response: list[int]) -> list[float]:
            body = {
                "input_ids": prompt + response,
                "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            async with (
                aiohttp.ClientSession(trace_configs=[self._trace]) as session,
                session.post(self._url, json=body) as answer,
            ):
                answer.raise_for_status()
                scores = await answer.json()
            values = [entry[0] for entry in scores["meta_info"]["input_token_logprobs"][1:]]
            return torch.tensor(values, dtype=torch.float32)[-len(response) :].tolist()

        await asyncio.gather(*(one(prompt, response) for prompt, responses in work for response in responses))

    async def leader(self, work: Work) -> None:
        await asyncio.gather(*(self._pool.score(p, r, None) for p, responses in work for r in responses))

    async def prefetched(self, work: Work) -> None:
        await self.leader(work)

    async def no_scores(self, work: Work) -> None:
        async def one(prompt: list[int], response: list[int]) -> None:
            body = {"input_ids": prompt + response, "sampling_params": {"max_new_tokens": 0, "temperature": 0}}
            async with self._pool._affinity.placement(prompt) as place:
                await self._pool._request(TeacherRequest("/generate", body), len(prompt) + len(response), place)

        await asyncio.gather(*(one(prompt, response) for prompt, responses in work for response in responses))

    async def top_json(self, work: Work) -> None:
        async with aiohttp.ClientSession(trace_configs=[self._trace]) as session:

            async def one(prompt: list[int], response: list[int]) -> tuple[list[list[int]], list[list[float]]]:
                body = {
                    "input_ids": prompt + response,
                    "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                    "return_logprob": True,
                    "logprob_start_len": len(prompt) - 1,
                    "top_logprobs_num": TOP_K,
                }
                async with self._pool._affinity.placement(prompt), session.post(self._url, json=body) as answer:
                    answer.raise_for_status()
                    info = json.loads(await answer.read())["meta_info"]
                rows = info["input_top_logprobs"][1:]
                return [[e[1] for e in row] for row in rows], [[e[0] for e in row] for row in rows]

            found = await asyncio.gather(*(one(p, r) for p, responses in work for r in responses))
        torch.tensor([row for ids, _ in found for row in ids])
        torch.tensor([row for _, logprobs in found for row in logprobs], dtype=torch.float32)

    async def top(self, work: Work) -> None:
        found = await asyncio.gather(*(self._pool.score(p, r, TOP_K) for p, responses in work for r in responses))
        # As megatron.batch.collate makes its tensors.
        torch.from_numpy(np.concatenate([s.top_ids for s in found if s.top_ids is not None])).to(torch.long)
        torch.from_numpy(np.concatenate([s.top_logprobs for s in found if s.top_logprobs is not None]))


VARIANTS: dict[str, Callable[[Bench, Work], Awaitable[None]]] = {
    "slime": Bench.slime,
    "leader": Bench.leader,
    "prefetched": Bench.prefetched,
    "no scores": Bench.no_scores,
    "top JSON": Bench.top_json,
    "top": Bench.top,
}


async def measure(bench: Bench, shape: str, rounds: int) -> dict[str, list[Cost]]:
    prompt_tokens, response_tokens = (int(n) for n in shape.split("/"))
    costs: dict[str, list[Cost]] = {name: [] for name in VARIANTS}
    names = list(VARIANTS)
    for number in range(rounds):
        # Another one begins in each round: none always follows the heaviest.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            costs[name].append(await bench.cost(VARIANTS[name], bench.work(prompt_tokens, response_tokens)))
    return costs


def summary(values: list[float]) -> dict[str, float]:
    return {n: round(f(values), 3) for n, f in (("median", statistics.median), ("min", min), ("max", max))}


def shown(values: dict[str, float], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} [{values['min']:.{digits}f}–{values['max']:.{digits}f}]"


def report(shape: str, prompts: int, costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Prints the rows of the table; what they say."""
    samples, tokens = prompts * SIBLINGS, prompts * SIBLINGS * int(shape.split("/")[1])
    found: dict[str, Any] = {}
    for name, own in costs.items():
        found[name] = row = {
            "wall_ratio": summary([s.wall_seconds / c.wall_seconds for s, c in zip(costs["slime"], own, strict=True)]),
            "cpu_ratio": summary([s.cpu_seconds / c.cpu_seconds for s, c in zip(costs["slime"], own, strict=True)]),
            "server_ms": summary([c.server_seconds / samples * 1e3 for c in own]),
            "client_us_per_token": summary([c.client_seconds / tokens * 1e6 for c in own]),
            "bytes": round(own[0].received_bytes / samples),
            "tokens_per_second": summary([tokens / c.wall_seconds for c in own]),
        }
        print(
            f"| {shape} | {name} | {shown(row['wall_ratio'])} | {shown(row['cpu_ratio'])} "
            f"| {shown(row['server_ms'], 0)} | {shown(row['client_us_per_token'], 1)} | {row['bytes']} "
            f"| {shown(row['tokens_per_second'], 0)} |",
            flush=True,
        )
    bare = [n.cpu_seconds / c.cpu_seconds for n, c in zip(costs["no scores"], costs["leader"], strict=True)]
    found["leader"]["of_no_scores_cpu"] = summary(bare)
    print(f"\n{shape}: leader {shown(summary(bare))} of the speed of the same requests without log-probs (CPU)\n")
    return found


async def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--prompts", type=int, default=4, help="of each variant in each round, 8 samples each")
    arguments.add_argument("--shape", action="append", help=f"prompt/response tokens; {', '.join(SHAPES)} if not given")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_teacher(Path(folder))
        spec = Spec.model_validate(
            {
                "accelerator": "none",
                "student": {"model": folder},
                "teacher": {"model": folder},
                "data": {"prompts": {"path": "/none"}},
                "rollout": {"maxPromptTokens": 2048, "maxResponseTokens": 1024},
                "schedule": {"steps": 1},
            }
        )
        server = SGLangServer(folder, spec, "teacher", port=reserve_port(), log=Path(folder, "server.log"))
        server.start()
        try:
            server.wait_ready(240)
            async with Bench(server, spec, given.prompts, seed=0) as bench:
                for variant in VARIANTS.values():
                    await bench.cost(variant, bench.work(64, 64)[:1])
                print(f"Teacher of {parameters / 1e6:.1f} M parameters, {given.prompts} prompts x {SIBLINGS} samples,")
                print(f"{given.rounds} rounds; medians [range].\n")
                print("| prompt/response | variant | wall, slime / it | CPU, slime / it | server ms a sample ", end="")
                print("| client µs a token | bytes a sample | response tokens/s |")
                print("|---|---|---|---|---|---|---|---|", flush=True)
                found = {}
                for shape in given.shape or SHAPES:
                    costs = await measure(bench, shape, given.rounds)
                    found[shape] = report(shape, given.prompts, costs)
        finally:
            server.stop()
    print(json.dumps({"bench": "teacher_scoring", "parameters": parameters, "rounds": given.rounds, "shapes": found}))


if __name__ == "__main__":
    asyncio.run(main())
