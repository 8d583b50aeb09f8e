"""The schedule of the learning rate."""

import math

from distill_api.spec.job_spec import Optimizer, RateSchedule


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up to the full rate, then constant or down to the lowest rate.

    `step` counts from 0. No step has the rate 0: the first has one share of the warm-up, and the lowest rate would
    follow the last step. A run that goes on with more steps goes on at the rate that the larger number implies.

    cosine: SGDR without restarts (arXiv 1608.03983, eq. 5). wsd: warm-up, stable, decay (MiniCPM, arXiv 2404.06395),
    decaying as 1 - sqrt of the progress, the best of the forms measured in arXiv 2405.18392, section 4.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be at least 0 and below the {total_steps} steps of the schedule, got {step}")
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    lowest, span = optimizer.min_learning_rate, optimizer.learning_rate - optimizer.min_learning_rate
    match optimizer.schedule:
        case RateSchedule.CONSTANT:
            return optimizer.learning_rate
        case RateSchedule.LINEAR:
            return lowest + span * (1 - _progress(step, optimizer.warmup_steps, total_steps))
        case RateSchedule.COSINE:
            return lowest + span * (1 + math.cos(math.pi * _progress(step, optimizer.warmup_steps, total_steps))) / 2
        case RateSchedule.WSD:
            decay_steps = max(1, round(optimizer.decay_share * total_steps))
            begin = max(optimizer.warmup_steps, total_steps - decay_steps)
            return lowest + span * (1 - math.sqrt(_progress(step, begin, total_steps)))


def _progress(step: int, begin: int, end: int) -> float:
    """Return the progress of a step: 0 until `begin`, then linearly up to 1 at `end`."""
    return max(0, step - begin) / (end - begin)
