"""`distill samples`: what the student writes, of a run folder or of a job whose trainer runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.names import LABEL_JOB, LABEL_ROLE, Role
from distill_api.protocol import TRAINER_PORT
from distill_cli.commands.logs import newest
from distill_cli.failure import CommandFailed
from distill_cli.options import job_name, output, reaches, write_json
from distill_cli.snapshot import job_state, now_utc, run_folder

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster
    from distill_workers.reporting.samples_file import Rollout

Json = dict[str, Any]
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
"""Of a trainer's pod: its number. Rank 0, which serves, is in the first."""


@click.command()
@job_name
@click.option("--step", type=click.IntRange(min=1), metavar="N", help="Of this step; by default of the newest.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", default=4, show_default=True, help="At most so many.")
@click.option("--source", help="Only of prompts of this data source.")
@output("table", "json")
@reaches
def samples(
    job: str, step: int | None, limit: int, source: str | None, output: str, connect: Callable[[], Cluster]
) -> int:
    """Show decoded rollouts of JOB, a job's name or a run folder, each token coloured by its reverse KL.

    A token is red where the teacher holds it less likely than the student did, blue where more. In a pipe the furthest
    tokens are listed instead. Of a job on a cluster the trainer serves the newest rollouts while it runs; all that were
    kept are in the run folder on its output volume. A folder is meant where JOB has a slash in it.
    """
    from rich.console import Console

    from distill_cli.rollout_view import chosen, shown
    from distill_workers.reporting.samples_file import every_rollout

    rollouts: Iterable[Rollout]
    if "/" in job or job == ".":
        folder = Path(job)
        rollouts, where = every_rollout(run_folder(folder)), str(folder / "samples.jsonl")
    else:
        rollouts, where = rollouts_of_job(connect(), job), f"what the trainer of job {job} serves"
    found = chosen(rollouts, step, source, limit)
    if not found:
        raise CommandFailed(f"{where} has no rollout{_of(step, source)}: wait for the first step, or ask for another")
    if output == "json":
        write_json([dataclasses.asdict(rollout) for rollout in found])
        return 0
    console = Console()
    coloured, few = console.is_terminal and not console.no_color, console.color_system == "standard"
    for rollout in found:
        console.print(shown(rollout, coloured=coloured, few=few), soft_wrap=True, end="\n\n")
    return 0


def rollouts_of_job(cluster: Cluster, name: str) -> list[Rollout]:
    """The newest, from trainer rank 0 through the API server. Raises CommandFailed with where the others are."""
    from distill_cli.cluster import ApiError
    from distill_workers.reporting.samples_file import rollouts_in

    job = cluster.job(name)
    pods = cluster.core("pods", labelSelector=f"{LABEL_JOB}={name},{LABEL_ROLE}={Role.TRAINER}")
    running = [pod for pod in newest(pods) if pod.get("status", {}).get("phase") == "Running"]
    first = next((pod for pod in running if pod["metadata"]["labels"].get(INDEX_LABEL, "0") == "0"), None)
    if first is None:
        raise CommandFailed(
            f"job {name} has no trainer that could be asked now; it is {job_state(job, now_utc()).state}. {kept(job)}"
        )
    pod = first["metadata"]["name"]
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{pod}:{TRAINER_PORT}/proxy/samples"
    try:
        return list(rollouts_in(cluster.text(path).splitlines()))
    except ApiError as error:
        if error.status == 403:
            raise
        raise CommandFailed(
            f"pod {pod} does not serve its rollouts through the API server ({error}). {kept(job)}"
        ) from (error)


def kept(job: Json) -> str:
    """Where the run folder of a job on a cluster is."""
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
