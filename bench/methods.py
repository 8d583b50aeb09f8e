"""Methods of docs/guides/objective.md beside plain distillation: held-out score and KL at equal steps, over seeds.

`make bench BENCH=methods SETS="control baseline" SEEDS="0 1 2"`. A set is a method to compare with, first, and others;
SETS may also name any recipe of examples/recipes, without -cpu.yaml, which is then set beside plain. Each run is
`distill run` of a file of examples/, which trains for two to four minutes on the arithmetic pair. Runs that are done
are not made again (OUT, by default build/methods): the table can be printed from what is there.

The tables are Markdown, as docs/benchmarks.md has them: means over the seeds, with 95 % intervals by Student's t. The
last column is the mean of the differences by seed from the first method: the seeds share prompts, so that what a seed
does to both is not in it. An interval that has 0 in it shows no difference.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill_workers.reporting.metrics_file import Evaluated, read_run

REPO = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache" / "distillation-operator"))
EVALUATION = "heldout"
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""0.975 quantile of Student's t by the number of seeds."""
NONE = "–"


@dataclass(frozen=True)
class Method:
    """A file of examples/, and what is changed in it."""

    name: str
    example: str = "arithmetic-cpu"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Values by their paths in the manifest; None removes a field."""

    def manifest(self, seed: int, steps: int | None) -> dict[str, Any]:
        """Return the job of a seed, evaluated four times on the way, under a name of its own."""
        found: dict[str, Any] = yaml.safe_load((REPO / "examples" / f"{self.example}.yaml").read_text())
        found["metadata"]["name"] = f"{self.name}-{seed}"
        steps = steps or found["spec"]["schedule"]["steps"]
        every = max(1, steps // 4)
        schedule = {"spec.schedule.steps": steps, "spec.schedule.evaluateEverySteps": every}
        for path, value in ({"spec.seed": seed, **schedule} | dict(self.changes)).items():
            *parents, last = path.split(".")
            node = found
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is None:
                node.pop(last, None)
            else:
                node[last] = value
        return found


def recipe(name: str, **changes: Any) -> Method:
    return Method(name, f"recipes/{name}-cpu", changes)


PLAIN = Method("plain", changes={"spec.objective": {"support": "sampled-token"}})
TOP_K = Method("plain-top-k", changes={"spec.objective": {"support": "top-k", "topK": 8}})
WITHOUT_HINT = Method("without-hint", "recipes/privileged-context-cpu", {"spec.data.prompts.teacherPrompt": None})
HINT_CONTROL = Method("hint-control", "recipes/privileged-context-cpu", {"spec.objective.control": "fixed-advantage"})
SETS: dict[str, list[Method]] = {
    "control": [
        PLAIN,
        Method("control", changes={"spec.objective": {"support": "sampled-token", "control": "fixed-advantage"}}),
    ],
    "top-k": [PLAIN, TOP_K],
    "baseline": [PLAIN, *map(recipe, ("top-k-baseline", "leave-one-out-baseline", "batch-mean-baseline"))],
    "weighting": [PLAIN, recipe("prefix-weights")],
    "selection": [TOP_K, recipe("token-selection"), recipe("verifier-gate")],
    "entropy": [PLAIN, recipe("entropy-aware")],
    "return": [recipe("top-k-baseline"), recipe("sequence-kl")],
    "reference": [recipe("leave-one-out-baseline"), recipe("extrapolation"), recipe("reference-kl")],
    "privileged": [WITHOUT_HINT, recipe("privileged-context"), HINT_CONTROL],
}


@dataclass(frozen=True)
class Curve:
    """The held-out evaluations of one run by their steps, and its first step's mean of the squared advantage, nats²."""

    evaluated: dict[int, Evaluated]
    advantage_square: float | None

    @classmethod
    def of(cls, folder: Path) -> "Curve":
        metrics = folder / "metrics.jsonl"
        found = {e.step: e for e in read_run(metrics).evaluations[EVALUATION]}
        lines = map(json.loads, metrics.read_text().splitlines())
        first = next(line for line in lines if line["kind"] == "step" and line["step"] == 1)
        return cls(found, first.get("advantage_square"))


def chosen(name: str) -> list[Method]:
    """Return the methods of a set, or plain and the recipe of that name. Raises ValueError."""
    if name in SETS:
        return SETS[name]
    if (REPO / "examples" / "recipes" / f"{name}-cpu.yaml").exists():
        return [PLAIN, recipe(name)]
    raise ValueError(f"no set {name}, and no examples/recipes/{name}-cpu.yaml; sets are {', '.join(SETS)}")


