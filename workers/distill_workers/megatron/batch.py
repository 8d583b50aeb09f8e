"""Samples to micro-batches: which rank computes which sample, and the tensors of each micro-batch.

Everything is deterministic: every rank is given the same samples and finds the same split. Sequences are padded on the
right to the longest of their micro-batch, which holds samples of like length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_workers.data.sample import Sample

MICRO_BATCH_TOKENS = 512
"""Fixed cost of a micro-batch, in positions: launches, and kernels too small to fill a device."""


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of some samples. `tokens` counts their response tokens, in the order of the samples.

    Tokens that are not trained on (Sample.loss_mask) stand in input_ids alone: no loss is ever computed for them.
    """

    order: list[int]
    """Position of each sample in the list that the split was made of."""
    input_ids: torch.Tensor
    """[samples, sequence]: prompt and response without its last token, which predicts nothing."""
    rows: torch.Tensor
    """[tokens]: where, in hidden states [sequence * samples], the prediction of each response token stands."""
    targets: torch.Tensor
    """[tokens]: the response tokens that are trained on."""
    engine_logprobs: torch.Tensor
    """[tokens]"""
    teacher_logprobs: torch.Tensor
    """[tokens]; empty where the samples have none."""
    advantages: torch.Tensor
    """[tokens]"""
    lengths: torch.Tensor
    """[samples]: such tokens of each."""
    supervised: torch.Tensor
    """[tokens], bool: of a response that the data set wrote."""
    support_ids: torch.Tensor
    """[tokens, k]: the teacher's top-k; k is 0 without."""
    teacher_support_logprobs: torch.Tensor
    """[tokens, k]"""
    teacher_coefficients: torch.Tensor
    """[tokens]: factor of the divergence of each."""
    baselines: torch.Tensor
    """[tokens]: of objective.baseline leave-one-out or batch-mean, nats."""
    reference_logprobs: torch.Tensor
    """[tokens]; empty without objective.reference."""
    span_ends: torch.Tensor | None
    """[tokens], bool (Sample.span_ends); None where each token of all samples was scored by itself."""
    translated: torch.Tensor
    """[tokens], bool: of a sample that a teacher with a tokenizer of its own scored."""

    @property
    def positions(self) -> torch.Tensor:
        """[tokens]: where in its sequence each response token is predicted."""
        return self.rows // len(self.input_ids)

    @property
    def sampled_in_support(self) -> torch.Tensor:
        """[tokens], bool: the sampled token is one of the top-k."""
        return (self.support_ids == self.targets[:, None]).any(-1)


