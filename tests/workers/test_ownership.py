"""A trainer that a newer one has replaced publishes nothing more, wherever in a publication it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill_api.job import DistillationJob, parse_job
from distill_workers.failures import Superseded
from distill_workers.run_folder.checkpoints import Checkpoints
from distill_workers.run_folder.run_folder import RunFolder


def job(output: Path, *, uid: str = "u1", created: str = "2026-11-29T10:00:00Z") -> DistillationJob:
    spec = {
        "accelerator": "none",
        "student": {"model": "/models/student"},
        "teacher": {"model": "/models/teacher"},
        "data": {"prompts": {"path": "/data"}},
        "schedule": {"steps": 50, "checkpointEverySteps": 5},
        "output": {"path": str(output)},
    }
    return parse_job(
        {
            "apiVersion": "distillation-operator.io/v1alpha1",
            "kind": "DistillationJob",
            "metadata": {"name": "j", "uid": uid, "creationTimestamp": created},
            "spec": spec,
        }
    )


def claimed(of: DistillationJob, attempt: int, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("DISTILL_ATTEMPT", str(attempt))
    folder = RunFolder(of)
    folder.claim()
    return folder


def written(folder: RunFolder, step: int) -> Path:
    aside = folder.checkpoint_aside(step)
    (aside / "rank-0000.safetensors").write_bytes(b"weights")
    return aside


def publish(folder: RunFolder, aside: Path, step: int, of: DistillationJob) -> None:
    folder.publish_checkpoint(aside, {"step": step}, of.spec.schedule)


def everything(root: Path) -> dict[str, Any]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_late_save_of_the_attempt_before_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cluster.md 1b: an old trainer's save deleted the new one's checkpoints and moved `latest` back."""
    of = job(tmp_path)
    old = claimed(of, 1, monkeypatch)
    late = written(old, 24)
    new = claimed(of, 2, monkeypatch)
    for step in (25, 30):
        publish(new, written(new, step), step, of)
    before = everything(new.root)
    with pytest.raises(Superseded, match="attempt 2 of job u1 has taken over"):
        publish(old, late, 24, of)
    assert everything(new.root) == before
    newest = new.latest_checkpoint()
    assert newest is not None and newest[1] == {"step": 30}


@pytest.mark.parametrize("checks_passed", [1, 2])
def test_one_that_is_replaced_in_the_middle_of_a_publication_goes_no_further(
    checks_passed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = job(tmp_path)
    old = claimed(of, 1, monkeypatch)
    publish(old, written(old, 20), 20, of)
    aside = written(old, 24)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > checks_passed:
            old.check_ownership()
        elif calls == checks_passed:
            claimed(of, 2, monkeypatch)

    with pytest.raises(Superseded):
        Checkpoints(old.checkpoints).publish(aside, {"step": 24}, of.spec.schedule, check)
    mark = (old.checkpoints / "latest").read_text()
    assert mark == ("step-000020" if checks_passed == 1 else "step-000024")
    assert (old.checkpoints / "step-000020" / "state.json").exists()


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: folder.append("metrics.jsonl", {"step": 3}),
        lambda folder: folder.replace("state.json", "{}"),
        lambda folder: folder.trim(1),
        lambda folder: folder.checkpoint_aside(5),
        lambda folder: folder.roll_back(folder.checkpoints / "step-000001", {"step": 1}),
        lambda folder: folder.check_ownership(),
    ],
)
def test_every_way_to_write_is_closed_to_the_one_before(
    act: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = job(tmp_path)
    old = claimed(of, 1, monkeypatch)
    old.append("metrics.jsonl", {"step": 2})
    new = claimed(of, 2, monkeypatch)
    before = everything(new.root)
    with pytest.raises(Superseded):
        act(old)
    assert everything(new.root) == before


OLDER = {"uid": "u1", "created": "2026-11-29T10:00:00Z"}
YOUNGER = {"uid": "u0", "created": "2026-11-29T11:00:00Z"}


@pytest.mark.parametrize(
    ("first", "second", "second_may"),
    [
        ((OLDER, 2), (OLDER, 1), False),
        ((OLDER, 1), (OLDER, 1), True),
        ((OLDER, 7), (YOUNGER, 1), True),
        ((YOUNGER, 1), (OLDER, 7), False),
    ],
    ids=["an earlier attempt", "a pod that replaces one of its attempt", "a younger job", "an older job"],
)
def test_who_may_take_a_folder_over(
    first: tuple[dict[str, str], int],
    second: tuple[dict[str, str], int],
    second_may: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named, attempt = first
    claimed(job(tmp_path, **named), attempt, monkeypatch)
    named, attempt = second
    if second_may:
        claimed(job(tmp_path, **named), attempt, monkeypatch).append("metrics.jsonl", {"step": 1})
        return
    with pytest.raises(Superseded, match="publishes nothing more"):
        claimed(job(tmp_path, **named), attempt, monkeypatch)


def test_a_reader_needs_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = job(tmp_path)
    new = claimed(of, 1, monkeypatch)
    publish(new, written(new, 5), 5, of)
    found = RunFolder(of).latest_checkpoint()
    assert found is not None and found[1] == {"step": 5}
    assert json.loads((new.root / "owner.json").read_text())["attempt"] == 1
