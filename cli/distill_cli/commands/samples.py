"""`distill samples`: decoded rollouts, of a run folder or of a job whose trainer runs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distill_api.names import Role
from distill_cli.failure import CommandFailed
from distill_cli.options import cluster_of, is_folder, job_name, output, reader_image, with_connect, write_json
from distill_cli.pods import newest_attempt, pods_of_role, rank_0, running, trainer_path
from distill_cli.run_folder import run_folder

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster
    from distill_workers.reporting.samples_file import Rollout


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
@reader_image
@output("table", "json")
@with_connect
def samples(
    job: str,
    step: int | None,
    limit: int,
    source: str | None,
    image: str | None,
    output: str,
    connect: Callable[[], Cluster],
) -> int:
    """Show decoded rollouts of JOB, a job's name or a run folder, each token coloured by its reverse KL.

    A token is red where the teacher finds it less likely than the student did, blue where more. In a pipe the furthest
    tokens are listed instead. Of a job on a cluster the trainer serves the newest rollouts while it runs; earlier ones,
    and those of a job that has ended, are read by a pod from the run folder on the output volume. JOB is taken for a
    folder where it has a slash in it.
    """
    from rich.console import Console

    from distill_cli.views.rollout import rollout_text, select_rollouts
    from distill_workers.reporting.samples_file import every_rollout

    rollouts: Iterable[Rollout]
    if is_folder(job):
        folder = Path(job)
        rollouts, where = every_rollout(run_folder(folder)), str(folder / "samples.jsonl")
    else:
        rollouts, where = rollouts_of_job(cluster_of(job, connect), job, image, step, source)
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


def rollouts_of_job(
    cluster: Cluster, name: str, image: str | None, step: int | None, source: str | None
) -> tuple[Iterable[Rollout], str]:
    """Return rollouts of a job, among which are those of a step or a data source if there are any, and from where.

    Trainer rank 0 serves the newest through the API server; the others, and those of a job without a trainer, are read
    by a pod. Raises CommandFailed, also where the newest are those of a trainer that has made no step yet.
    """
    from distill_cli.views.rollout import select_rollouts
    from distill_workers.reporting.samples_file import every_rollout, rollouts_in

    uid = cluster.job(name)["metadata"]["uid"]
    first = rank_0(running(newest_attempt(pods_of_role(cluster, name, Role.TRAINER, uid=uid))))
    text = _served(cluster, first["metadata"]["name"]) if first is not None else None
    served = list(rollouts_in((text or "").splitlines()))
    if text is not None and not served and step is None:
        raise CommandFailed(f"the trainer of job {name} has no rollout yet: wait for the first step")
    if select_rollouts(served, step, source, 1):
        return served, f"what the trainer of job {name} serves"
    from distill_cli.reader.run_files import read_run_files

    with tempfile.TemporaryDirectory() as folder:
        read_run_files(cluster, name, Path(folder), "records", image=image)
        return list(every_rollout(Path(folder))), f"samples.jsonl of job {name}"


def _served(cluster: Cluster, pod: str) -> str | None:
    """Return what a trainer serves; None where a NetworkPolicy, say, keeps the API server from it."""
    from distill_cli.cluster import ApiError

    try:
        return cluster.text(trainer_path(cluster, pod, "/samples"))
    except ApiError as error:
        if error.status == 403:
            raise
        return None


def _of(step: int | None, source: str | None) -> str:
    return (f" of step {step}" if step is not None else "") + (f" from source {source}" if source else "")
