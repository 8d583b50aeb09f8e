"""The run folder: where everything that outlives a pod is kept, written aside and renamed."""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill_api.job import DistillationJob, InvalidManifest, parse_job
from distill_api.protocol import Variable
from distill_api.spec.job_spec import Schedule
from distill_workers.run_folder.atomic_file import write_whole
from distill_workers.run_folder.checkpoints import Checkpoints
from distill_workers.run_folder.identity import differences, fingerprint, models, sentence, weights_of
from distill_workers.run_folder.job_files import code_of, other_code, other_tools, tools_of
from distill_workers.run_folder.ownership import Owner, Ownership

__all__ = ["ForeignRun", "RunFolder", "fingerprint", "write_whole"]

PACKAGES = ("torch", "sglang", "megatron-core", "ray", "transformers")


class ForeignRun(ValueError):
    """The run folder holds another run."""


def _difference(mark: dict[str, Any], job: DistillationJob, weights: dict[str, str], tools: dict[str, str]) -> str:
    """Return what makes the run of a run.json another than that of `job`; empty for the same run.

    Its job is read as this release reads it: a field that is new here, and has its default there, makes no other run.
    """
    try:
        there = parse_job(mark["job"])
    except (InvalidManifest, KeyError):
        mine = fingerprint(job)
        theirs = str(mark["fingerprint"])
        return "" if theirs == mine else f"its spec has fingerprint {theirs}, this one {mine}"
    found = differences(there, job, mark.get("weights", {}), weights)
    return sentence([*found, *other_tools(there.spec, job.spec, mark.get("tools", {}), tools)])


def versions() -> dict[str, str]:
    """Of the packages that a curve depends on, as far as they are installed here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def versions_of(folder: Path) -> dict[str, str]:
    """Return the versions that the run in a folder was last begun with; of a folder without one, those installed
    here."""
    return recorded_versions(folder) or versions()


def recorded_versions(folder: Path) -> dict[str, str]:
    """Return the versions that the run in a folder was last begun with, as far as it tells."""
    mark = folder / "run.json"
    found: dict[str, str] = json.loads(mark.read_text(encoding="utf-8")).get("versions", {}) if mark.exists() else {}
    return found


class RunFolder:
    """Paths and atomic writes of `<spec.output.path>/<metadata.name>/`."""

    def __init__(self, job: DistillationJob) -> None:
        self.root = Path(job.spec.output.path) / job.metadata.name
        self.checkpoints = self.root / "checkpoints"
        self.model = self.root / "model"
        self.sync = self.root / "sync"
        self.teacher = self.root / "teacher"
        self._job = job
        self._ownership: Ownership | None = None
        """The claim of a trainer; None for who only reads."""

    def claim(self) -> list[str]:
        """Make the folder, or take up the run in it, as its newest trainer. Returns notes of what is not as it was in
        the attempt before, and makes no other run.

        Raises ForeignRun, Superseded where a newer trainer has it, and OSError if it cannot be written.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        mark = self.root / "run.json"
        found = {path: weights_of(model) for path, model in models(self._job.spec).items()}
        weights = {path: known for path, known in found.items() if known is not None}
        tools, code, notes = tools_of(self._job.spec), code_of(self._job.spec), list[str]()
        if mark.exists():
            earlier = json.loads(mark.read_text(encoding="utf-8"))
            if other := _difference(earlier, self._job, weights, tools):
                raise ForeignRun(
                    f"{self.root} holds another run ({other}): choose another spec.output.path or metadata.name, or "
                    "remove the folder"
                )
            weights = earlier.get("weights", {}) | weights
            tools = earlier.get("tools", {}) | tools
            notes = other_code(earlier.get("code", {}), code)
        attempt = int(os.environ.get(Variable.ATTEMPT, "0"))
        ownership = Ownership(self.root, Owner.of_this_process(self._job, attempt))
        ownership.claim()
        self._ownership = ownership
        manifest = self._job.model_dump(mode="json", by_alias=True, exclude_none=True)
        content = {"weights": weights, "tools": tools, "code": code}
        what = {"fingerprint": fingerprint(self._job), "versions": versions(), **content, "job": manifest}
        write_whole(mark, json.dumps(what, indent=1))
        return notes

    def check_ownership(self) -> None:
        """Raise Superseded if this folder was claimed, and is a newer trainer's by now. Before each publication."""
        if self._ownership is not None:
            self._ownership.check()

    def claim_text(self) -> str | None:
        """Return the claim on this folder for another process (`Ownership.from_text`); None without one."""
        return self._ownership.text() if self._ownership is not None else None

    def replace(self, name: str, text: str) -> None:
        """Replace a file in the folder whole."""
        self.check_ownership()
        write_whole(self.root / name, text)

    def append(self, name: str, line: dict[str, Any], limit_bytes: int | None = None) -> None:
        """One more line of a .jsonl file. One that has grown to `limit_bytes` is kept as NAME.1.jsonl, and a new one
        is begun: the two never hold much more than twice as much."""
        self.check_ownership()
        path = self.root / name
        if limit_bytes is not None and path.exists() and path.stat().st_size >= limit_bytes:
            path.replace(path.with_suffix(f".1{path.suffix}"))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def trim(self, step: int, keep_as: str | None = None) -> None:
        """Forgets the lines of metrics.jsonl and samples.jsonl after `step`, as a resumed run writes them again;
        or moves them to the end of another file."""
        self.check_ownership()
        for path in (self.root / "metrics.jsonl", self.root / "samples.jsonl"):
            if not path.exists():
                continue
            kept: list[str] = []
            later: list[str] = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    (kept if json.loads(line)["step"] <= step else later).append(line)
                except (ValueError, KeyError):
                    break  # the line that a kill cut short, and so the last
            if keep_as is not None:
                with (self.root / keep_as).open("a", encoding="utf-8") as file:
                    file.writelines(line + "\n" for line in later)
            write_whole(path, "".join(line + "\n" for line in kept))

    def roll_back(self, folder: Path, state: dict[str, Any]) -> None:
        """Makes an earlier checkpoint the newest, with another state: what came after it is no part of the run.
        Lines of later steps go to rolled-back.jsonl, later checkpoints go altogether."""
        self.check_ownership()
        Checkpoints(self.checkpoints).roll_back(folder, state)
        self.trim(state["step"], keep_as="rolled-back.jsonl")

    def checkpoint_aside(self, step: int) -> Path:
        """An empty folder for the ranks to write into. One at a time."""
        self.check_ownership()
        return Checkpoints(self.checkpoints).aside(step)

    def publish_checkpoint(self, aside: Path, state: dict[str, Any], schedule: Schedule) -> Path:
        """Makes a checkpoint that every rank has written the newest; then removes those that `schedule` keeps not."""
        self.check_ownership()
        return Checkpoints(self.checkpoints).publish(aside, state, schedule, self.check_ownership)

    def checkpoint_steps(self) -> set[int]:
        """The steps of all checkpoints, also of one that is being written."""
        return Checkpoints(self.checkpoints).steps()

    def latest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its state. Raises DamagedCheckpoints."""
        return Checkpoints(self.checkpoints).latest()

    def best_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint of the best step by the first evaluation, if it is kept, and its state."""
        return Checkpoints(self.checkpoints).best()