def run(method: Method, seed: int, steps: int | None, out: Path) -> Path:
    """Return the folder of a run, which is made or gone on with unless it is there and done. Raises SystemExit."""
    manifest = method.manifest(seed, steps)
    folder = out / manifest["metadata"]["name"]
    wanted = manifest["spec"]["schedule"]["steps"]
    if (folder / "metrics.jsonl").exists():
        measured = read_run(folder / "metrics.jsonl").evaluations.get(EVALUATION, [])
        if any(e.step == wanted for e in measured):
            return folder
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(manifest))
    volumes = ["--volume", f"/models={CACHE / 'models'}", "--volume", f"/output={out}"]
    print(f"{folder.name}: {wanted} steps", file=sys.stderr, flush=True)
    with (out / f"{folder.name}.log").open("w") as log:
        command = [sys.executable, "-m", "distill_cli", "run", "-f", str(file), "--resume", *volumes]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{folder.name} ended with {code}: see {log.name}")
    return folder


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by Student's t; None of fewer than two values, or of more than T has."""
    if len(values) not in T:
        return None
    half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def cell(values: Sequence[float | None], sign: str = "") -> str:
    """Return the mean of what was measured, and its interval: `0.75 [0.7–0.8]`."""
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    mean, bounds = f"{statistics.fmean(known):{sign}.3f}", interval(known)
    return mean if bounds is None else f"{mean} [{bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f}]"


def reached(curve: Curve, level: float | None) -> int | None:
    """Return the first step, of those with an evaluation, from which the reverse KL was at or below a level."""
    if level is None:
        return None
    steps = (s for s, e in sorted(curve.evaluated.items()) if e.reverse_kl is not None and e.reverse_kl <= level)
    return next(steps, None)


def table(name: str, curves: Mapping[str, Mapping[int, Curve]]) -> str:
    """Return the Markdown of a set: curves by method, the one to compare with first, and by seed."""
    base, seeds = next(iter(curves.values())), sorted(next(iter(curves.values())))
    steps = sorted(set.intersection(*(set(c.evaluated) for by_seed in curves.values() for c in by_seed.values())))
    first, last = steps[0], steps[-1]
    level = {seed: base[seed].evaluated[last].reverse_kl for seed in seeds}
    head = [
        f"set `{name}`, {len(seeds)} seeds",
        *(f"score, step {step}" for step in steps[1:]),
        *(f"reverse KL, step {step}" for step in steps[1:]),
        f"steps to the first row's reverse KL at {last}",
        "squared advantage, step 1",
        f"score less the first row's, step {last}",
    ]
    rows = [head, ["---"] * len(head)]
    for method, by_seed in curves.items():
        at = {step: [by_seed[seed].evaluated[step] for seed in seeds] for step in steps}
        steps_taken = [reached(by_seed[seed], level[seed]) for seed in seeds]
        differences = [_difference(by_seed[seed], base[seed], last) for seed in seeds]
        rows.append(
            [
                method,
                *(cell([e.score for e in at[step]]) for step in steps[1:]),
                *(cell([e.reverse_kl for e in at[step]]) for step in steps[1:]),
                ", ".join(NONE if taken is None else str(taken) for taken in steps_taken),
                cell([by_seed[seed].advantage_square for seed in seeds]),
                NONE if by_seed is base else cell(differences, "+"),
            ]
        )
    begun = [base[seed].evaluated[first] for seed in seeds]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    score, kl = cell([e.score for e in begun]), cell([e.reverse_kl for e in begun])
    return "\n".join([*lines, "", f"Before the first step: score {score}, reverse KL {kl}."])


def _difference(curve: Curve, base: Curve, step: int) -> float | None:
    here, there = curve.evaluated[step].score, base.evaluated[step].score
    return None if here is None or there is None else here - there


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods beside plain distillation, over seeds.")
    parser.add_argument("--sets", nargs="+", default=["control"], metavar="SET", help=f"{', '.join(SETS)}, or a recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--steps", type=int, help="of each run; by default those of its file")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "methods")
    given = parser.parse_args()
    try:
        sets = {name: chosen(name) for name in given.sets}
    except ValueError as error:
        parser.error(str(error))
    for name, methods in sets.items():
        curves: dict[str, dict[int, Curve]] = {method.name: {} for method in methods}
        for seed in given.seeds:
            for method in methods:
                curves[method.name][seed] = Curve.of(run(method, seed, given.steps, given.out))
        print(table(name, curves), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
