"""The divergence from a teacher with another tokenizer, against sums over every response of a tiny language."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from itertools import product

import pytest
import torch

from distill_api.spec.job_spec import Objective
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.objective.loss import token_losses
from distill_workers.objective.spans import Spans
from distill_workers.teacher.cross_tokenizer.alignment import align

Tokens = tuple[str, ...]
END = "."
"""It ends a response, and is a token to both."""


class Language:
    """A model over strings as tokens, whose next token depends on all text before: random, in float64."""

    def __init__(self, tokens: Tokens, longest: int, allowed: Callable[[str, str], bool], seed: int) -> None:
        """`longest`: letters of the longest text; `allowed` says whether a token may follow a text."""
        generator = torch.Generator().manual_seed(seed)
        letters = (product("ab", repeat=length) for length in range(longest + 1))
        self.tokens, self.states = tokens, ["".join(text) for of_length in letters for text in of_length]
        shape = len(self.states), len(tokens)
        self.logits = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        self.allowed = torch.tensor([[allowed(state, token) for token in tokens] for state in self.states])

    @property
    def logprobs(self) -> torch.Tensor:
        """[states, tokens]"""
        # A text that no response passes has nothing that may follow.
        nowhere = ~self.allowed.any(-1, keepdim=True)
        return self.logits.masked_fill(~(self.allowed | nowhere), -torch.inf).log_softmax(-1)

    def chained(self, tokens: Tokens) -> torch.Tensor:
        """The log-prob of each token, given the text before: [tokens]."""
        rows = [self.states.index("".join(tokens[:place])) for place in range(len(tokens))]
        return self.logprobs[rows, [self.tokens.index(token) for token in tokens]]

    def responses(self, text: str = "") -> list[Tokens]:
        """All that have a probability."""
        if text.endswith(END):
            return [()]
        row = self.allowed[self.states.index(text)]
        following = [token for token, allowed in zip(self.tokens, row.tolist(), strict=True) if allowed]
        return [(token, *rest) for token in following for rest in self.responses(text + token)]


def longest_match(text: str, tokens: Tokens) -> Tokens:
    """The teacher's tokenizer."""
    found: list[str] = []
    while text:
        found.append(max((t for t in tokens if text.startswith(t)), key=len))
        text = text[len(found[-1]) :]
    return tuple(found)


def ends(tokens: Tokens) -> list[int]:
    return [len("".join(tokens[: place + 1])) for place in range(len(tokens))]


