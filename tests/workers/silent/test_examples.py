"""The examples that run on this machine raise no alarm in what the preflight reads of their files."""

import asyncio
from pathlib import Path

import pytest
from runs import arithmetic

from distill_api.job import parse_job
from distill_workers.data.findings import overlap
from distill_workers.data.prompts import load_data
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.metrics import Metrics
from distill_workers.run.preflight.model_agreement import check_models, load_tokenizer, size_notes
from distill_workers.run.preflight.objective import objective_distils
from distill_workers.run.preflight.rewards import reward_scores


@pytest.mark.parametrize(
    ("example", "held_out"), [("arithmetic-cpu", True), ("several-teachers-cpu", True), ("smollm2-cpu", False)]
)
def test_an_example_passes_what_is_read_from_its_files(example: str, held_out: bool, tmp_path: Path) -> None:
    """That of smollm2 is noted for good reason: there are fewer sums of two digits than prompts that it trains on."""
    spec = parse_job(arithmetic(tmp_path, "healthy", example=example)).spec
    student = Path(spec.student.model)
    tokenizer = load_tokenizer(student, "spec.student.model", trust_remote_code=False)
    check_models(spec, student, tokenizer)
    assert size_notes(spec, student) == []
    prompts = load_data(spec, tokenizer, Metrics())

    async def graded() -> list[str]:
        await objective_distils(spec.objective)
        evaluators = [Evaluator(spec, e, tokenizer, Metrics()) for e in spec.evaluation]
        try:
            assert held_out == (not any(overlap(prompts, e.prompts) for e in evaluators))
            return await reward_scores(spec, prompts, {}, evaluators)
        finally:
            await asyncio.gather(*(e.close() for e in evaluators))

    assert asyncio.run(graded()) == []
