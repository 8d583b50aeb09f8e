"""Estimates from a few responses to each of many prompts: means and pass@k, with 95 % confidence intervals.

The responses to one prompt depend on each other, so a prompt is the unit (clustered standard errors, Miller,
arXiv 2411.00640).
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Z = 1.959964
"""Of a two-sided 95 % interval of the normal distribution."""
PASSING = 1.0
"""A response with such a reward, or a higher one, solves its prompt."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mean_score(rewards: Sequence[Sequence[float]]) -> Estimate | None:
    """Mean reward of `rewards` [prompt][response]: every prompt counts alike. None without any."""
    graded = [group for group in rewards if group]
    return interval([statistics.fmean(group) for group in graded], sum(map(len, graded)))


def pass_at_k(rewards: Sequence[Sequence[float]]) -> dict[int, Estimate]:
    """Pass@k for k = 1, 2, 4 … and for the whole number of responses, of `rewards` [prompt][response].

    A prompt with fewer than k rewards is left out of that k.
    """
    whole = max(map(len, rewards), default=0)
    found: dict[int, Estimate] = {}
    for k in powers(whole):
        groups = [[r >= PASSING for r in group] for group in rewards if len(group) >= k]
        solved = [solves(len(group), sum(group), k) for group in groups]
        estimate = interval(solved, sum(map(len, groups)))
        if estimate is not None:
            found[k] = estimate
    return found


def powers(whole: int) -> Iterator[int]:
    k = 1
    while k < whole:
        yield k
        k *= 2
    if whole:
        yield whole


def solves(n: int, correct: int, k: int) -> float:
    """Probability that one of k of the n responses is correct: 1 - C(n - c, k) / C(n, k), the unbiased estimator
    (Chen et al., arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def interval(means: Sequence[float], responses: int) -> Estimate | None:
    """Mean of the prompts' means, with the normal interval; for values between 0 and 1 Wilson's, which does not shrink
    to nothing where all prompts are solved, or none, at the effective sample size (Dean and Pagano 2015): the number of
    independent samples with the variance that was seen between prompts, at most as many as there are responses."""
    if not means:
        return None
    prompts, p = len(means), statistics.fmean(means)
    variance = statistics.variance(means) / prompts if prompts > 1 else math.inf
    if not all(0 <= m <= 1 for m in means):
        half = Z * math.sqrt(variance)
        return Estimate(p, p - half, p + half)
    if prompts == 1 or p in (0.0, 1.0):
        n = float(prompts)
    else:
        n = min(float(responses), p * (1 - p) / variance) if variance else float(responses)
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))
