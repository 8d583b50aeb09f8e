"""`distill compare`: runs laid over each other."""

from pathlib import Path

import click

from distill_cli.failure import CommandFailed
from distill_cli.options import FOLDER, output, write_json
from distill_cli.run_folder import run_folder


@click.command()
@click.argument("folders", type=FOLDER, nargs=-1, required=True, metavar="FOLDER FOLDER...")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a page with all curves over each other; it needs no other file and no network.",
)
@output("table", "json")
def compare(folders: tuple[Path, ...], page: Path | None, output: str) -> int:
    """Compare the runs in two run folders or more: curves, evaluations, time by stage, cost, what differs in the spec.

    Of a run and its control (objective.control) it is said whether the difference of their scores, at the last step at
    which both were measured, is outside the intervals of both. The runs may be going on, or have failed. Time and cost
    are those of the steps: accelerators of all roles, with as many engines as the spec has, times the seconds of the
    steps.
    """
    from distill_cli.views.comparison import curve_rows
    from distill_cli.views.tables import write_table
    from distill_workers.failures import Failure
    from distill_workers.results.comparison import as_json, differences, read_runs, sections
    from distill_workers.results.control import NO_VERDICT, pairs, verdicts

    if len(folders) < 2:
        raise click.UsageError("give two run folders or more: what is one run to be compared with?")
    if len({run_folder(folder).resolve() for folder in folders}) < len(folders):
        raise click.UsageError("two of the folders are the same one; give each run once")
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
