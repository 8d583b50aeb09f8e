"""Each recipe of examples/recipes, its objective on the tiny language: exact expectations instead of samples."""

from pathlib import Path

import pytest
import torch
from tiny_language import TOKENS, TinyLanguage

from distill_api.job import load_job
from distill_api.spec.job_spec import Objective, RewardSource
from distill_api.training_phases import objectives
from distill_workers.objective.weighting import outcome_weight
from distill_workers.run.preflight.objective import objective_distils

REPO = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPO / "examples" / "recipes").glob("*.yaml"))
STEPS, RATE = 400, 0.5


def objective_of(recipe: Path) -> Objective:
    return load_job(recipe).spec.objective


def distance(language: TinyLanguage, target: torch.Tensor | None = None) -> float:
    """The reverse KL of whole responses to a target, the teacher if it is left out, nats."""
    return (language.visits() @ language.reverse_kl(target)).item()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_brings_the_student_to_its_teacher(recipe: Path) -> None:
    """With a reward, that of a response which begins with an even token is 1, and of any other 0.

    With a reference, to what the objective makes of teacher and reference.
    """
    objective, language = objective_of(recipe), TinyLanguage.random(5)
    optimum = language.optimum(objective)
    graded = objective.reward.source is not RewardSource.NONE
    rewards = [1.0 - response[0] % 2 if graded else None for response in language.responses]
    outcomes = torch.tensor([outcome_weight(objective.weighting, reward) for reward in rewards], dtype=torch.float64)
    before = distance(language, optimum)
    for _ in range(STEPS):
        # Of baseline leave-one-out and batch-mean: what the mean of the others is expected to be.
        others = (language.visits() @ language.reverse_kl()).detach() / TOKENS
        loss, _ = language.token_losses(
            objective, teacher_coefficients=outcomes.repeat_interleave(TOKENS), baselines=others
        )
        expected = (language.probabilities.detach() * loss.view(-1, TOKENS).sum(-1)).sum()
        with torch.no_grad():
            language.logits.sub_(RATE * language.gradient(expected))
    assert distance(language, optimum) < 0.05 * before
    if objective.reference is not None:
        assert distance(language, optimum) < 0.5 * distance(language)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
async def test_a_recipe_passes_the_check_of_its_objective(recipe: Path) -> None:
    for objective in objectives(load_job(recipe).spec):
        await objective_distils(objective)


def test_the_guide_names_every_recipe() -> None:
    guide = (REPO / "docs" / "guides" / "objective.md").read_text()
    assert RECIPES
    assert [recipe.name for recipe in RECIPES if f"`examples/recipes/{recipe.name}`" not in guide] == []


def test_a_clip_below_the_gaps_drives_the_student_away() -> None:
    """The danger that the guide names: a clipped entry has no gradient, and the others push what they can."""
    language = TinyLanguage.random(5)
    before = distance(language)
    objective = Objective.model_validate(
        {"support": "top-k", "divergence": "forward-kl", "topK": 32, "entryClip": 0.05}
    )
    for _ in range(STEPS):
        loss, _ = language.token_losses(objective)
        expected = (language.probabilities.detach() * loss.view(-1, TOKENS).sum(-1)).sum()
        with torch.no_grad():
            language.logits.sub_(RATE * language.gradient(expected))
    assert distance(language) > before
