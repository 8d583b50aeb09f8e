"""bench/methods.py: its jobs are valid, and its table says what the run folders say."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from run_folders import manifest_of, run_of
from runs import REPO
from test_compare import HELDOUT

from distill_api.job import parse_job
from distill_api.teacher.control import Control
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.run_folder.identity import fingerprint

sys.path.insert(0, str(REPO / "bench"))

import methods

EVERY = {(name, method.name): method for name, found in methods.SETS.items() for method in found}


@pytest.mark.parametrize("method", EVERY.values(), ids=["-".join(name) for name in EVERY])
def test_every_method_of_a_set_is_a_valid_job_with_its_seed_and_the_evaluation(method: methods.Method) -> None:
    job = parse_job(method.manifest(7, 20))
    assert (job.metadata.name, job.spec.seed, job.spec.schedule.steps) == (f"{method.name}-7", 7, 20)
    assert job.spec.schedule.evaluate_every_steps == 5
    assert methods.EVALUATION in [evaluation.name for evaluation in job.spec.evaluation]
    assert (job.spec.objective.control is not Control.NONE) == ("control" in method.name)


def test_the_methods_of_all_sets_with_one_name_are_one_run() -> None:
    found: dict[str, set[str]] = {}
    for method in EVERY.values():
        found.setdefault(method.name, set()).add(fingerprint(parse_job(method.manifest(0, None))))
    assert [name for name, runs in found.items() if len(runs) > 1] == []


def test_a_recipe_is_a_set_beside_plain_and_an_unknown_name_is_refused() -> None:
    assert [method.name for method in methods.chosen("sequence-kl")] == ["plain", "sequence-kl"]
    with pytest.raises(ValueError, match="no set nothing, and no examples/recipes/nothing-cpu"):
        methods.chosen("nothing")


def curve(tmp_path: Path, name: str, kls: list[float], scores: list[float]) -> methods.Curve:
    """Of a run that was evaluated at steps 0, 10 and 20."""
    measured = [
        Measurement("heldout", step, score=score, reverse_kl=kl)
        for step, kl, score in zip((0, 10, 20), kls, scores, strict=True)
    ]
    folder = run_of(manifest_of(tmp_path, name, evaluation=[HELDOUT]), measured=measured)[1].root
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step":
            line["advantage_square"] = 4.0 / line["step"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return methods.Curve.of(folder)


def test_the_table_has_means_and_intervals_over_seeds_and_differences_by_seed(tmp_path: Path) -> None:
    scores = {"plain": (0.5, 0.7, 0.9), "other": (0.6, 0.8, 1.0)}
    kls = {"plain": (2.0, 1.0, 0.5), "other": (2.0, 0.4, 0.3)}
    curves = {
        name: {
            seed: curve(tmp_path, f"{name}-{seed}", list(kls[name]), [0.1, 0.2 + seed / 100, last])
            for seed, last in enumerate(scores[name])
        }
        for name in scores
    }
    text = methods.table("pair", curves)
    head, line, plain, other, _, start = text.splitlines()
    assert line.count("---") == head.count("|") - 1 == 8
    cells = {row.split(" | ")[0].strip("| "): [c.strip("| ") for c in row.split(" | ")[1:]] for row in (plain, other)}
    half = 4.303 * statistics.stdev(scores["plain"]) / math.sqrt(3)
    assert cells["plain"][1] == f"0.700 [{0.7 - half:.3f} to {0.7 + half:.3f}]"
    assert cells["plain"][3] == "0.500 [0.500 to 0.500]"
    assert (cells["plain"][4], cells["other"][4]) == ("20, 20, 20", "10, 10, 10")
    assert cells["other"][5] == "4.000 [4.000 to 4.000]"
    assert (cells["plain"][6], cells["other"][6]) == ("–", "+0.100 [+0.100 to +0.100]"), "each seed differs by 0.1"
    assert start == "Before the first step: score 0.100 [0.100 to 0.100], reverse KL 2.000 [2.000 to 2.000]."


def test_what_was_not_measured_is_a_dash_and_one_seed_has_no_interval(tmp_path: Path) -> None:
    alone = curve(tmp_path, "plain-0", [2.0, 1.0, 0.5], [0.1, 0.2, 0.3])
    assert methods.cell([0.25]) == "0.250" and methods.cell([None, None]) == "–"
    assert methods.reached(alone, 0.4) is None and methods.reached(alone, 1.0) == 10
