"""Run folders as the commands read them: whether a folder is one, what its run has done, and how it ended."""

import json
from pathlib import Path
from typing import Any

from distill_api.protocol import ExitCode, ExitReason, ExitReport, Phase, ProgressReport
from distill_api.status import Progress
from distill_cli.failure import CommandFailed
from distill_cli.snapshot import Curves, End, Snapshot

Json = dict[str, Any]
TAIL_BYTES = 2**20
"""Bytes at the end of metrics.jsonl that are read for the curves: some hundred steps."""


def run_folder(folder: Path) -> Path:
    """Return the folder itself. Raises CommandFailed where it is no run folder."""
    if not (folder / "run.json").is_file():
        raise CommandFailed(
            f"{folder} is no run folder (no run.json there): give spec.output.path/metadata.name of the job, which is "
            "on the claim spec.output.volume where it runs on a cluster"
        )
    return folder


def folder_snapshot(folder: Path, report: ProgressReport | None = None) -> Snapshot:
    """Return the snapshot of a run folder, with `report` where a newer one is at hand than its state.json."""
    state = folder / "state.json"
    if report is None and state.exists():
        report = ProgressReport.model_validate(json.loads(state.read_text(encoding="utf-8")), extra="ignore")
    report = report or ProgressReport(phase=Phase.STARTING, progress=Progress())
    curves, stages = tail_of(folder / "metrics.jsonl")
    return Snapshot(report.phase.value, report.progress, curves, stages, end=folder_end(folder))


def tail_of(metrics: Path) -> tuple[Curves, dict[str, float]]:
    """Return the curves of the last steps in metrics.jsonl, and the seconds by stage of the last one.

    Both are empty before the first step.
    """
    kl: list[float] = []
    reward: list[float] = []
    stages: dict[str, float] = {}
    if metrics.exists():
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        for text in lines:
            try:
                line: Json = json.loads(text)
                if line["kind"] != "step":
                    continue
            except (ValueError, KeyError, TypeError):
                continue  # being written, or cut off at the beginning
            kl += [line["reverse_kl"]] if line.get("reverse_kl") is not None else []
            reward += [line["reward"]] if line.get("reward") is not None else []
            stages = dict(line.get("stages", {}))
    return Curves(tuple(kl), tuple(reward)), stages


def folder_end(folder: Path) -> End | None:
    """Return how the run in the folder ended, or None while it goes on.

    A run that was resumed has written a state.json that is newer than the exit.json of its earlier end.
    """
    ended, state = folder / "exit.json", folder / "state.json"
    if not ended.exists() or (state.exists() and state.stat().st_mtime_ns > ended.stat().st_mtime_ns):
        return None
    report = ExitReport.model_validate(json.loads(ended.read_text(encoding="utf-8")), extra="ignore")
    if report.reason is ExitReason.COMPLETED:
        return End(ExitCode.DONE, f"done: model {folder / 'model'}")
    final = report.reason in (ExitReason.CONFIGURATION_ERROR, ExitReason.PREFLIGHT_FAILED)
    code = ExitCode.CONFIGURATION if final else ExitCode.TEMPORARY
    return End(code, f"ended, {report.reason.value}: {report.message}")
