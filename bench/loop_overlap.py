"""Time of a step over that of its longest stage, with stages that sleep: `python bench/loop_overlap.py [--seconds 4]`.

The last rows are of conversations, whose environment takes as long as the student's turns on average.

Beside the clock stands the same schedule on a virtual one, which is its model without any cost of the loop itself, and
the sum of the stages: generate all, then score all, then train, as a synchronous trainer does.
"""

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from conversation_stages import PLACES, conversation_stages, conversation_step_seconds
from stages import SCHEDULES, SHAPES, Stages, step_seconds, virtual

Work = Callable[..., Coroutine[Any, Any, float]]
"""Runs steps, by their number and a folder, and returns the mean time of one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of the longest stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="measured in a round")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    cases = {**single_responses(args.seconds), **conversations(args.seconds)}
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, (stages, work) in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds = asyncio.run(work(steps=args.steps, folder=Path(folder)))
            found.setdefault(name, []).append(seconds / stages.longest)
    print("| stages | schedule | step / longest stage | model | one after another |\n| --- | --- | --- | --- | --- |")
    for (shape, schedule), ratios in found.items():
        stages, work = cases[shape, schedule]
        model = virtual(lambda folder, w=work: w(steps=args.steps * args.rounds, folder=folder))
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        together = stages.one_after_another / stages.longest
        measured = f"{middle:.3f} [{low:.3f}–{high:.3f}]"
        print(f"| {shape} | {schedule} | {measured} | {model / stages.longest:.3f} | {together:.2f} |")
    print(json.dumps({"bench": "loop_overlap", "ratios": {f"{s}; {n}": r for (s, n), r in found.items()}}))


def single_responses(seconds: float) -> dict[tuple[str, str], tuple[Stages, Work]]:
    found: dict[tuple[str, str], tuple[Stages, Work]] = {}
    for shape, stages in SHAPES.items():
        scaled = Stages(*(seconds * x for x in (stages.generate, stages.score, stages.train)))
        for name, schedule in SCHEDULES.items():
            found[shape, name] = (scaled, partial(step_seconds, scaled, **schedule))
    return found


def conversations(seconds: float) -> dict[tuple[str, str], tuple[Stages, Work]]:
    found: dict[tuple[str, str], tuple[Stages, Work]] = {}
    for shape, places in PLACES.items():
        stages = conversation_stages(places, seconds)
        for name, schedule in SCHEDULES.items():
            work = partial(conversation_step_seconds, stages, places, **schedule)
            found[f"conversations, {shape}", name] = (stages, work)
    return found


if __name__ == "__main__":
    main()
