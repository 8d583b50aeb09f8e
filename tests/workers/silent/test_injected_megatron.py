"""Published failures of a trainer, injected into real Megatron ranks: what names them, and when."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import hf_logprobs, spec_of
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks, train_step

from distill_workers.data.sample import Sample
from distill_workers.failures import PreflightFailed
from distill_workers.objective.coefficients import step_coefficients
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.callbacks.engine_agreement import EngineAgreementCallback
from distill_workers.run.preflight.resumption import optimizer_continues
from distill_workers.run.preflight.student import engine_matches_trainer

SPEC = spec_of(Path("/student"), Path("/teacher"))


class Ranks:
    """The trainer's ranks, which have answered already."""

    def __init__(self, found: list[list[float]]) -> None:
        self._found = found

    async def logprobs(self, samples: list[Sample]) -> list[list[float]]:
        return self._found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("student") / "qwen3", "qwen3")


def drawn(model: Path) -> list[Sample]:
    """Samples with the log-probabilities that an engine of this model gives, by transformers."""
    samples = make_samples(3, longest=60)
    for sample in samples:
        sample.engine_logprobs = hf_logprobs(model, sample.prompt_ids, sample.response_ids)
    return samples


def sliced(folder: Path, wrong: bool) -> list[list[float]]:
    """Log-probs by two ranks that share each sequence; `wrong`: as if each had one half of it (slime#1135)."""
    import torch

    from distill_workers.megatron import context, student

    right, positions = context.own_tokens, context.own_positions

    def halves(*given: Any) -> Any:
        context.own_positions = lambda length, rank, size: torch.arange(length).view(size, -1)[rank]
        try:
            return right(*given)
        finally:
            context.own_positions = positions

    if wrong:
        student.own_tokens = halves
    spec = make_spec(trainer=make_trainer(context=2, ranks=2, max_tokens=50))
    return student.MegatronStudent(spec, folder).logprobs(make_samples(3, longest=60))


def test_sequences_that_are_cut_in_another_way_than_attention_cuts_them_are_named(folder: Path) -> None:
    samples = drawn(folder)
    right, wrong = (run_ranks(2, sliced, folder=folder, wrong=wrong)[0] for wrong in (False, True))
    ranks: Any = Ranks(right)
    asyncio.run(engine_matches_trainer(SPEC, samples, ranks))
    ranks = Ranks(wrong)
    with pytest.raises(
        PreflightFailed, match=r"EngineMatchesTrainer: .*the weights in an engine are not the trainer's"
    ):
        asyncio.run(engine_matches_trainer(SPEC, samples, ranks))


def adapted(folder: Path, out: Path) -> list[list[float]]:
    """Log-probs of a trained adapter; its export, and one that is merged by twice the scale."""
    from distill_workers.megatron.student import MegatronStudent

    trainer = {**make_trainer(), "lora": {"rank": 4, "alpha": 12.0}}
    student = MegatronStudent(make_spec(trainer=trainer), folder)
    for step in range(3):
        train_step(student, make_samples(12, seed=step), 1e-2)
    student.export(out / "right" / "model")
    found = student.logprobs(make_samples(3, longest=60))
    for module in student._model.modules():
        if hasattr(module, "lora_scale"):
            module.lora_scale *= 2
    student.export(out / "wrong" / "model")
    return found


async def test_an_adapter_that_engines_get_by_another_scale_is_named_after_the_first_step(
    folder: Path, tmp_path: Path
) -> None:
    """No check before it could: a fresh adapter is 0 by any scale."""
    [trained] = run_ranks(1, adapted, folder=folder, out=tmp_path)
    of_a_probe: Any = (None, None, None)  # without a lag, samples of the step show it
    check = EngineAgreementCallback(SPEC, *of_a_probe)

    def after_a_step(model: Path) -> TrainStep:
        samples = drawn(model)
        for sample in samples:
            sample.token_versions = [1] * len(sample.response_ids)
        pairs = zip(samples, trained, strict=True)
        gaps = [abs(a - b) for s, own in pairs for a, b in zip(s.engine_logprobs, own, strict=True)]
        stats = {"trainer_engine_gap": sum(gaps) / len(gaps)}
        return TrainStep(1, step_coefficients(SPEC.objective, 1), samples=samples, stats=stats)

    await check.after_step(after_a_step(tmp_path / "right" / "model"))
    with pytest.raises(PreflightFailed, match=r"EngineFollowsTrainer: after 1 steps .* see trainer\.lora"):
        await check.after_step(after_a_step(tmp_path / "wrong" / "model"))


def saved(folder: Path, out: Path) -> None:
    """A checkpoint after two steps, and one by an optimiser that began anew with the weights of the second."""
    from distill_workers.megatron.student import MegatronStudent

    student = MegatronStudent(make_spec(), folder)
    for step in range(2):
        train_step(student, make_samples(6, seed=step), 1e-3)
    (out / "2").mkdir()
    student.save(out / "2")
    anew = MegatronStudent(make_spec(), folder)
    (out / "0").mkdir()
    anew.save(out / "0")


def test_an_optimiser_that_begins_anew_is_named_before_the_next_step(folder: Path, tmp_path: Path) -> None:
    """With it the learning rate: it is that of the step that the optimiser has reached."""
    run_ranks(1, saved, folder=folder, out=tmp_path)
    optimizer_continues(2, tmp_path / "2")
    optimizer_continues(0, tmp_path / "0")
    with pytest.raises(
        PreflightFailed, match=r"OptimizerContinues: .*2 is of step 0, and the optimiser in it has done 2;"
    ):
        optimizer_continues(0, tmp_path / "2")
    with pytest.raises(
        PreflightFailed, match=r"OptimizerContinues: .* is of step 2, and the optimiser in it has done none;"
    ):
        optimizer_continues(2, tmp_path / "0")
