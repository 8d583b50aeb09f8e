"""`distill watch`: a job of a cluster, or a run folder, to its end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.base import KIND
from distill_api.names import LABEL_JOB, LABEL_ROLE, Role
from distill_api.protocol import TRAINER_PORT
from distill_cli.failure import CommandFailed
from distill_cli.options import job_name, output, reaches
from distill_cli.snapshot import (
    Curves,
    Happening,
    Moment,
    extended,
    folder_moment,
    happenings,
    job_state,
    mean_stages,
    now_utc,
    run_folder,
)

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

POLL_SECONDS = 2.0
LOST_SECONDS = 60.0
"""That an API server may be away while a job is watched."""


@click.command()
@job_name
@output("lines", "json")
@reaches
def watch(job: str, output: str, connect: Callable[[], Cluster]) -> int:
    """Follow JOB, a job's name or a run folder, to its end, whose exit code is that of the command.

    On a terminal: progress, the curves of KL and reward, seconds by stage, roles, events. In a pipe: a line for each
    change; with -o json, an object for each. A folder is meant where JOB has a slash in it.
    """
    if "/" in job or job == ".":
        return show_to_end(states_of_folder(run_folder(Path(job))), output)
    return show_to_end(states_of_job(connect(), job), output)


def show_to_end(moments: Iterator[Moment], output: str) -> int:
    """Shows each as it comes; the exit code of the job."""
    from rich.console import Console

    from distill_cli.console import view

    last: Moment | None = None
    if output == "json":
        for moment in moments:
            if last is None or as_json(moment) != as_json(last):
                print(json.dumps(as_json(moment), ensure_ascii=False), flush=True)
            last = moment
    else:
        with view(Console()) as shown:
            for last in moments:
                shown.show(last)
    assert last is not None and last.end is not None
    if output == "lines":
        click.echo(last.end.sentence, err=last.end.code != 0)
    return last.end.code


def as_json(moment: Moment) -> dict[str, Any]:
    """Without the curves, which are the progress of the objects before."""
    found = dataclasses.asdict(dataclasses.replace(moment, curves=Curves()))
    del found["curves"]
    return {**found, "progress": moment.progress.model_dump(mode="json", by_alias=True, exclude_none=True)}


def states_of_folder(folder: Path) -> Iterator[Moment]:
    """Until the run has ended."""
    while True:
        moment = folder_moment(folder)
        yield moment
        if moment.end is not None:
            return
        time.sleep(POLL_SECONDS)


def states_of_job(cluster: Cluster, name: str) -> Iterator[Moment]:
    """Until the job has ended, or is gone. An API server that is away for a while is waited for."""
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
        events = happenings_of_job(cluster, name)
        yield Moment(state.state, state.progress, curves, stages, state.roles, events, state.end)
        if state.end is not None:
            return
        time.sleep(POLL_SECONDS)


def happenings_of_job(cluster: Cluster, name: str) -> tuple[Happening, ...]:
    """None where they may not be read: they are not what the job depends on."""
    from distill_cli.cluster import ApiError

    try:
        return happenings(
            cluster.core("events", fieldSelector=f"involvedObject.name={name},involvedObject.kind={KIND}")
        )
    except ApiError:
        return ()


def stages_of_job(cluster: Cluster, name: str) -> dict[str, float]:
    """Mean seconds by stage, from the metrics of the trainer's rank 0 through the API server; none where that may not
    be asked."""
    from distill_cli.cluster import ApiError

    try:
        pods = cluster.core("pods", labelSelector=f"{LABEL_JOB}={name},{LABEL_ROLE}={Role.TRAINER}")
        running = [pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") == "Running"]
        for pod in sorted(running):
            path = f"/api/v1/namespaces/{cluster.namespace}/pods/{pod}:{TRAINER_PORT}/proxy/metrics"
            if found := mean_stages(cluster.text(path)):
                return found
    except ApiError:
        return {}
    return {}
