"""Sampling by seed in a CPU SGLang server: a token depends on its request's seed, its position and its logits only.

SGLang has that under --enable-deterministic-inference, which needs CUDA attention kernels and a hash kernel that has
no CPU build. So its two ends are replaced here: every batch carries the seeds of its requests, and a token is a
Gumbel-max (argmax of log p - log E, E exponential) with a torch generator per row, seeded by (seed, position).
What a server has sampled before plays no part: a resumed run samples the same tokens. Together with one request
at a time and no prefix cache (distill_workers.serving.server) the logits repeat to the last bit as well.
"""

from typing import Any

import torch

UNSEEDED = 42
"""SGLang's own default of a request without sampling_seed."""


def mix(seed: int, position: int) -> int:
    """Return splitmix64 of both, so that neighbouring seeds and positions have unrelated generators."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def sample(logprobs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Sample one index for each row: [rows, 1]. seeds and positions are [rows], logprobs is [rows, vocabulary]."""
    noise = torch.empty_like(logprobs, dtype=torch.float64)
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        noise[row].exponential_(generator=torch.Generator().manual_seed(mix(seed, position)))
    return (logprobs.to(torch.float64) - noise.log_()).argmax(dim=1, keepdim=True)


def install() -> None:
    """Replace SGLang's sampler by `sample`, for this process."""
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    original = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls: Any, batch: Any, vocab_size: int) -> Any:
        info = original(cls, batch, vocab_size)
        seeds = [r.sampling_params.sampling_seed for r in batch.reqs]
        info.sampling_seed = torch.tensor([UNSEEDED if s is None else s for s in seeds], dtype=torch.int64)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.multinomial_with_seed = sample
