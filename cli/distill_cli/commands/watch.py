"""`distill watch`: follow a job of a cluster, or a run folder, to its end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.base import KIND
from distill_api.names import Role
from distill_cli.failure import CommandFailed
from distill_cli.job_state import job_state, mean_stages, newest_events, now_utc
from distill_cli.options import job_name, output, with_connect
from distill_cli.pods import pods_of_role, running, trainer_path
from distill_cli.run_folder import folder_snapshot, run_folder
from distill_cli.snapshot import Curves, JobEvent, Snapshot, extended

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

POLL_SECONDS = 2.0
LOST_SECONDS = 60.0
"""How long the API server may not answer while a job is watched."""


@click.command()
@job_name
@output("lines", "json")
@with_connect
def watch(job: str, output: str, connect: Callable[[], Cluster]) -> int:
    """Follow JOB, a job's name or a run folder, to its end, whose exit code is that of the command.

    On a terminal: progress, the curves of KL and reward, seconds by stage, roles, events. In a pipe: a line for each
    change; with -o json, an object for each. JOB is taken for a folder where it has a slash in it.
    """
    if "/" in job or job == ".":
        return show_to_end(snapshots_of_folder(run_folder(Path(job))), output)
    return show_to_end(snapshots_of_job(connect(), job), output)


def show_to_end(snapshots: Iterator[Snapshot], output: str) -> int:
    """Show each snapshot as it comes. Return the exit code of the job."""
    from rich.console import Console

    from distill_cli.views.progress import view

    last: Snapshot | None = None
    if output == "json":
        for snapshot in snapshots:
            if last is None or as_json(snapshot) != as_json(last):
                print(json.dumps(as_json(snapshot), ensure_ascii=False), flush=True)
            last = snapshot
    else:
        with view(Console()) as shown:
            for last in snapshots:
                shown.show(last)
    assert last is not None and last.end is not None
    if output == "lines":
        click.echo(last.end.sentence, err=last.end.code != 0)
    return last.end.code


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot for programs, without the curves: they are the progress of the objects before it."""
    found = dataclasses.asdict(dataclasses.replace(snapshot, curves=Curves()))
    del found["curves"]
    return {**found, "progress": snapshot.progress.model_dump(mode="json", by_alias=True, exclude_none=True)}


def snapshots_of_folder(folder: Path) -> Iterator[Snapshot]:
    """Yield snapshots of a run folder until its run has ended."""
    while True:
        snapshot = folder_snapshot(folder)
        yield snapshot
        if snapshot.end is not None:
            return
        time.sleep(POLL_SECONDS)


def snapshots_of_job(cluster: Cluster, name: str) -> Iterator[Snapshot]:
    """Yield snapshots of a job until it has ended.

    An API server that does not answer is waited for, LOST_SECONDS at most. Raises CommandFailed where the job is
    deleted.
    """
    from distill_cli.cluster import ApiError

    curves, before, answered = Curves(), None, None
    while True:
        try:
            state = job_state(cluster.job(name), now_utc())
        except ApiError as error:
            away = error.status == 0 or error.status >= 500
            if answered is None or not away or time.monotonic() - answered > LOST_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        except CommandFailed as error:
            if answered is None:
                raise
            raise CommandFailed(f"job {name} was deleted while it was watched") from error
        answered = time.monotonic()
        curves, before = extended(curves, before, state.progress), state.progress
        stages = stages_of_job(cluster, name) if state.end is None and state.progress.step else {}
        events = events_of_job(cluster, name)
        yield Snapshot(state.state, state.progress, curves, stages, state.roles, events, state.end)
        if state.end is not None:
            return
        time.sleep(POLL_SECONDS)


def events_of_job(cluster: Cluster, name: str) -> tuple[JobEvent, ...]:
    """Return the newest Events of a job; none where they may not be read, as the job does not depend on them."""
    from distill_cli.cluster import ApiError

    try:
        return newest_events(
            cluster.core("events", fieldSelector=f"involvedObject.name={name},involvedObject.kind={KIND}")
        )
    except ApiError:
        return ()


def stages_of_job(cluster: Cluster, name: str) -> dict[str, float]:
    """Return the mean seconds by stage, from the metrics of the trainer's rank 0 through the API server.

    They are empty where the pods, or their proxy, may not be read.
    """
    from distill_cli.cluster import ApiError

    try:
        pods = running(pods_of_role(cluster, name, Role.TRAINER))
        for pod in sorted(pod["metadata"]["name"] for pod in pods):
            if found := mean_stages(cluster.text(trainer_path(cluster, pod, "/metrics"))):
                return found
    except ApiError:
        return {}
    return {}
