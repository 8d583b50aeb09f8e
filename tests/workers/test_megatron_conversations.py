"""Megatron's student is trained on the turns of a conversation as if each were a response of its own."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from double_precision import train_in_float64
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

from distill_workers.data.sample import Sample


def conversations(top_k: int) -> list[Sample]:
    """Samples of 12 to 20 tokens, of which every fourth and the one before are an environment's."""
    samples = [s for s in make_samples(40, seed=3, top_k=top_k, longest=20) if len(s.response_ids) >= 12]
    for sample in samples:
        sample.loss_mask = [i % 4 < 2 for i in range(len(sample.response_ids))]
        for place, is_student in enumerate(sample.loss_mask):
            if not is_student:
                sample.engine_logprobs[place], sample.teacher_logprobs[place] = 0.0, -500.0
    return samples


def turns_alone(samples: list[Sample]) -> list[Sample]:
    found = []
    for sample in samples:
        for turn in sample.turns:
            cut = slice(turn.start, turn.stop)
            before = [*sample.prompt_ids, *sample.response_ids[: turn.start]]
            part = dataclasses.replace(sample, prompt_ids=before, loss_mask=None)
            for name in ("response_ids", "engine_logprobs", "token_versions", "teacher_logprobs", "teacher_top_ids"):
                values = getattr(sample, name)
                setattr(part, name, None if values is None else values[cut])
            if sample.teacher_top_logprobs is not None:
                part.teacher_top_logprobs = sample.teacher_top_logprobs[cut]
            found.append(part)
    return found


def train(folder: Path, context: int) -> dict[str, Any]:
    """One step on conversations, and one of another student on their turns, with log-probs after each."""
    from distill_workers.megatron.student import MegatronStudent

    train_in_float64()
    found: dict[str, Any] = {}
    for top_k in (0, 4):
        objective = {"support": "top-k", "topK": 4} if top_k else {"support": "sampled-token"}
        for name, samples in (("whole", conversations(top_k)), ("parts", turns_alone(conversations(top_k)))):
            spec = make_spec(trainer=make_trainer(context=context, ranks=context), objective=objective)
            student = MegatronStudent(spec, folder)
            before = student.logprobs(samples)
            stats = train_step(student, samples, 1e-3)
            found[name, top_k] = before, stats, student.logprobs(samples)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "qwen2"
    make_checkpoint(folder, "qwen2", seed=1)
    return folder


@pytest.mark.parametrize("context", [1, 2])
def test_a_step_on_conversations_is_that_on_their_turns(context: int, folder: Path) -> None:
    [found, *_] = run_ranks(context, train, folder=folder, context=context)
    for top_k in (0, 4):
        (before, stats, after), (parts_before, parts_stats, parts_after) = found["whole", top_k], found["parts", top_k]
        for whole, parts in ((before, parts_before), (after, parts_after)):
            flat = [value for part in parts for value in part]
            assert [value for sample in whole for value in sample] == pytest.approx(flat, abs=1e-6)
            assert [len(x) for x in whole] == [s.trained_tokens for s in conversations(top_k)]
        assert stats["tokens"] == parts_stats["tokens"] == sum(s.trained_tokens for s in conversations(top_k))
        for name in ("loss", "divergence", "reverse_kl", "entropy", "grad_norm"):
            assert stats[name] == pytest.approx(parts_stats[name], rel=1e-5), name
        assert stats["skipped"] == 0 and stats["grad_norm"] > 0
