"""The tokens of an environment are read by the student, and trained by nobody."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from distill_api.spec.job_spec import Objective
from distill_cli.views.rollout import rollout_text
from distill_workers.data.sample import Sample
from distill_workers.megatron.batch import collate, share
from distill_workers.megatron.context import OwnTokens
from distill_workers.megatron.logprobs import Vocabulary, token_logprobs
from distill_workers.megatron.micro_batch_loss import micro_batch_loss
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.reporting.sample_lines import sample_line
from distill_workers.reporting.samples_file import rollouts_in
from distill_workers.reporting.samples_page import rollouts_html
from distill_workers.reporting.token_kl import summary, token_kl, turns

VOCABULARY, WIDTH, TOP = 40, 16, 3
MASK = [True, True, True, False, False, True, True, False, True]
"""Three turns of the student, of three, two and one tokens."""


def numbers(count: int, generator: torch.Generator) -> list[float]:
    return (-torch.rand(count, generator=generator) - 0.1).tolist()


def conversation(seed: int = 0, mask: list[bool] | None = MASK, tokens: int = len(MASK)) -> Sample:
    """A sample with a teacher's top-k. What stands at the environment's tokens would be seen in any loss."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (4 + tokens,), generator=draw).tolist()
    top = torch.stack([torch.randperm(VOCABULARY, generator=draw)[:TOP] for _ in range(tokens)])
    made = Sample(
        seed, 0, ids[:4], ids[4:], numbers(tokens, draw), [0] * tokens, False, numbers(tokens, draw),
        top.numpy().astype(np.int32), -torch.rand(tokens, TOP, generator=draw).numpy() - 2,
        loss_mask=mask, advantage=0.5, reference_logprobs=numbers(tokens, draw),
    )  # fmt: skip
    for place, is_student in enumerate(mask or []):
        if not is_student:
            made.engine_logprobs[place], made.teacher_logprobs[place] = 0.0, -1000.0
            made.reference_logprobs[place] = -1000.0
    return made


def turns_alone(sample: Sample) -> list[Sample]:
    """Each turn as a sample of its own, whose prompt is everything before it."""
    found = []
    for turn in sample.turns:
        cut = slice(turn.start, turn.stop)
        part = dataclasses.replace(
            sample, prompt_ids=[*sample.prompt_ids, *sample.response_ids[: turn.start]], loss_mask=None
        )
        for name in ("response_ids", "engine_logprobs", "token_versions", "teacher_logprobs", "reference_logprobs"):
            setattr(part, name, getattr(sample, name)[cut])
        assert sample.teacher_top_ids is not None and sample.teacher_top_logprobs is not None
        part.teacher_top_ids, part.teacher_top_logprobs = sample.teacher_top_ids[cut], sample.teacher_top_logprobs[cut]
        found.append(part)
    return found


