"""The examples for this machine raise no alarm in what the preflight reads of their files, and in their rewards.

What asks an engine or a teacher is in test_injected.py, over a tiny pair.
"""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import CALCULATOR, MODELS, REPO, arithmetic

import soak
from distill_api.job import parse_job
from distill_workers.data.cursor import Cursor
from distill_workers.data.findings import overlap
from distill_workers.data.prompts import load_data
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.metrics import Metrics
from distill_workers.results.publisher import Publisher
from distill_workers.rewards.build import build_rewards
from distill_workers.rollout.conversations.build import build_episodes
from distill_workers.run.preflight.export import check_export
from distill_workers.run.preflight.model_agreement import check_models, load_tokenizer, size_notes
from distill_workers.run.preflight.objective import objective_distils
from distill_workers.run.preflight.resumption import cursor_continues
from distill_workers.run.preflight.rewards import reward_scores
from distill_workers.run_folder.run_folder import RunFolder


def _is_job(path: Path) -> bool:
    return bool(yaml.safe_load(path.read_text())["kind"] == "DistillationJob")


def _grades_mathematics(example: str) -> bool:
    return "source: math" in (FOLDER / f"{example}.yaml").read_text()


FOLDER = REPO / "examples"
EXAMPLES = [str(p.relative_to(FOLDER).with_suffix("")) for p in sorted(FOLDER.rglob("*-cpu.yaml")) if _is_job(p)]
KNOWN = {
    "smollm2-cpu": {"HeldOut"},
    "recipes/live-student-cpu": {"HeldOut"},
    "recipes/privileged-context-cpu": {"HeldOut"},
    "endpoint-cpu": {"ModelsNotCompared"},
    "shared-teacher-cpu": {"ModelsNotCompared"},
}
"""Notes for good reason: there are fewer sums of one digit than prompts of them; a teacher's files are elsewhere."""
ROUNDS = [e for n in range(5) for e in EXAMPLES if n == 0 or not _grades_mathematics(e)]
"""The examples as the soak takes them: the processes of the reward math need seconds to begin."""
NO_ENGINES: Any = None
"""No conversation begins."""
ROWS = 512
"""Of the example's training file that a start after the first reads."""


@pytest.fixture(autouse=True)
def calculator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the headers of its examples set."""
    monkeypatch.syspath_prepend(str(CALCULATOR))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def varied(manifest: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Return the job with another seed, other rows of its files in another order, and other tasks that are made."""
    manifest["spec"]["seed"] = seed
    data, evaluations = manifest["spec"]["data"], manifest["spec"].get("evaluation", [])
    training = [data["prompts"]] if "prompts" in data else [source["prompts"] for source in data["sources"]]
    for place, prompts in enumerate([*training, *(e["prompts"] for e in evaluations)]):
        if "reasoningGym" in prompts:
            prompts["reasoningGym"] = {**prompts["reasoningGym"], "seed": 100 * seed + place}
            continue
        file = Path(prompts["path"])
        lines = file.read_text().splitlines(keepends=True)
        begin = 37 * seed % len(lines)
        chosen = (lines[begin:] + lines[:begin])[:ROWS]
        copy = folder / f"{place}-{file.name}"
        copy.write_text("".join(chosen[::-1] if seed % 2 else chosen))
        prompts["path"] = str(copy)
    return manifest


async def start(example: str, seed: int, folder: Path) -> list[str]:
    """Do what a trainer does before it starts engines and teachers. Returns the notes; what fails is raised."""
    folder.mkdir(parents=True)
    manifest = arithmetic(folder, f"healthy-{seed}", example=example)
    places = manifest["spec"]["output"].get("publish", [])
    for place in places:
        place["to"] = place["to"].replace("file:///published", f"file://{folder}/published")
    job = parse_job(varied(manifest, seed, folder) if seed else manifest)
    spec, run_folder, student = job.spec, RunFolder(job), Path(job.spec.student.model)
    notes = run_folder.claim()
    tokenizer = load_tokenizer(student, "spec.student.model", trust_remote_code=False)
    prompts = load_data(spec, tokenizer, Metrics())
    weights = {source.name: source.weight for source in spec.data.all_sources}
    cursor = Cursor(prompts, seed=spec.seed, shuffle=spec.data.shuffle, weights=weights)
    cursor_continues(spec, 0, cursor.state())
    notes += [*check_models(spec, student, tokenizer).notes, *size_notes(spec, student)]
    check_export(spec, student, run_folder)
    notes += await Publisher(job, run_folder).probe()
    await objective_distils(spec.objective)
    rewards = build_rewards(spec, Metrics())
    episodes = build_episodes(spec, tokenizer, NO_ENGINES, Metrics())
    evaluators = [Evaluator(spec, e, tokenizer, Metrics(), episodes) for e in spec.evaluation]
    try:
        notes += await reward_scores(spec, prompts, rewards, evaluators)
        notes += [f"HeldOut: evaluation {e.name}: {said}" for e in evaluators if (said := overlap(prompts, e.prompts))]
    finally:
        await asyncio.gather(*(r.close() for r in rewards.values()), *(e.close() for e in evaluators))
        if episodes is not None:
            notes += episodes.notes()
            await episodes.close()
    return notes


def kinds(notes: list[str]) -> set[str]:
    return {note.partition(":")[0] for note in notes}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_passes_what_is_read_from_its_files(example: str, tmp_path: Path) -> None:
    assert kinds(asyncio.run(start(example, 0, tmp_path / "run"))) == KNOWN.get(example, set())


def test_another_start_reads_other_rows_of_the_same_files(tmp_path: Path) -> None:
    manifest = varied(arithmetic(tmp_path, "healthy"), 3, tmp_path)
    read = Path(manifest["spec"]["data"]["prompts"]["path"]).read_text().splitlines()
    lines = (MODELS / "arithmetic" / "train.jsonl").read_text().splitlines()
    assert len(read) == ROWS and read[-1] == lines[3 * 37] and set(read) < set(lines)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_two_hundred_healthy_starts_of_the_examples_raise_no_alarm(tmp_path: Path) -> None:
    starts: Counter[str] = Counter()
    for seed in soak.seeds(0.0, first=1, at_least=200):
        example = ROUNDS[seed % len(ROUNDS)]
        found = kinds(asyncio.run(start(example, seed, tmp_path / str(seed))))
        assert found <= KNOWN.get(example, set()), f"{example}, seed {seed}: {found}"
        starts[example] += 1
    assert starts.keys() == set(EXAMPLES)
    print(f"\n{starts.total()} healthy starts of {len(starts)} examples without an alarm", flush=True)
