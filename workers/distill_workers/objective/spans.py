"""Spans: the divergence from a teacher with another tokenizer, over runs of tokens that are the same text to both.

In a span of n tokens of the student, which the teacher has as m tokens z of its own, all given what stands before,
    d_span = sum_n log pi(y) - sum_m log q(z)
is the reward of the span, negated: neither its tokens nor the teacher's have one by themselves. The spans of a response
add up to log pi(response) - log q(its text), and

    E[sum over t in the span of d_span grad log pi(y_t)] = E[d_span grad log pi(span)] = grad KL(pi(span) || q(span))

so each token of a span is given the whole d_span, and not its n-th part. Where each token is a span this is the
sampled-token form itself. Of a span that an engine drew with other probabilities mu, each token has the weight of the
whole span for the same reason, pi(span) / mu(span).

What it is not:
- the divergence of texts. A text has several tokenizations; the teacher's is the one that its tokenizer makes, whose
  log-prob is at most that of the text. Over whole responses the expected sum is KL(P || Q) of the texts, plus what the
  teacher gives to its other tokenizations, E[log Q(text) - log q(text)], less the entropy of the student's own ones,
  H(tokens | text). Both are 0 for models that write each text in one way.
- exact where a text's tokens depend on what follows it. The equation takes the end of a span as known by its own
  tokens. After "cat" the student's "s" may be one token with it to the teacher, "cats": then the penalty of "s" has
  d of "cat" in it, and that of " sat" has not. In a language made of such pairs 0.2 to 9 % of the divergence remain.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spans:
    """The spans of response tokens; without `ends`, each token is one."""

    ends: torch.Tensor | None
    """[tokens], bool: the last token of each span. The last one of a response always is."""

    def totals(self, values: torch.Tensor) -> torch.Tensor:
        """Return at each token the sum over its span: [tokens]."""
        if self.ends is None:
            return values
        number, counts = self._numbers(self.ends)
        return values.new_zeros(len(counts)).index_add(0, number, values)[number]

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Return at each token the mean over its span: [tokens]. They add up to what the values do."""
        return self.shares(self.totals(values))

    def shares(self, totals: torch.Tensor) -> torch.Tensor:
        """Return at each token an equal share of the total of its span: [tokens], from totals [tokens]."""
        if self.ends is None:
            return totals
        number, counts = self._numbers(self.ends)
        return totals / counts[number]

    def at_end(self, values: torch.Tensor) -> torch.Tensor:
        """Return at each token the value at the last token of its span: [tokens]."""
        if self.ends is None:
            return values
        number, counts = self._numbers(self.ends)
        return values[counts.cumsum(0) - 1][number]

    @staticmethod
    def single(ends: torch.Tensor) -> torch.Tensor:
        """Return which tokens are a span by themselves: [tokens], bool."""
        return ends & torch.cat([ends.new_ones(1), ends])[:-1]

    @staticmethod
    def _numbers(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the number of each token's span [tokens], and the tokens of each [spans]."""
        number = ends.cumsum(0) - ends.long()
        return number, torch.bincount(number)


ONE_TOKEN_EACH = Spans(None)
"""The spans of a teacher with the student's tokenizer."""
