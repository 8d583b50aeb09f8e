"""Means over responses that stand one after the other in a row of tokens, without padding or a loop over tokens.

`lengths` [responses]: tokens of each response; `values` [tokens]: the responses one after the other.
"""

import torch


def response_mean(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return at each token the mean over its response: [tokens], float64."""
    return response_sum(values, lengths) / torch.repeat_interleave(lengths, lengths)


def response_sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return at each token the sum over its response: [tokens], float64."""
    response = torch.repeat_interleave(lengths)  # index of the response, at each token
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return sums.index_add(0, response, values.double()).index_select(0, response)


def highest_share(values: torch.Tensor, lengths: torch.Tensor, share: float) -> torch.Tensor:
    """Return which tokens have the ceil(share n) highest values of their response of n: [tokens], bool.

    Of equals the earlier is taken.
    """
    responses = torch.repeat_interleave(lengths)
    order = values.argsort(descending=True, stable=True)
    order = order[responses[order].argsort(stable=True)]  # response by response, the highest first
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts
    return rank < torch.repeat_interleave((share * lengths.double()).ceil(), lengths)


def future_mean(values: torch.Tensor, lengths: torch.Tensor, discount: float) -> torch.Tensor:
    """Return at each token the discounted mean of the later values of its response: [tokens], in the dtype of values.

    sum_{s>t} discount^(s-t-1) v_s / sum_{s>t} discount^(s-t-1), and 0 at the last token. With discount 1 it is
    R^Norm_{t+1} of MiniLLM (arXiv 2306.08543, section 2.2, length normalisation).
    """
    total, weight = _future_sums(values, lengths, discount)
    mean: torch.Tensor = total / weight.clamp(min=1)
    return mean.to(values.dtype)


def future_sum(values: torch.Tensor, lengths: torch.Tensor, discount: float) -> torch.Tensor:
    """Return at each token the discounted sum of the later values of its response, sum_{s>t} discount^(s-t-1) v_s:
    [tokens], in the dtype of values."""
    total: torch.Tensor = _future_sums(values, lengths, discount)[0]
    return total.to(values.dtype)


def _future_sums(values: torch.Tensor, lengths: torch.Tensor, discount: float) -> torch.Tensor:
    """Return the discounted sums of the later values and of as many ones: [2, tokens], float64.

    By doubling: from sums of the next n terms, S_n(t), come those of 2n, S_n(t) + discount^n S_n(t + n).
    """
    if not len(values):
        return values.double().expand(2, 0)
    places = torch.arange(len(values), device=values.device)
    later = torch.repeat_interleave(lengths.cumsum(0), lengths) - 1 - places  # tokens after this one in its response

    def ahead(of: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the values so many tokens later in the same response, or 0: [2, tokens]."""
        found = of[:, (places + tokens).clamp(max=len(values) - 1)]
        return torch.where(later >= tokens, found, 0.0)

    sums = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)])
    reach, longest = 1, int(lengths.max())
    while reach < longest:
        sums = sums + discount**reach * ahead(sums, reach)
        reach *= 2
    return ahead(sums, 1)
