"""Time of a step over that of its longest stage, with stages that sleep: `python bench/loop_overlap.py [--seconds 4]`.

Beside the clock stands the same schedule on a virtual one, which is its model without any cost of the loop itself, and
the sum of the stages: generate all, then score all, then train, as a synchronous trainer does.
"""

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
from pathlib import Path

from stages import SCHEDULES, SHAPES, Stages, step_seconds, virtual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of the longest stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="measured in a round")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for shape, stages in SHAPES.items():
            for name, schedule in SCHEDULES.items():
                scaled = Stages(*(args.seconds * x for x in (stages.generate, stages.score, stages.train)))
                with tempfile.TemporaryDirectory() as folder:
                    work = step_seconds(scaled, **schedule, steps=args.steps, folder=Path(folder))
                    found.setdefault((shape, name), []).append(asyncio.run(work) / scaled.longest)
    print("| stages | schedule | step / longest stage | model | one after another |\n| --- | --- | --- | --- | --- |")
    for (shape, name), ratios in found.items():
        stages, schedule = SHAPES[shape], SCHEDULES[name]
        model = virtual(lambda f, s=stages, c=schedule: step_seconds(s, **c, steps=args.steps * args.rounds, folder=f))
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        together = stages.one_after_another / stages.longest
        measured = f"{middle:.3f} [{low:.3f}–{high:.3f}]"
        print(f"| {shape} | {name} | {measured} | {model / stages.longest:.3f} | {together:.2f} |")
    print(json.dumps({"bench": "loop_overlap", "ratios": {f"{s}; {n}": r for (s, n), r in found.items()}}))


if __name__ == "__main__":
    main()
