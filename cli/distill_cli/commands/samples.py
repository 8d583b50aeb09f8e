"""`distill samples`: decoded rollouts, of a run folder or of a job whose trainer runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.names import Role
from distill_cli.failure import CommandFailed
from distill_cli.job_state import job_state, now_utc
from distill_cli.options import job_name, output, with_connect, write_json
from distill_cli.pods import newest_attempt, pods_of_role, rank_0, running, trainer_path
from distill_cli.run_folder import run_folder

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster
    from distill_workers.reporting.samples_file import Rollout

Json = dict[str, Any]


@click.command()
@job_name
@click.option(
    "--step", type=click.IntRange(min=1), metavar="N", help="Rollouts of this step; by default of the newest."
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    default=4,
    show_default=True,
    help="Upper bound of the rollouts shown.",
)
@click.option("--source", help="Rollouts of this data source alone.")
@output("table", "json")
@with_connect
def samples(
    job: str, step: int | None, limit: int, source: str | None, output: str, connect: Callable[[], Cluster]
) -> int:
    """Show decoded rollouts of JOB, a job's name or a run folder, each token coloured by its reverse KL.

    A token is red where the teacher finds it less likely than the student did, blue where more. In a pipe the furthest
    tokens are listed instead. Of a job on a cluster the trainer serves the newest rollouts while it runs; all that were
    kept are in the run folder on its output volume. JOB is taken for a folder where it has a slash in it.
    """
    from rich.console import Console

    from distill_cli.views.rollout import rollout_text, select_rollouts
    from distill_workers.reporting.samples_file import every_rollout

    rollouts: Iterable[Rollout]
    if "/" in job or job == ".":
        folder = Path(job)
        rollouts, where = every_rollout(run_folder(folder)), str(folder / "samples.jsonl")
    else:
        rollouts, where = rollouts_of_job(connect(), job), f"what the trainer of job {job} serves"
    found = select_rollouts(rollouts, step, source, limit)
    if not found:
        raise CommandFailed(f"{where} has no rollout{_of(step, source)}: wait for the first step, or ask for another")
    if output == "json":
        write_json([dataclasses.asdict(rollout) for rollout in found])
        return 0
    console = Console()
    coloured, sixteen_colours = console.is_terminal and not console.no_color, console.color_system == "standard"
    for rollout in found:
        console.print(
            rollout_text(rollout, coloured=coloured, sixteen_colours=sixteen_colours), soft_wrap=True, end="\n\n"
        )
    return 0


def rollouts_of_job(cluster: Cluster, name: str) -> list[Rollout]:
    """Return the newest rollouts, from trainer rank 0 through the API server.

    Raises CommandFailed, with where the run folder is, where the trainer cannot be reached.
    """
    from distill_cli.cluster import ApiError
    from distill_workers.reporting.samples_file import rollouts_in

    job = cluster.job(name)
    pods = pods_of_role(cluster, name, Role.TRAINER, uid=job["metadata"]["uid"])
    first = rank_0(running(newest_attempt(pods)))
    if first is None:
        raise CommandFailed(
            f"job {name} has no running trainer; it is {job_state(job, now_utc()).state}. {where_kept(job)}"
        )
    pod = first["metadata"]["name"]
    try:
        return list(rollouts_in(cluster.text(trainer_path(cluster, pod, "/samples")).splitlines()))
    except ApiError as error:
        if error.status == 403:
            raise
        raise CommandFailed(
            f"pod {pod} does not serve its rollouts through the API server ({error}). {where_kept(job)}"
        ) from error


def where_kept(job: Json) -> str:
    """Return a sentence that says where the run folder of a job on a cluster is."""
    output = job["spec"].get("output", {})
    claim = (output.get("volume") or {}).get("claimName")
    folder = f"{output.get('path', '/output')}/{job['metadata']['name']}"
    return (
        f"Its rollouts are in samples.jsonl of the run folder, {folder}"
        + (f" on claim {claim}" if claim else "")
        + "; where that is mounted, `distill samples FOLDER` shows them and `distill report FOLDER` writes report.html"
    )


def _of(step: int | None, source: str | None) -> str:
    return (f" of step {step}" if step is not None else "") + (f" from source {source}" if source else "")