class Pair:
    """A student and a teacher of other tokens, and all responses of the student."""

    def __init__(self, student: Language, teacher: Language, steps: Callable[[str], list[Tokens]]) -> None:
        """`steps` are the student's tokens of each span that may come after a text, where no text that follows changes
        what it is."""
        self.student, self.teacher, self.steps = student, teacher, steps
        self.responses = student.responses()
        self.spans = [align(ends(response), ends(self.as_teacher("".join(response)))) for response in self.responses]

    def as_teacher(self, text: str) -> Tokens:
        return longest_match(text, self.teacher.tokens)

    def canonical(self, text: str) -> torch.Tensor:
        """log q: the log-prob of the teacher's own tokens of a text."""
        return self.teacher.chained(self.as_teacher(text)).detach().sum()

    def expected_loss(self, objective: Objective, engine: Language | None = None) -> torch.Tensor:
        """The loss of all responses, each weighed by its probability, which is not differentiated: that of the engine,
        or of the student."""
        per_token, teacher, span_ends, lengths = list[torch.Tensor](), list[float](), list[bool](), list[int]()
        for response, spans in zip(self.responses, self.spans, strict=True):
            scores = self.teacher.chained(self.as_teacher("".join(response))).tolist()
            for span in spans:
                total, scores = math.fsum(scores[: span.teacher]), scores[span.teacher :]
                teacher += [total / span.student] * span.student
                span_ends += [*[False] * (span.student - 1), True]
            per_token.append(self.student.chained(response))
            lengths.append(len(response))
        logprobs = torch.cat(per_token)
        old = logprobs.detach()
        drawn = [(engine or self.student).chained(response).detach() for response in self.responses]
        loss, _ = token_losses(
            objective,
            StepCoefficients(1.0, 0.0),
            logprobs=logprobs,
            old_logprobs=old,
            engine_logprobs=torch.cat(drawn),
            teacher_logprobs=torch.tensor(teacher, dtype=torch.float64),
            advantages=torch.zeros_like(old),
            lengths=torch.tensor(lengths),
            supervised=torch.zeros(len(old), dtype=torch.bool),
            span_ends=torch.tensor(span_ends),
        )
        probabilities = torch.stack([x.sum().exp() for x in drawn])
        return (probabilities * torch.stack([x.sum() for x in loss.split(lengths)])).sum()

    def divergence(self) -> torch.Tensor:
        """E[log pi(response) - log q(its text)], with gradient."""
        found = []
        for response in self.responses:
            own = self.student.chained(response).sum()
            found.append(own.exp() * (own - self.canonical("".join(response))))
        return torch.stack(found).sum()

    def local_divergence(self, engine: Language | None = None) -> torch.Tensor:
        """The divergence of the span after each text that a span ends at, in expectation over those texts, whose own
        probability, the engine's, is not differentiated."""
        found, open_texts = list[torch.Tensor](), [("", torch.tensor(0.0, dtype=torch.float64))]
        while open_texts:
            text, reached = open_texts.pop()
            for step in self.steps(text):
                after = text + "".join(step)
                own = self._after(self.student, text, step)
                theirs = self.canonical(after) - (self.canonical(text) if text else 0.0)
                found.append(reached.exp() * own.exp() * (own - theirs))
                if not after.endswith(END):
                    open_texts.append((after, reached + self._after(engine or self.student, text, step).detach()))
        return torch.stack(found).sum()

    def _after(self, language: Language, text: str, step: Tokens) -> torch.Tensor:
        rows = [language.states.index(text + "".join(step[:place])) for place in range(len(step))]
        return language.logprobs[rows, [language.tokens.index(token) for token in step]].sum()

    def text_divergence(self) -> tuple[float, float, float]:
        """By brute force: KL(P || Q) of the texts, E[log Q - log q] and H(tokens | text), nats."""
        student, teacher = defaultdict[str, float](float), defaultdict[str, float](float)
        for language, probabilities in ((self.student, student), (self.teacher, teacher)):
            for response in language.responses():
                probabilities["".join(response)] += math.exp(language.chained(response).sum().item())
        assert math.isclose(sum(student.values()), 1) and math.isclose(sum(teacher.values()), 1)
        divergence = sum(p * math.log(p / teacher[text]) for text, p in student.items())
        left_out = sum(p * (math.log(teacher[text]) - self.canonical(text).item()) for text, p in student.items())
        drawn = [(self.student.chained(r).sum().item(), student["".join(r)]) for r in self.responses]
        return divergence, left_out, sum(math.exp(own) * (math.log(whole) - own) for own, whole in drawn)


def gradient(pair: Pair, value: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, pair.student.logits, retain_graph=True)[0]


def pieces(text: str, tokens: Tokens) -> list[Tokens]:
    """The single tokens that may follow in a text of three letters."""
    return [(END,)] if len(text) == 3 else [(t,) for t in tokens if t == END or len(text + t) <= 3]


def allowed(tokens: Tokens) -> Callable[[str, str], bool]:
    return lambda text, token: (token,) in pieces(text, tokens)


def pairs_and_letters(seed: int) -> Pair:
    """The student has letters and one pair of them, the teacher letters alone: each token of the student is a span."""
    own, theirs = ("a", "b", "ab", END), ("a", "b", END)
    student, teacher = Language(own, 3, allowed(own), seed), Language(theirs, 3, allowed(theirs), seed + 100)
    return Pair(student, teacher, lambda text: pieces(text, own))


