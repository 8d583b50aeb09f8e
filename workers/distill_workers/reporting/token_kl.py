"""The reverse KL of single tokens: where on a step's responses the student is far from its teacher.

The k1 estimate of one token, log mu(y_t) - log pi_T(y_t), by the log-probs that came with the samples: mu is the policy
that drew the token. Its mean differs from the trainer's own reverse KL by the trainer-engine gap.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from distill_workers.data.sample import Sample

Floats = npt.NDArray[np.float64]

HIGH_NATS = 1.0
"""The teacher holds a token for less than 1/e as likely as the student did."""


def token_kl(sample: Sample) -> Floats:
    """[response], nats."""
    return np.subtract(sample.engine_logprobs, sample.teacher_logprobs, dtype=np.float64)


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
