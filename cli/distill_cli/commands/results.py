"""`distill report` and `export`: what a run has come to, from its folder or from the cluster that it runs on."""

from __future__ import annotations

import shutil
import tempfile
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distill_api.job import parse_job
from distill_cli.failure import CommandFailed
from distill_cli.options import FOLDER, cluster_of, is_folder, job_name, reader_image, volumes, with_connect
from distill_cli.run_folder import run_folder

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster

Volumes = tuple[tuple[str, str], ...]


@click.command()
@job_name
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where the page of a job on a cluster is written; by default JOB.html.",
)
@click.option("--open", "opened", is_flag=True, help="Show the page in a browser.")
@reader_image
@with_connect
def report(job: str, page: Path | None, opened: bool, image: str | None, connect: Callable[[], Cluster]) -> int:
    """Write the report of JOB, a job's name or a run folder: curves, stage times, rollouts, configuration, versions.

    One file, which needs no other file and no network. In a run folder it is report.html, with curve.png beside it. Of
    a job on a cluster, running or finished, a pod makes it from the run folder on the output volume, and is removed.
    JOB is taken for a folder where it has a slash in it.
    """
    if is_folder(job):
        if page is not None:
            raise click.UsageError("--html is for a job on a cluster; the page of a run folder is report.html in it")
        page = _report_of_folder(Path(job))
    else:
        page = page or Path(f"{job}.html")
        _report_of_job(cluster_of(job, connect), job, page, image)
    print(page)
    if opened and not _shown(page):
        click.echo(f"distill: no browser is known here: open {page} in one", err=True)
    return 0


def _report_of_folder(folder: Path) -> Path:
    import json

    from distill_workers.reporting.report import write_report

    run_folder(folder)
    write_report(folder, parse_job(json.loads((folder / "run.json").read_text(encoding="utf-8"))["job"]))
    return folder / "report.html"


def _report_of_job(cluster: Cluster, name: str, page: Path, image: str | None) -> None:
    from distill_cli.reader.run_files import read_run_files

    if not page.parent.is_dir():
        raise CommandFailed(f"--html {page}: there is no folder {page.parent}; make it, or choose another file")
    # Beside the page, so that it can be renamed.
    with tempfile.TemporaryDirectory(dir=page.parent, prefix=f".{page.name}.") as folder:
        read_run_files(cluster, name, Path(folder), "report", image=image)
        (Path(folder) / "report.html").replace(page)


def _shown(page: Path) -> bool:
    try:
        return webbrowser.get().open(page.resolve().as_uri())
    except webbrowser.Error:
        return False


@click.command()
@job_name
@click.argument("destination", type=FOLDER)
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="From the checkpoint of this step.")
@click.option("--best", is_flag=True, help="From the best checkpoint by the first evaluation.")
@volumes
@reader_image
@with_connect
def export(
    job: str,
    destination: Path,
    step: int | None,
    best: bool,
    volumes: Volumes,
    image: str | None,
    connect: Callable[[], Cluster],
) -> int:
    """Write the model of JOB, a job's name or a run folder, to DESTINATION, as a Hugging Face checkpoint.

    By default the model that the run exported at its end or, where it has not come to that, its newest checkpoint,
    which is converted here, on one CPU, in memory for one copy of the model, and with the student that the run began
    with. Of a job on a cluster, running or finished, a pod reads the run folder on the output volume, and is removed;
    each file is checked by its size and its hash. JOB is taken for a folder where it has a slash in it.
    """
    if best and step is not None:
        raise click.UsageError("--step and --best name two checkpoints; give one of them")
    if is_folder(job):
        what = _exported(run_folder(Path(job)), destination, step=step, best=best, volumes=volumes)
    else:
        what = _export_of_job(
            cluster_of(job, connect), job, destination, step=step, best=best, volumes=volumes, image=image
        )
    print(f"{destination}: {what}")
    return 0


def _exported(folder: Path, destination: Path, *, step: int | None, best: bool, volumes: Volumes) -> str:
    from distill_workers.failures import Failure
    from distill_workers.local.export import export

    try:
        return export(folder, destination, step=step, best=best, volumes=dict(volumes))
    except Failure as error:
        raise CommandFailed(str(error), error.code) from error


def _export_of_job(
    cluster: Cluster,
    name: str,
    destination: Path,
    *,
    step: int | None,
    best: bool,
    volumes: Volumes,
    image: str | None,
) -> str:
    """Receive the model beside the destination, and rename it; a checkpoint is converted from there."""
    from distill_cli.reader.run_files import MODEL_SECONDS, read_run_files

    if destination.exists() and any(destination.iterdir()):
        raise CommandFailed(f"{destination} is not empty: choose another folder, or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    options = ["--best"] if best else ["--step", str(step)] if step is not None else []
    aside = destination.resolve().with_name(f".{destination.name}.receiving")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        read_run_files(cluster, name, aside, "model", *options, image=image, seconds=MODEL_SECONDS)
        if not (aside / "model").is_dir():
            # No other checkpoint has come.
            return _exported(aside, destination, step=None, best=False, volumes=volumes)
        if destination.exists():
            destination.rmdir()
        (aside / "model").rename(destination)
        return "the model that the run exported"
    finally:
        shutil.rmtree(aside, ignore_errors=True)