def letters_and_pairs(seed: int) -> Pair:
    """The student writes two or four letters one by one, and the teacher two at a time."""
    theirs = ("aa", "ab", "ba", "bb", END)

    def even(text: str, token: str) -> bool:
        return token != END or len(text) in (2, 4) if len(text) < 4 else token == END

    student = Language(("a", "b", END), 4, even, seed)
    teacher = Language(theirs, 4, lambda text, token: (token == END) if len(text) == 4 else len(text) % 2 == 0, seed)
    pairs = [(x, y) for x in "ab" for y in "ab"]
    steps: dict[int, list[Tokens]] = {0: [*pairs], 2: [*pairs, (END,)], 4: [(END,)]}
    return Pair(student, teacher, lambda text: steps[len(text)])


def looking_ahead(seed: int, *, preferred: float = 0.0) -> Pair:
    """ab and ba are tokens of the teacher too: which token a letter is in depends on the one that follows. `preferred`
    is added to the logits of what a tokenizer would write, so that both models write as they do."""
    own, theirs = ("a", "b", "ab", END), ("a", "b", "ab", "ba", END)
    pair = Pair(Language(own, 3, allowed(own), seed), Language(theirs, 3, allowed(theirs), seed + 100), lambda text: [])
    for language in (pair.student, pair.teacher):
        for state, text in enumerate(language.states):
            for place, token in enumerate(language.tokens):
                after = [
                    longest_match(text + token + more, language.tokens)
                    for more in ("", "a", "b")
                    if len(text + token + more) <= 4
                ]
                whole = longest_match(text, language.tokens)
                if not any(tokens[: len(whole) + 1] == (*whole, token) for tokens in after):
                    language.logits.data[state, place] -= preferred
    return pair


EXACT = {"correction": {"importanceWeight": "none"}, "advantageClip": 1000.0}
WHOLE = Objective.model_validate({**EXACT, "discount": 1.0, "discountedReturn": "sum"})
LOCAL = Objective.model_validate(EXACT)
SEEDS = pytest.mark.parametrize("seed", range(3))
STOPPING = pytest.mark.parametrize("make", [pairs_and_letters, letters_and_pairs])
"""Pairs of which no text that follows changes where a span ends."""


@SEEDS
@STOPPING
def test_the_expected_gradient_is_that_of_the_divergence_of_each_span(make: Callable[[int], Pair], seed: int) -> None:
    pair = make(seed)
    assert any((span.student, span.teacher) in {(1, 2), (2, 1)} for spans in pair.spans for span in spans)
    expected = gradient(pair, pair.local_divergence())
    assert gradient(pair, pair.expected_loss(LOCAL)).allclose(expected, rtol=0, atol=1e-9)


@SEEDS
@STOPPING
def test_with_the_sum_of_what_follows_it_is_that_of_the_whole_response(make: Callable[[int], Pair], seed: int) -> None:
    pair = make(seed)
    expected = gradient(pair, pair.divergence())
    assert gradient(pair, pair.expected_loss(WHOLE)).allclose(expected, rtol=0, atol=1e-9)


@SEEDS
def test_of_responses_that_an_engine_drew_otherwise_the_weight_of_each_span_makes_the_gradient_exact(seed: int) -> None:
    pair = letters_and_pairs(seed)
    engine = copy.deepcopy(pair.student)
    noise = torch.randn(engine.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 50))
    engine.logits = (pair.student.logits + 0.1 * noise).detach()
    expected = gradient(pair, pair.local_divergence(engine))

    def error(objective: Objective) -> float:
        found = gradient(pair, pair.expected_loss(objective, engine))
        return ((found - expected).norm() / expected.norm()).item()

    weighed = Objective.model_validate({**EXACT, "correction": {"importanceWeight": "truncated", "high": 100}})
    assert error(weighed) < 1e-9
    assert error(LOCAL) > 0.01, "without weights"


