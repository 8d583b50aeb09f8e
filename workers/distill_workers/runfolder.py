"""The run folder: where everything that outlives a pod is kept, written aside and renamed."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from distill_api.job import DistillationJob

STEP_FORMAT = "step-{:06d}"
FREE_FIELDS: dict[str, bool | set[str]] = {
    "suspend": True,
    "backoff_limit": True,
    "active_deadline_seconds": True,
    "pre_running_deadline_seconds": True,
    "stall_timeout_seconds": True,
    "ttl_seconds_after_finished": True,
    "schedule": True,
    "guards": True,
    "output": True,
    "teacher": {"replicas", "template", "max_concurrent_requests", "request_timeout_seconds"},
    "rollout": {"replicas", "template", "head_template", "max_concurrent_requests"},
    "trainer": {"template"},
}
"""What may differ between two runs of one curve."""


class ForeignRun(ValueError):
    """The run folder holds another run."""


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a crash, sees the old or the new text."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def fingerprint(job: DistillationJob) -> str:
    """Equal for two jobs that would draw the same curve."""
    spec = job.spec.model_dump(mode="json", exclude=FREE_FIELDS)
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


class RunFolder:
    """Paths and atomic writes of `<spec.output.path>/<metadata.name>/`."""

    def __init__(self, job: DistillationJob) -> None:
        self.root = Path(job.spec.output.path) / job.metadata.name
        self.checkpoints = self.root / "checkpoints"
        self.model = self.root / "model"
        self.sync = self.root / "sync"
        self._job = job

    def claim(self) -> None:
        """Makes the folder, or takes up the run in it. Raises ForeignRun, and OSError if it cannot be written."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        mark = self.root / "run.json"
        mine = fingerprint(self._job)
        if mark.exists() and (theirs := json.loads(mark.read_text())["fingerprint"]) != mine:
            raise ForeignRun(
                f"{self.root} holds another run (its spec has fingerprint {theirs}, this one {mine}): "
                "choose another spec.output.path or metadata.name, or remove the folder"
            )
        manifest = self._job.model_dump(mode="json", by_alias=True, exclude_none=True)
        write_whole(mark, json.dumps({"fingerprint": mine, "job": manifest}, indent=1))

    def append(self, name: str, line: dict[str, Any], limit_bytes: int | None = None) -> None:
        """One more line of a .jsonl file. One that has grown to `limit_bytes` is kept as NAME.1.jsonl, and a new one
        is begun: the two never hold much more than twice as much."""
        path = self.root / name
        if limit_bytes is not None and path.exists() and path.stat().st_size >= limit_bytes:
            path.replace(path.with_suffix(f".1{path.suffix}"))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def trim(self, step: int, keep_as: str | None = None) -> None:
        """Forgets the lines of metrics.jsonl and samples.jsonl after `step`, as a resumed run writes them again;
        or moves them to the end of another file."""
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
        write_whole(folder / "state.json", json.dumps(state))
        write_whole(self.checkpoints / "latest", folder.name)
        for later in self.checkpoints.glob("step-*"):
            if later.name > folder.name:
                shutil.rmtree(later, ignore_errors=True)
        self.trim(state["step"], keep_as="rolled-back.jsonl")

    def checkpoint_aside(self, step: int) -> Path:
        """An empty folder for the ranks to write into."""
        aside = self.checkpoints / (STEP_FORMAT.format(step) + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return aside

    def publish_checkpoint(self, aside: Path, state: dict[str, Any], keep: int) -> Path:
        """Makes a written checkpoint the newest: state, rename, `latest` last; then removes the oldest."""
        write_whole(aside / "state.json", json.dumps(state))
        final = aside.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        write_whole(self.checkpoints / "latest", final.name)
        done = sorted(p for p in self.checkpoints.glob("step-*") if p.suffix != ".tmp")
        for old in done[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its state."""
        mark = self.checkpoints / "latest"
        if not mark.exists():
            return None
        folder = self.checkpoints / mark.read_text().strip()
        return folder, json.loads((folder / "state.json").read_text())

    def best_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint of the best step by the first evaluation, if it is kept, and its state."""
        newest = self.latest_checkpoint()
        evaluations = newest[1]["progress"]["evaluations"] if newest else []
        best = evaluations[0]["bestStep"] if evaluations else None
        folder = self.checkpoints / STEP_FORMAT.format(best or 0)
        if best is None or not (folder / "state.json").exists():
            return None
        return folder, json.loads((folder / "state.json").read_text())
