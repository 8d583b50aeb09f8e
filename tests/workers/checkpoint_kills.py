"""Saves a checkpoint again and again, killed (SIGKILL) before another file operation each time, and says what is found.

`python checkpoint_kills.py FOLDER SCENARIO` prints a JSON list, one entry a kill. A process of its own: it forks.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill_api.spec.job_spec import Schedule
from distill_workers.megatron.checkpoint import tensor_file
from distill_workers.run_folder.checkpoints import Checkpoints

RANKS = 2
COUNTED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir")


def save(folder: Path, step: int, content: float, **schedule: Any) -> None:
    """As the loop: every rank writes its file, then rank 0 publishes."""
    checkpoints = Checkpoints(folder)
    aside = checkpoints.aside(step)
    for rank in range(RANKS):
        tensor_file.write(aside / f"rank-{rank}", {"x": torch.full((999,), content)}, {"step": str(step)})
    checkpoints.publish(aside, {"step": step, "content": content}, Schedule(steps=100, **schedule))


def found(folder: Path) -> list[float] | None:
    """[step, content] of the checkpoint to go on from, every byte of which was looked at."""
    newest = Checkpoints(folder).latest()
    if newest is None:
        return None
    path, state = newest
    for rank in range(RANKS):
        with tensor_file.TensorFile(path / f"rank-{rank}") as file:
            x = torch.zeros(999)
            file.read("x", x)
            assert file.metadata == {"step": str(state["step"])} and x.eq(state["content"]).all(), path
    return [state["step"], state["content"]]


def killed_before(operation: int, work: Callable[[], None]) -> bool:
    """Does the work in a child that is killed before its operation number so and so; whether there were as many."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, arguments: Any) -> None:
            nonlocal left
            if event in COUNTED:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def counted(function: Callable[..., Any], event: str) -> Callable[..., Any]:
            def called(*arguments: Any, **named: Any) -> Any:
                count("open", ())
                return function(*arguments, **named)

            return called

        def half(descriptor: int, data: Any) -> int:
            return write(descriptor, data[: max(1, len(data) // 2)])  # as a disk may: the rest is another call

        write = os.write
        os.write, os.fsync = counted(half, "write"), counted(os.fsync, "fsync")  # no audit events of Python's own
        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(folder: Path, scenario: str) -> None:
    torch.set_num_threads(1)
    before, work = SCENARIOS[scenario]
    outcomes = []
    for operation in range(10_000):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        before(folder)
        killed = killed_before(operation, lambda: work(folder))
        outcome = found(folder)
        save(folder, 30, 3.0, keep_last=1)  # and the next attempt is not hindered by what was left
        assert found(folder) == [30, 3.0] and sorted(os.listdir(folder)) == ["latest", "step-000030"]
        if not killed:
            print(json.dumps({"kills": outcomes, "whole": outcome}))
            return
        outcomes.append(outcome)


SCENARIOS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "first": (lambda folder: None, lambda folder: save(folder, 20, 2.0)),
    "next": (lambda folder: save(folder, 10, 1.0), lambda folder: save(folder, 20, 2.0, keep_last=1)),
    "again": (lambda folder: save(folder, 10, 1.0), lambda folder: save(folder, 10, 2.0)),
}
"""What is there before, and the save that is killed: the first, one that replaces another, one of the same step."""

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
