"""Whatever happens to a checkpoint, the run has one to go on from; and those that are asked for are kept."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill_api.spec.job_spec import Schedule
from distill_workers.run_folder.checkpoints import Checkpoints, DamagedCheckpoints, superfluous


def schedule(**keep: Any) -> Schedule:
    return Schedule(steps=100, checkpoint_every_steps=1, **keep)


def publish(checkpoints: Checkpoints, step: int, best: int | None = None, **keep: Any) -> Path:
    aside = checkpoints.aside(step)
    (aside / "rank-0").write_bytes(bytes(1000))
    evaluations = [] if best is None else [{"name": "heldout", "bestStep": best}]
    return checkpoints.publish(aside, {"step": step, "progress": {"evaluations": evaluations}}, schedule(**keep))


def step_of(found: tuple[Path, dict[str, Any]] | None) -> int | None:
    if found is None:
        return None
    path, state = found
    assert path.name == f"step-{state['step']:06d}" and (path / "rank-0").exists()
    return int(state["step"])


@pytest.mark.parametrize(("scenario", "before", "after"), [
    ("first", None, [20, 2.0]), ("next", [10, 1.0], [20, 2.0]), ("again", [10, 1.0], [10, 2.0]),
])  # fmt: skip
def test_killed_before_any_file_operation_of_a_save_the_last_whole_checkpoint_is_used(
    tmp_path: Path, scenario: str, before: Any, after: Any
) -> None:
    command = [sys.executable, Path(__file__).with_name("checkpoint_kills.py"), tmp_path / "run", scenario]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    old, new = result["kills"].count(before), result["kills"].count(after)
    assert old > 40 and new > 5, "kills fell on both sides of the moment at which the new one is whole"
    assert result["kills"] == [before] * old + [after] * new and result["whole"] == after


@pytest.mark.parametrize(
    ("keep", "best", "gone"),
    [
        ({"keep_last": 2}, None, {10, 20, 30, 70}),
        ({"keep_last": 1}, 20, {10, 30, 40, 70}),
        ({"keep_last": 1, "keep_best": False}, 20, {10, 20, 30, 40, 70}),
        ({"keep_last": 1, "keep_every": 20}, None, {10, 30, 70}),
        ({"keep_last": 10}, None, {70}),
    ],
    ids=["last", "best", "best not asked for", "every", "all"],
)
def test_the_newest_the_best_and_every_nth_are_kept_and_nothing_after_the_newest(
    keep: dict[str, Any], best: int | None, gone: set[int]
) -> None:
    assert superfluous([10, 20, 30, 40, 50, 70], 50, best, schedule(**keep)) == gone


def test_publishing_removes_what_is_not_kept_and_what_a_killed_save_left(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        publish(checkpoints, step, best, keep_last=1)
    checkpoints.aside(9)
    publish(checkpoints, 5, 2, keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002", "step-000005"]
    assert step_of(checkpoints.latest()) == 5 and step_of(checkpoints.best()) == 2


def test_a_save_has_the_room_that_one_before_it_took_and_did_not_end(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    publish(checkpoints, 1)
    (checkpoints.aside(2) / "rank-0").write_bytes(b"half")  # and here the volume was full
    assert [p.name for p in tmp_path.glob("*.tmp")] == ["step-000002.tmp"]
    aside = checkpoints.aside(3)
    assert list(tmp_path.glob("*.tmp")) == [aside] and list(aside.iterdir()) == []
    assert step_of(checkpoints.latest()) == 1


def test_there_is_no_best_checkpoint_where_none_was_measured_or_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() is None
    publish(checkpoints, 1)
    assert checkpoints.best() is None
    publish(checkpoints, 2, best=1, keep_last=1, keep_best=False)
    assert checkpoints.best() is None


def test_after_a_roll_back_the_run_goes_on_from_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        publish(checkpoints, step, best=1, keep_last=3)
    checkpoints.roll_back(tmp_path / "step-000001", {"step": 1, "guard": "it was one"})
    found = checkpoints.latest()
    assert step_of(found) == 1 and found is not None and found[1]["guard"] == "it was one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]


DAMAGES = {
    "is torn (rank-0 has 999 of 1000 bytes)": lambda newest: (newest / "rank-0").write_bytes(bytes(999)),
    "or of an earlier version (rank-0: No such file or directory)": lambda newest: (newest / "rank-0").unlink(),
    "or of an earlier version (files.json: No such file or directory)": lambda newest: (newest / "files.json").unlink(),
    "is damaged (Expecting value": lambda newest: (newest / "state.json").write_text(""),
    "is not there": lambda newest: shutil.rmtree(newest),
    "names none": lambda newest: [(newest / "state.json").unlink(), (newest.parent / "latest").unlink()],
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_the_log_says_why(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    publish(checkpoints, 1)
    publish(checkpoints, 2)
    DAMAGES[fault](tmp_path / "step-000002")
    assert step_of(checkpoints.latest()) == 1
    assert fault in caplog.text and "going on from step-000001, the newest that is complete" in caplog.text
    assert step_of(Checkpoints(tmp_path).latest()) == 1 and len(caplog.messages) == 1, "said once"


def test_a_run_whose_every_checkpoint_is_damaged_is_refused_and_does_not_begin_anew(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    publish(checkpoints, 1)
    (tmp_path / "step-000001" / "rank-0").unlink()
    with pytest.raises(DamagedCheckpoints, match=r"names step-000001, which is incomplete.*to begin anew"):
        checkpoints.latest()
