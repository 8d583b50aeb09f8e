"""Memory and time of divergences from hidden states and output heads, forward and backward, beside TRL's.

    bench/.venv/bin/python bench/divergence.py [--rounds 3] [--tokens 2048] [--time-tokens 512] [--hidden 256]

    (PYTHONPATH=crds:workers; bench/.venv is of `python3 -m uv venv bench/.venv` and
    `python3 -m uv pip sync --require-hashes --python bench/.venv/bin/python bench/requirements.lock`)

Each run is a process of its own, in turns. Extra memory is the highest resident set during forward and backward, less
what was there before and the gradients of hidden states and head, which everybody needs. It is measured with --tokens
(GKD with --gkd-tokens, times the ratio, as its logits and copies would not fit), in a fresh process with malloc as it
is. Time is CPU seconds of a second call with --time-tokens, after a first has touched the memory: `keeps` where malloc
was told to keep freed pages (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of 64 GiB), `as is` where not. fp32, one
thread unless OMP_NUM_THREADS says otherwise. Prints a Markdown table (medians, ranges) and one line of JSON.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

TOP_K = 64
KEEPS = {"MALLOC_MMAP_THRESHOLD_": str(2**36), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of hidden, head, teacher's hidden, teacher's head: the mean over tokens."""


def gkd(beta: float) -> Loss:
    from trl.experimental.gkd import GKDTrainer

    def loss(hidden: torch.Tensor, head: torch.Tensor, t_hidden: torch.Tensor, t_head: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = t_hidden @ t_head.t()
        student = hidden @ head.t()
        # Without labels, whose mask would cost it one copy more.
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum") / len(hidden)

    return loss


def chunked(beta: float) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(hidden: torch.Tensor, head: torch.Tensor, t_hidden: torch.Tensor, t_head: torch.Tensor) -> torch.Tensor:
        return ChunkedDivergenceFunction.apply(hidden, head, None, t_hidden, t_head, None, beta)[0].mean()

    return loss


def own(name: str, chunk: int) -> Loss:
    from vocabulary_divergence import vocabulary_divergence

    from distill_api.spec.job_spec import Divergence

    def loss(hidden: torch.Tensor, head: torch.Tensor, t_hidden: torch.Tensor, t_head: torch.Tensor) -> torch.Tensor:
        weights = torch.full((len(hidden),), 1 / len(hidden))
        return vocabulary_divergence(Divergence(name), hidden, head, t_hidden, t_head, weights, chunk_tokens=chunk)[0]

    return loss


def own_top() -> Loss:
    """What training does with support top-k: the teacher's top-k are there, as numbers."""
    from distill_api.spec.job_spec import Divergence
    from distill_workers.megatron.logprobs import Vocabulary, token_logprobs
    from distill_workers.objective.divergences import support_divergence

    def loss(hidden: torch.Tensor, head: torch.Tensor, t_hidden: torch.Tensor, t_head: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, len(head), (len(hidden), TOP_K), generator=generator)
        teacher = torch.full(ids.shape, 0.9 / TOP_K).log()
        student, _ = token_logprobs(hidden, head, ids, Vocabulary(0, len(head), None))
        return support_divergence(Divergence.JSD, student, teacher).mean()

    return loss


CASES: dict[str, tuple[str, str, Callable[[], Loss]]] = {
    "gkd-jsd": ("JSD", "TRL GKD generalized_jsd_loss", lambda: gkd(0.5)),
    "chunked-jsd": ("JSD", "TRL chunked kernel", lambda: chunked(0.5)),
    "own-jsd": ("JSD", "own, 256 tokens", lambda: own("jsd", 256)),
    "own64-jsd": ("JSD", "own, 64 tokens", lambda: own("jsd", 64)),
    "gkd-rkl": ("reverse KL", "TRL GKD generalized_jsd_loss", lambda: gkd(1.0)),
    "chunked-rkl": ("reverse KL", "TRL chunked kernel", lambda: chunked(1.0)),
    "own-rkl": ("reverse KL", "own, 256 tokens", lambda: own("reverse-kl", 256)),
    "own-top": ("JSD, top-64 and tail", "own, token_logprobs", own_top),
}


def tensors(tokens: int, hidden: int, vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # Logits of standard deviation 3, of which student and teacher share the larger part.
    scale = 3 / hidden**0.5
    state, head = random(tokens, hidden), random(vocabulary, hidden).mul_(scale)
    t_state = state + 0.3 * random(tokens, hidden)
    t_head = random(vocabulary, hidden).mul_(0.3 * scale).add_(head)
    return [state.requires_grad_(), head.requires_grad_(), t_state, t_head]


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def child(case: str, tokens: int, hidden: int, vocabulary: int, calls: int) -> None:
    """Prints what the last of some calls took, and the memory of the first."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    loss = CASES[case][2]()
    # Libraries load and allocate on first use.
    loss(*tensors(4, hidden, 64)).backward()
    given = tensors(tokens, hidden, vocabulary)
    found: dict[str, float] = {}
    for call in range(calls):
        given[0].grad = given[1].grad = None
        gc.collect()
        if call == 0:
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts anew
            before = status("VmRSS")
        cpu, wall = time.process_time(), time.monotonic()
        value = loss(*given)
        value.backward()
        found |= {"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall, "loss": value.item()}
        if call == 0:
            gradients = sum(g.grad.numel() * 4 for g in given[:2])
            found["extra"] = status("VmHWM") - before - gradients
    found["norm"] = sum(g.grad.double().square().sum().item() for g in given[:2]) ** 0.5
    print(json.dumps(found))


def run(case: str, tokens: int, given: argparse.Namespace, calls: int, environment: dict[str, str]) -> dict[str, float]:
    sizes = {"tokens": tokens, "calls": calls, "hidden": given.hidden, "vocabulary": given.vocabulary}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    command = [sys.executable, "-W", "ignore", __file__, "--child", case, *options]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{case} {tokens} tokens: {found}", file=sys.stderr, flush=True)
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {n: round(f(values), 3) for n, f in (("median", statistics.median), ("min", min), ("max", max))}


def shown(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} [{values['min']:.2f}–{values['max']:.2f}]"


def ratios(numerators: list[dict[str, float]], denominators: list[dict[str, float]]) -> dict[str, float]:
    return summary([a["cpu"] / b["cpu"] for a, b in zip(numerators, denominators, strict=True)])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--tokens", type=int, default=2048, help="for memory")
    arguments.add_argument("--gkd-tokens", type=int, default=512, help="for the memory of TRL's GKD")
    arguments.add_argument("--time-tokens", type=int, default=512)
    arguments.add_argument("--hidden", type=int, default=256)
    arguments.add_argument("--vocabulary", type=int, default=151_936)
    arguments.add_argument("--case", action="append", choices=CASES)
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    arguments.add_argument("--calls", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(given.child, given.tokens, given.hidden, given.vocabulary, given.calls)
        return
    cases = given.case or list(CASES)
    memory: dict[str, float] = {}
    for case in cases:
        tokens = min(given.gkd_tokens, given.tokens) if case.startswith("gkd") else given.tokens
        memory[case] = run(case, tokens, given, 1, {})["extra"] * given.tokens / tokens / 1e6
    times: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, environment in (("keeps", KEEPS), ("as is", {})):
        times[name] = {case: [] for case in cases}
        for number in range(given.rounds):
            for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
                times[name][case].append(run(case, given.time_tokens, given, 2, environment))
    print(f"{given.tokens} x {given.vocabulary}, hidden {given.hidden}, fp32, {os.environ['OMP_NUM_THREADS']} thread;")
    print(f"times of {given.time_tokens} tokens, {given.rounds} rounds; medians [range].\n")
    print("| divergence | of | extra MB | CPU s, keeps | to GKD | to chunked | CPU s, as is | to GKD | to chunked |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: dict[str, Any] = {}
    for case in cases:
        kind, title, _ = CASES[case]
        row: dict[str, Any] = {"extra_mb": round(memory[case], 1)}
        cells = []
        suffix = "jsd" if case.endswith(("jsd", "top")) else "rkl"
        for name, of_all in times.items():
            row[name] = {"cpu": summary([t["cpu"] for t in of_all[case]])}
            cells.append(shown(row[name]["cpu"]))
            for peer in (f"gkd-{suffix}", f"chunked-{suffix}"):
                if peer in of_all:
                    row[name][peer] = ratios(of_all[case], of_all[peer])
                cells.append(shown(row[name][peer]) if peer in of_all else "")
        row |= {key: times["keeps"][case][0][key] for key in ("loss", "norm")}
        rows[case] = row
        print(f"| {kind} | {title} | {memory[case]:.0f} | {' | '.join(cells)} |")
    print("\n" + json.dumps({"bench": "divergence", "tokens": given.tokens, "hidden": given.hidden, "cases": rows}))


if __name__ == "__main__":
    main()
