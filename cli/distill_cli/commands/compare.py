"""`distill compare`: runs laid over each other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distill_cli.failure import CommandFailed
from distill_cli.options import cluster_of, is_folder, job_names, output, reader_image, with_connect, write_json
from distill_cli.run_folder import run_folder

if TYPE_CHECKING:
    from distill_cli.cluster import Cluster


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="JOB JOB...", shell_complete=job_names)
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a page with all curves over each other; it needs no other file and no network.",
)
@reader_image
@output("table", "json")
@with_connect
def compare(
    names: tuple[str, ...], page: Path | None, image: str | None, output: str, connect: Callable[[], Cluster]
) -> int:
    """Compare two runs or more: curves, evaluations, time by stage, cost, what differs in the spec.

    Each JOB is a job's name, or a run folder where it has a slash in it. Of a run and its control (objective.control)
    it is said whether the difference of their scores, at the last step at which both were measured, is outside the
    intervals of both. The runs may be going on, or have failed. Time and cost are those of the steps: accelerators of
    all roles, with as many engines as the spec has, times the seconds of the steps.
    """
    from distill_cli.views.comparison import curve_rows
    from distill_cli.views.tables import write_table
    from distill_workers.failures import Failure
    from distill_workers.results.comparison import as_json, differences, read_runs, sections
    from distill_workers.results.control import NO_VERDICT, pairs, verdicts

    if len(names) < 2:
        raise click.UsageError("give two jobs or run folders, or more: what is one run to be compared with?")
    if len({str(run_folder(Path(name)).resolve()) if is_folder(name) else name for name in names}) < len(names):
        raise click.UsageError("two of them are the same one; give each run once")
    with tempfile.TemporaryDirectory() as scratch:
        folders = _folders(names, Path(scratch), image, connect)
        try:
            runs = read_runs(folders)
        except Failure as error:
            raise CommandFailed(str(error), error.code) from error
    if page is not None:
        from distill_workers.results.comparison_page import comparison_page
        from distill_workers.run_folder.atomic_file import write_whole

        if not page.parent.is_dir():
            raise CommandFailed(f"--html {page}: there is no folder {page.parent}; make it, or choose another file")
        write_whole(page, comparison_page(runs))
    if output == "json":
        write_json(as_json(runs))
        return 0
    if len(curves := curve_rows(runs)) > 1:
        write_table(curves, "Curves")
        print()
    for section in sections(runs):
        write_table([section.head, *section.rows], section.title)
        print()
    for verdict in verdicts(runs):
        print(verdict.sentence)
    if pairs(runs) and not verdicts(runs):
        print(NO_VERDICT)
    if not differences(runs):
        print("The specs and the versions are equal.")
    if page is not None:
        print(page)
    return 0


def _folders(names: Sequence[str], scratch: Path, image: str | None, connect: Callable[[], Cluster]) -> list[Path]:
    """Return a folder for each run: its own or, of a job on a cluster, a copy of what tells of it."""
    jobs = [name for name in names if not is_folder(name)]
    if jobs:
        from distill_cli.reader.run_files import read_run_files

        cluster = cluster_of(jobs[0], connect)
        for name in jobs:
            (scratch / name).mkdir()
            read_run_files(cluster, name, scratch / name, "records", image=image)
    return [Path(name) if is_folder(name) else scratch / name for name in names]