class Student(torch.nn.Module):
    """A token sees all before it, through their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.head = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[samples, sequence] -> [sequence, samples, width]."""
        seen = self.embedding(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return seen.tanh().transpose(0, 1)


def loss_of(student: Student, samples: list[Sample], **objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of one micro-batch and its hidden states."""
    batch = collate(samples, list(range(len(samples))), torch.device("cpu"), scored=True)
    hidden = student.hidden(batch.input_ids)
    hidden.retain_grad()
    own = OwnTokens(batch.rows, None, None)  # type: ignore[arg-type]  # one rank has no group
    loss, _ = micro_batch_loss(
        Objective.model_validate(objective), StepCoefficients(1.0, 0.3), batch, own, hidden.flatten(0, 1)[own.rows],
        student.head, Vocabulary(0, VOCABULARY, None),
    )  # fmt: skip
    return loss, hidden


OBJECTIVES = [
    {"support": "sampled-token"},
    {"support": "top-k", "topK": TOP},
    {"reference": "base", "extrapolation": 1.5, "referenceCoefficient": 0.1},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sampled-token", "top-k", "reference"])
def test_the_gradient_is_exactly_zero_where_an_environments_token_is_predicted(objective: dict[str, Any]) -> None:
    samples = [conversation(0), conversation(1, [True, False, True], 3)]
    loss, hidden = loss_of(Student(), samples, **objective)
    loss.backward()
    assert hidden.grad is not None
    for column, sample in enumerate(samples):
        assert sample.loss_mask is not None
        at_response = hidden.grad[len(sample.prompt_ids) - 1 :, column]
        for gradient, is_student in zip(at_response, sample.loss_mask, strict=False):
            assert bool(gradient.abs().max() > 0) is is_student
            assert is_student or gradient.eq(0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sampled-token", "top-k", "reference"])
def test_a_conversation_trains_the_student_as_its_turns_each_alone_would(objective: dict[str, Any]) -> None:
    whole, parts = Student(), Student()
    loss_of(whole, [conversation(0)], **objective)[0].backward()
    loss_of(parts, turns_alone(conversation(0)), **objective)[0].backward()
    torch.testing.assert_close([p.grad for p in whole.parameters()], [p.grad for p in parts.parameters()])


def test_what_an_environment_says_changes_what_the_student_reads_and_no_target() -> None:
    sample = conversation(0)
    ids = [i if is_student else 7 for i, is_student in zip(sample.response_ids, MASK, strict=True)]
    other = dataclasses.replace(sample, response_ids=ids)
    first, second = (collate([s], [0], torch.device("cpu"), scored=True) for s in (sample, other))
    assert not torch.equal(first.input_ids, second.input_ids)
    per_token = ("targets", "engine_logprobs", "teacher_logprobs", "reference_logprobs", "support_ids", "rows")
    for name in (*per_token, "lengths"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.lengths.tolist() == [6] and -1000.0 not in first.teacher_logprobs
    assert -1000.0 not in first.reference_logprobs


def test_the_log_probs_of_a_conversation_are_those_of_its_own_tokens_in_order() -> None:
    student, sample = Student(), conversation(0)
    batch = collate([sample], [0], torch.device("cpu"), scored=False)
    found, _ = token_logprobs(
        student.hidden(batch.input_ids).flatten(0, 1)[batch.rows], student.head, batch.targets[:, None],
        Vocabulary(0, VOCABULARY, None),
    )  # fmt: skip
    ids = [*sample.prompt_ids, *sample.response_ids]
    logits = student.hidden(torch.tensor([ids])[:, :-1])[:, 0] @ student.head.T
    expected = logits.log_softmax(-1)[torch.arange(3, len(ids) - 1), ids[4:]][torch.tensor(MASK)]
    torch.testing.assert_close(found[:, 0], expected)


def test_a_mask_of_another_length_is_refused_and_a_sample_without_a_token_to_train_on_is_left_out() -> None:
    with pytest.raises(ValueError, match=r"9 response tokens .* but \{'loss_mask': 8\}"):
        collate([conversation(mask=MASK[:-1])], [0], torch.device("cpu"), scored=True)
    assert share([conversation(), conversation(mask=[False] * 9)], [0], 1000) == [[0]]


def test_lengths_and_kl_are_told_turn_by_turn() -> None:
    first, second = conversation(0), conversation(1, [True, False, True], 3)
    found = turns([first, second])
    assert found is not None
    assert {number: (turn["samples"], turn["tokens"]) for number, turn in found.items()} == {
        "1": (2, 2.0), "2": (2, 1.5), "3": (1, 1.0),
    }  # fmt: skip
    gaps = [e - t for e, t in zip(first.engine_logprobs, first.teacher_logprobs, strict=True)]
    assert found["3"]["reverse_kl"] == pytest.approx(gaps[8])
    assert token_kl(first).tolist() == pytest.approx([gap for gap, m in zip(gaps, MASK, strict=True) if m])
    assert summary([first])["max"] < 10  # type: ignore[index]
    assert turns([conversation(mask=None)]) is None


def test_a_rollout_shows_an_environments_tokens_without_nats() -> None:
    line = json.loads(json.dumps(sample_line(3, "first", conversation(0), lambda ids: "".join(f"<{i}>" for i in ids))))
    assert [kl is not None for kl in line["kl"]] == MASK
    [rollout] = rollouts_in([json.dumps(line)])
    assert rollout.mean_kl == pytest.approx(token_kl(conversation(0)).mean(), abs=1e-3)
    page = rollouts_html([rollout])
    assert page.count('class="prompt"') == 1 + 3 and page.count("title=") == 6
    text = rollout_text(rollout, coloured=False)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(text)
    assert f"{rollout.mean_kl:.3f} nats per token" in shown.get() and "furthest from the teacher" in shown.get()


def test_what_an_environment_repeats_of_the_teachers_context_is_not_copied_by_the_student() -> None:
    hint = [1, 2, 3, 4]
    masks = {"environment": [True] + [False] * 4 + [True], "student": [False] + [True] * 5}
    shares = {
        who: Sample(0, 0, [9], [8, *hint, 7], [], [], False, privileged_ids=[9, *hint], loss_mask=mask).copied_share
        for who, mask in masks.items()
    }
    assert shares == {"environment": 0.0, "student": 4 / 5}