def share(samples: Sequence[Sample], loads: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the indices of the samples of each data parallel rank. Samples without a token to train on are left out.

    Each rank gets neighbours in the order of lengths, since a micro-batch is padded to its longest sample; the least
    loaded rank the longest. The cuts are where the rank with the most to do has the least, to one in a hundred.
    loads [ranks]: the `cost` of what each has been given in this step already.
    """
    order = _longest_first(samples, [i for i, s in enumerate(samples) if s.trained_tokens])
    lengths = [samples[i].tokens for i in order]
    ranks = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    # The upper bound holds even if one rank computes everything.
    low, high = 0, max(loads) + sum(lengths) + MICRO_BATCH_TOKENS * len(lengths)
    ends = _ends(lengths, [loads[rank] for rank in ranks], high, max_tokens)
    while high - low > 1 + high // 100:
        middle = (low + high) // 2
        found = _ends(lengths, [loads[rank] for rank in ranks], middle, max_tokens)
        if found is None:
            low = middle
        else:
            high, ends = middle, found
    assert ends is not None  # there is room for everything on one rank
    shares: list[list[int]] = [[] for _ in loads]
    for rank, begin, end in zip(ranks, [0, *ends], ends, strict=False):
        shares[rank] = order[begin:end]
    return shares


def cost(samples: Sequence[Sample], indices: Sequence[int], max_tokens: int) -> int:
    """Return the cost of the samples in positions: padded ones, and MICRO_BATCH_TOKENS for each micro-batch."""
    lengths = [samples[i].tokens for i in _longest_first(samples, indices)]
    return max((total for total, _ in _cheapest_cuts(lengths, max_tokens)), default=0)


def split(samples: Sequence[Sample], indices: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the indices of each micro-batch: samples x longest stays within max_tokens, except that one sample always
    may.

    Of all cuts of the samples in the order of their lengths, the one that computes the least: see `cost`.
    """
    order = _longest_first(samples, indices)
    begins = [begin for _, begin in _cheapest_cuts([samples[i].tokens for i in order], max_tokens)]
    batches: list[list[int]] = []
    end = len(order)
    while end:
        begin = begins[end - 1]
        batches.append(order[begin:end])
        end = begin
    return batches[::-1]


def micro_batches(
    samples: Sequence[Sample],
    indices: Sequence[int],
    max_tokens: int,
    device: torch.device,
    *,
    scored: bool = True,
    at_least: int = 0,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of the samples at `indices`. `scored`: the samples have the teacher's log-probs.

    At least `at_least` micro-batches: those that are missing have one position and no response token.
    """
    orders = split(samples, indices, max_tokens)
    for order in orders:
        yield collate([samples[i] for i in order], order, device, scored=scored)
    for _ in range(len(orders), at_least):
        yield filler(samples, device)


def filler(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    """Return a micro-batch of one position and no response token, which adds nothing to a step of the samples."""
    ids, values = torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, device=device)
    k = next((s.teacher_top_ids.shape[1] for s in samples if s.teacher_top_ids is not None), 0)
    return MicroBatch(
        order=[],
        input_ids=ids.new_zeros(1, 1),
        rows=ids,
        targets=ids,
        engine_logprobs=values,
        teacher_logprobs=values,
        advantages=values,
        lengths=ids,
        supervised=ids.bool(),
        support_ids=ids.view(0, k),
        teacher_support_logprobs=values.view(0, k),
        teacher_coefficients=values,
        baselines=values,
        reference_logprobs=values,
        span_ends=None,
        translated=ids.bool(),
    )


def collate(samples: Sequence[Sample], order: list[int], device: torch.device, *, scored: bool) -> MicroBatch:
    """Return one micro-batch on the device. Raises ValueError when a sample's per-token lists disagree in length."""
    length = max(s.tokens for s in samples) - 1
    input_ids = torch.zeros(len(samples), length, dtype=torch.long)
    rows: list[torch.Tensor] = []
    for column, sample in enumerate(samples):
        _check(sample, scored)
        ids = sample.prompt_ids + sample.response_ids[:-1]
        input_ids[column, : len(ids)] = torch.tensor(ids)
        # The logits at a position predict the next token: the first response token stands at the prompt's last.
        positions = torch.arange(len(sample.prompt_ids) - 1, len(ids))
        if sample.loss_mask is not None:
            positions = positions[torch.tensor(sample.loss_mask)]
        rows.append(positions * len(samples) + column)
    floats = torch.float32

    def per_token(values: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([v for of_sample in values for v in of_sample], dtype=floats, device=device)

    counts = [s.trained_tokens for s in samples]
    lengths, tokens = torch.tensor(counts, device=device), sum(counts)
    support_ids = torch.zeros(tokens, 0, dtype=torch.long, device=device)
    support_logprobs = torch.zeros(tokens, 0, dtype=floats, device=device)
    if scored and samples[0].teacher_top_ids is not None:
        of_all = [_rows(s, s.teacher_top_ids) for s in samples if s.teacher_top_ids is not None]
        support_ids = torch.from_numpy(np.concatenate(of_all)).to(device, torch.long)
        logprobs_of_all = [_rows(s, s.teacher_top_logprobs) for s in samples if s.teacher_top_logprobs is not None]
        support_logprobs = torch.from_numpy(np.concatenate(logprobs_of_all)).to(device, floats)
    return MicroBatch(
        order=order,
        input_ids=input_ids.to(device),
        rows=torch.cat(rows).to(device),
        targets=torch.tensor([i for s in samples for i in s.trained(s.response_ids)], device=device),
        engine_logprobs=per_token([s.trained(s.engine_logprobs) for s in samples]),
        teacher_logprobs=per_token([s.trained(s.teacher_logprobs) for s in samples] if scored else []),
        advantages=per_token([[s.advantage] * count for s, count in zip(samples, counts, strict=True)]),
        lengths=lengths,
        supervised=torch.tensor([s.supervised for s in samples], device=device).repeat_interleave(lengths),
        support_ids=support_ids,
        teacher_support_logprobs=support_logprobs,
        teacher_coefficients=torch.tensor([s.coefficient for s in samples], device=device).repeat_interleave(lengths),
        baselines=per_token([[s.baseline] * count for s, count in zip(samples, counts, strict=True)]),
        reference_logprobs=per_token([s.trained(s.reference_logprobs) for s in samples if s.reference_logprobs]),
        span_ends=_span_ends(samples, device) if scored else None,
        translated=torch.tensor([s.span_ends is not None for s in samples], device=device).repeat_interleave(lengths),
    )


def _span_ends(samples: Sequence[Sample], device: torch.device) -> torch.Tensor | None:
    if all(s.span_ends is None for s in samples):
        return None
    ends = (s.trained(s.span_ends or [True] * len(s.response_ids)) for s in samples)
    return torch.tensor([end for of_sample in ends for end in of_sample], dtype=torch.bool, device=device)


def _rows(sample: Sample, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows of [response, k] whose tokens are trained on."""
    return values if sample.loss_mask is None else values[np.array(sample.loss_mask)]


def _ends(lengths: Sequence[int], loads: Sequence[int], limit: int, max_tokens: int) -> list[int] | None:
    """Return where each rank's run of the lengths ends if none may exceed the limit; None if some are left over.

    lengths descending; loads [ranks].
    """
    ends: list[int] = []
    at = 0
    for load in loads:
        for total, _ in _cheapest_cuts(lengths[at:], max_tokens):
            if load + total > limit:
                break
            at += 1
        ends.append(at)
    return ends if at == len(lengths) else None


def _cheapest_cuts(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield for each of the descending lengths the least cost up to it, and where its micro-batch begins then."""
    least = [0]
    for end in range(1, len(lengths) + 1):
        found: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            # The first sample of a micro-batch is its longest.
            padded = (end - begin) * lengths[begin]
            if padded > max_tokens and found:
                break
            found.append((least[begin] + padded + MICRO_BATCH_TOKENS, begin))
        best = min(found)
        least.append(best[0])
        yield best


def _longest_first(samples: Sequence[Sample], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda i: (-samples[i].tokens, i))


def _check(sample: Sample, scored: bool) -> None:
    expected = len(sample.response_ids)
    lengths = {"engine_logprobs": len(sample.engine_logprobs)}
    if sample.loss_mask is not None:
        lengths["loss_mask"] = len(sample.loss_mask)
    if sample.reference_logprobs:
        lengths["reference_logprobs"] = len(sample.reference_logprobs)
    if scored:
        lengths["teacher_logprobs"] = len(sample.teacher_logprobs)
        if sample.span_ends is not None:
            lengths["span_ends"] = len(sample.span_ends)
        for name in ("teacher_top_ids", "teacher_top_logprobs"):
            rows = getattr(sample, name)
            if rows is not None:
                lengths[name] = len(rows)
    wrong = {name: length for name, length in lengths.items() if length != expected}
    if wrong or not sample.prompt_ids:
        raise ValueError(
            f"sample of prompt {sample.prompt_index}: {expected} response tokens after {len(sample.prompt_ids)} prompt "
            f"tokens (at least 1 is needed), but {wrong or 'no prompt'}"
        )
