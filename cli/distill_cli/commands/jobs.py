"""`distill list`, `suspend` and `resume`: the jobs of a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from distill_cli.job_state import JobState, job_state, now_utc
from distill_cli.options import job_name, output, with_cluster, write_json
from distill_cli.views.tables import write_table

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster


@click.command("list")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Jobs of every namespace.")
@output("table", "json")
@with_cluster
def list_jobs(everywhere: bool, output: str, cluster: Cluster) -> int:
    """List the jobs of a namespace: state, step, KL, reward, age."""
    now = now_utc()
    states = sorted(
        (job_state(job, now) for job in cluster.jobs(everywhere=everywhere)), key=lambda j: (j.namespace, j.name)
    )
    if output == "json":
        write_json([as_json(state) for state in states])
    elif states:
        write_table(rows(states, everywhere))
    else:
        where = "any namespace" if everywhere else f"namespace {cluster.namespace}"
        click.echo(f"no jobs in {where}; `distill submit -f FILE` makes one", err=True)
    return 0


def rows(states: Sequence[JobState], everywhere: bool) -> list[list[str]]:
    """Return the cells of the table, its head first."""
    head = ["NAME", "STATE", "STEP", "KL", "REWARD", "RESTARTS", "AGE"]
    found = [
        [
            state.name,
            state.state,
            f"{state.progress.step}/{state.progress.total_steps}",
            state.progress.reverse_kl or "",
            state.progress.reward or "",
            str(state.restarts),
            age(state.age_seconds),
        ]
        for state in states
    ]
    if everywhere:
        return [["NAMESPACE", *head], *([state.namespace, *row] for state, row in zip(states, found, strict=True))]
    return [head, *found]


def age(seconds: float) -> str:
    """Return a duration as kubectl writes it: in the largest unit and, below ten of it, the next smaller one."""
    whole = max(0, int(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size}{unit}" + (f"{rest}{smaller}" if whole // size < 10 and rest else "")
    return f"{whole}s"


def as_json(state: JobState) -> dict[str, Any]:
    """Return the state for programs."""
    found = dataclasses.asdict(state)
    found["progress"] = state.progress.model_dump(mode="json", by_alias=True, exclude_none=True)
    return found


@click.command()
@job_name
@with_cluster
def suspend(job: str, cluster: Cluster) -> int:
    """Stop a job with a checkpoint and release its pods; `resume` goes on from there."""
    return _set_suspended(cluster, job, True)


@click.command()
@job_name
@with_cluster
def resume(job: str, cluster: Cluster) -> int:
    """Go on with a suspended job, from its newest checkpoint."""
    return _set_suspended(cluster, job, False)


def _set_suspended(cluster: Cluster, name: str, wanted: bool) -> int:
    state = job_state(cluster.job(name), now_utc())
    if state.end is not None:
        print(f"nothing to do: {state.end.sentence}")
        return 0
    if state.suspended == wanted:
        print(f"nothing to do: job {name} is {'suspended already' if wanted else 'not suspended'}")
        return 0
    cluster.patch_job(name, {"spec": {"suspend": wanted}})
    if wanted:
        print(f"job {name} is being suspended; `distill resume {name} -n {cluster.namespace}` goes on with it")
    else:
        print(f"job {name} goes on; `distill watch {name} -n {cluster.namespace}` follows it")
    return 0