@SEEDS
def test_its_own_part_of_the_span_for_each_token_would_be_another_gradient(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = letters_and_pairs(seed)
    expected = gradient(pair, pair.local_divergence())
    monkeypatch.setattr(Spans, "totals", lambda self, values: values)
    assert not gradient(pair, pair.expected_loss(LOCAL)).allclose(expected, rtol=0, atol=0.05)


@SEEDS
@pytest.mark.parametrize("make", [pairs_and_letters, letters_and_pairs, looking_ahead])
def test_the_expected_sum_is_the_divergence_of_texts_and_two_gaps_of_opposite_sign(
    make: Callable[[int], Pair], seed: int
) -> None:
    pair = make(seed)
    of_texts, left_out, entropy = pair.text_divergence()
    assert left_out >= -1e-12 and entropy >= -1e-12
    assert pair.divergence().item() == pytest.approx(of_texts + left_out - entropy, abs=1e-9)


@SEEDS
def test_of_models_that_write_as_their_tokenizers_do_it_is_the_divergence_of_texts(seed: int) -> None:
    pair = looking_ahead(seed, preferred=12.0)
    assert max(len(spans) for spans in pair.spans) > 2
    assert pair.divergence().item() == pytest.approx(pair.text_divergence()[0], abs=1e-3)
    assert looking_ahead(seed).divergence().item() != pytest.approx(looking_ahead(seed).text_divergence()[0], abs=1e-2)


@SEEDS
@pytest.mark.parametrize(("objective", "left"), [(LOCAL, 0.1), (WHOLE, 0.02)], ids=["spans", "responses"])
def test_a_student_comes_to_its_teacher_also_where_tokens_depend_on_what_follows(
    objective: Objective, left: float, seed: int
) -> None:
    """To the last tenth where each span is taken by itself: what remains is the bias that objective/spans.py names."""
    pair = looking_ahead(seed, preferred=12.0)
    before = pair.text_divergence()[0]
    for _ in range(150):
        step = gradient(pair, pair.expected_loss(objective))
        with torch.no_grad():
            pair.student.logits.sub_(step)
    assert pair.text_divergence()[0] < left * before


def test_statistics_are_means_of_spans_and_add_up_to_what_the_response_has() -> None:
    ends_of = torch.tensor([False, True, True, False, False, True])
    values = torch.tensor([1.0, 3.0, 5.0, 0.0, 3.0, 6.0])
    spans = Spans(ends_of)
    assert spans.totals(values).tolist() == [4, 4, 5, 9, 9, 9]
    assert spans.means(values).tolist() == [2, 2, 5, 3, 3, 3]
    assert spans.at_end(values).tolist() == [3, 3, 5, 6, 6, 6]
    assert spans.means(values).sum() == values.sum()
    assert Spans(None).means(values) is values
    assert Spans.single(ends_of).tolist() == [False, False, True, False, False, False]


def test_the_loss_says_which_tokens_are_a_span_by_themselves_where_there_are_spans() -> None:
    ends_of, values = torch.tensor([False, True, True]), torch.tensor([-1.0, -2.0, -3.0])
    given = {
        "logprobs": values,
        "old_logprobs": values,
        "engine_logprobs": values,
        "teacher_logprobs": torch.tensor([-1.5, -1.5, -1.0]),
        "advantages": torch.zeros(3),
        "lengths": torch.tensor([3]),
        "supervised": torch.zeros(3, dtype=torch.bool),
    }
    _, stats = token_losses(LOCAL, StepCoefficients(1.0, 0.0), **given, span_ends=ends_of)
    assert stats["aligned_ratio"].tolist() == [0, 0, 1]
    assert stats["reverse_kl"].tolist() == [0, 0, -2]
    assert "aligned_ratio" not in token_losses(LOCAL, StepCoefficients(1.0, 0.0), **given)[1]
