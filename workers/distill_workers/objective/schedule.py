"""The learning rate of a step."""

from distill_api.spec import Optimizer


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """Linear warm-up to the full rate, then constant. `step` counts from 0; the first step is never 0."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if step >= optimizer.warmup_steps:
        return optimizer.learning_rate
    return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
