"""The reverse KL of single tokens: where on a step's responses the student is far from its teacher.

The k1 estimate of one token, log mu(y_t) - log pi_T(y_t), by the log-probs that came with the samples: mu is the policy
that drew the token. Its mean differs from the trainer's own reverse KL by the trainer-engine gap.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from distill_workers.data.sample import Sample

Floats = npt.NDArray[np.float64]

TURNS = 16
"""Turns of a conversation that are reported each by itself, from the first."""
HIGH_NATS = 1.0
"""The teacher holds a token for less than 1/e as likely as the student did."""


def token_kl(sample: Sample) -> Floats:
    """[trained], nats: of the student's own tokens. In a span (Sample.span_ends) each token has the span's mean: how a
    teacher with another tokenizer would divide it between them is not known."""
    engine, teacher = sample.trained(sample.engine_logprobs), sample.trained(sample.teacher_logprobs)
    gaps: Floats = np.subtract(engine, teacher, dtype=np.float64)
    if sample.span_ends is None or not gaps.size:
        return gaps
    counts = np.diff(np.flatnonzero(sample.trained(sample.span_ends)), prepend=-1)
    means = np.add.reduceat(gaps, np.cumsum(counts) - counts) / counts
    return np.repeat(means, counts)


def turns(samples: list[Sample]) -> dict[str, dict[str, float]] | None:
    """For each of the first TURNS turns, by its number: samples that have it, mean tokens, and mean reverse_kl over its
    tokens, nats. None where no sample is a conversation."""
    # A teacher with another tokenizer masks tokens of single responses; conversations have none.
    if all(sample.loss_mask is None or sample.span_ends is not None for sample in samples):
        return None
    drawn: dict[int, list[Floats]] = {}
    for sample in samples:
        ends = np.cumsum([len(turn) for turn in sample.turns])
        for number, part in enumerate(np.split(token_kl(sample), ends[:-1])[:TURNS], start=1):
            drawn.setdefault(number, []).append(part)
    found: dict[str, dict[str, float]] = {}
    for number, parts in sorted(drawn.items()):
        tokens = np.concatenate(parts)
        mean = len(tokens) / len(parts)
        found[str(number)] = {"samples": len(parts), "tokens": mean, "reverse_kl": float(tokens.mean())}
    return found


def summary(samples: list[Sample]) -> dict[str, float] | None:
    """mean, p50, p95, max (nats) and high_ratio (share of tokens above HIGH_NATS) of all tokens that the student drew;
    None where it drew none."""
    drawn = [token_kl(sample) for sample in samples if not sample.supervised]
    tokens = np.concatenate(drawn) if drawn else np.empty(0)
    if not tokens.size:
        return None
    middle, late, most = np.quantile(tokens, (0.5, 0.95, 1.0)).tolist()
    high = float((tokens > HIGH_NATS).mean())
    return {"mean": float(tokens.mean()), "p50": middle, "p95": late, "max": most, "high_ratio": high}


def source_kl(samples: list[Sample]) -> dict[str, float]:
    """Mean over the tokens of each named data source, nats."""
    return _kl_by(samples, lambda sample: sample.source)


def teacher_kl(samples: list[Sample]) -> dict[str, float]:
    """Mean over the tokens that each teacher scored, nats, to that teacher."""
    return _kl_by(samples, lambda sample: sample.teacher)


def _kl_by(samples: list[Sample], name_of: Callable[[Sample], str]) -> dict[str, float]:
    drawn: dict[str, list[Floats]] = {}
    for sample in samples:
        if (name := name_of(sample)) and sample.response_ids and not sample.supervised:
            drawn.setdefault(name, []).append(token_kl(sample))
    return {name: float(np.concatenate(parts).mean()) for name, parts in sorted(drawn.items())}
