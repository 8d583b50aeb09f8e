"""`distill run` and `evaluate`: the workers on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from distill_api.job import load_job, parse_job
from distill_api.manifest import read_manifest
from distill_api.protocol import ExitCode
from distill_cli.failure import INTERRUPTED, CommandFailed
from distill_cli.options import one_file, output, settings, volumes, write_json
from distill_cli.run_folder import folder_snapshot

if TYPE_CHECKING:
    from distill_workers.local.run import LocalRun

Volumes = tuple[tuple[str, str], ...]


@click.command()
@one_file
@settings
@click.option("--resume", is_flag=True, help="Go on with the run in the folder, from its newest checkpoint.")
@click.option(
    "--control",
    is_flag=True,
    help="Then run the job as its own control, in the folder NAME-control: nothing that the teacher says is in its "
    "loss (objective.control). Says whether the difference is outside the intervals of both scores.",
)
@volumes
def run(file: Path, settings: tuple[str, ...], resume: bool, control: bool, volumes: Volumes) -> int:
    """Run a job on this machine, without a cluster.

    Ctrl-C ends it with a checkpoint, from which --resume goes on; a second one ends it at once.
    """
    from distill_cli.overrides import with_overrides
    from distill_workers.failures import Failure
    from distill_workers.local.run import LocalRun, with_volumes

    load_job(file)
    manifest = with_overrides(read_manifest(file.read_text(encoding="utf-8")), list(settings))
    parse_job(manifest)
    manifests = [manifest]
    try:
        if control:
            from distill_workers.local.control import compare_with_control, control_of

            manifests.append(control_of(manifest))
    except Failure as error:
        raise CommandFailed(str(error), error.code) from error
    runs = [LocalRun(parse_job(with_volumes(one, dict(volumes)))) for one in manifests]
    for local in runs:  # before hours are spent on the first
        local.claim(resume)
    for local in runs:
        if control and resume and local.is_done():
            print(f"distill run: {local.job.metadata.name} is done, and is not run again: {local.folder.root}")
            continue
        code = _run(local)
        if code != ExitCode.DONE:
            return code
    if control:
        folders = [local.folder.root for local in runs]
        for sentence in compare_with_control(*folders):
            print(f"control: {sentence}")
        print(f"control: both curves {folders[0] / 'control.html'}")
    return int(ExitCode.DONE)


def _run(local: LocalRun) -> int:
    """Run a job to its end, show it and say how it ended; return the exit code."""
    from rich.console import Console

    from distill_cli.views.progress import view
    from distill_workers.failures import Failure
    from distill_workers.reporting.report import write_report

    folder = local.folder.root
    print(f"distill run: {local.job.metadata.name}, results and logs in {folder}", flush=True)
    try:
        with view(Console()) as shown:
            code = local.run(lambda report: shown.show(folder_snapshot(folder, report)), shown.say)
    except Failure as error:
        raise CommandFailed(str(error), error.code) from error
    report = local.exit_report()
    if (folder / "metrics.jsonl").exists():
        try:
            write_report(folder, local.job)
        except OSError as error:  # it must not hide how the run ended
            click.echo(f"no report was written: {error}; `distill report {folder}` writes it", err=True)
    if code == ExitCode.DONE:
        if report and report.final and report.final.result and report.final.result.stopped_by:
            print(report.message)
        print(f"done: model {local.folder.model}, curve {folder / 'report.html'}")
        for place in report.final.publications if report and report.final else ():
            said = "published" if place.done else "not published"
            click.echo(f"{said}: {place.to}, step {place.step}: {place.message}", err=not place.done)
    elif code == INTERRUPTED:
        click.echo("ended at once; --resume goes on from the newest checkpoint, if there is one", err=True)
    elif local.interrupts:
        newest = local.folder.latest_checkpoint()
        kept = f"at step {newest[1]['step']}; --resume goes on from there" if newest else "before the first step"
        click.echo(f"stopped {kept}", err=True)
    else:
        why = f"{report.reason.value}: {report.message}" if report else f"see {folder / 'logs'}"
        click.echo(f"failed: {why}", err=True)
    return code


@click.command()
@click.option("--model", required=True, help="Folder of the model, such as a run's model/, or a hub id.")
@one_file
@click.option(
    "--evaluation", "names", multiple=True, metavar="NAME", help="Only the evaluation of this name; may be repeated."
)
@click.option(
    "--teacher",
    is_flag=False,
    flag_value="here",
    metavar="HOST:PORT",
    help="Measure the reverse KL too, to a teacher that serves there; without a value it is served on this machine.",
)
@volumes
@output("table", "json")
def evaluate(model: str, file: Path, names: tuple[str, ...], teacher: str | None, volumes: Volumes, output: str) -> int:
    """Measure a model by the evaluations of a job, as a run of the job would."""
    import asyncio
    import dataclasses

    from rich.console import Console

    from distill_workers.engine.engine import EngineUnavailable
    from distill_workers.failures import Failure
    from distill_workers.local.evaluate import evaluate, table
    from distill_workers.local.run import with_volumes
    from distill_workers.serving.server import ServerFailed
    from distill_workers.teacher.pool import TeacherUnreachable

    load_job(file)
    spec = parse_job(with_volumes(read_manifest(file.read_text(encoding="utf-8")), dict(volumes))).spec
    try:
        measured = asyncio.run(evaluate(spec, model, names, teacher))
    except Failure as error:
        raise CommandFailed(str(error), error.code) from error
    except (EngineUnavailable, ServerFailed, TeacherUnreachable) as error:
        raise CommandFailed(str(error)) from error
    if output == "json":
        write_json({"model": model, "evaluations": [dataclasses.asdict(m) for m in measured]})
    else:
        Console().print(table(model, measured))
    return 0
