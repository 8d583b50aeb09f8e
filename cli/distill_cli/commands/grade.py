"""`distill grade`: how a reward grades responses, before a run is graded so."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from distill_api.job import load_job, parse_job
from distill_api.manifest import read_manifest
from distill_api.protocol import ExitCode
from distill_api.spec.job_spec import Extract, Reward, RewardSource, Spec
from distill_api.validation import sentences
from distill_cli.failure import FAILED, CommandFailed
from distill_cli.options import output, volumes, write_json

if TYPE_CHECKING:
    from distill_workers.rewards.base import Reward as BuiltReward

SHOWN = 60
"""Characters of a reference and of an extracted answer in the table."""


@click.command()
@click.argument("rows", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "-f", "--file", type=click.Path(path_type=Path), help="Grade as this job does, by its rewards and its data."
)
@click.option("--evaluation", help="Grade as this evaluation of the job does.")
@click.option(
    "--reward",
    type=click.Choice([s.value for s in RewardSource if s not in (RewardSource.NONE, RewardSource.ENVIRONMENT)]),
    help="Grade by this reward; by default math.",
)
@click.option("--function", help="MODULE:FUNCTION of the reward python.")
@click.option("--url", help="Service of the reward http.")
@click.option("--extract", type=click.Choice([e.value for e in Extract]), help="What the reward math compares.")
@volumes
@output("table", "json")
def grade(
    rows: Path,
    file: Path | None,
    evaluation: str | None,
    reward: str | None,
    function: str | None,
    url: str | None,
    extract: str | None,
    volumes: tuple[tuple[str, str], ...],
    output: str,
) -> int:
    """Show how a reward grades responses, what of each is graded, and where it was found.

    ROWS is a file as of data; each row has `response`, `reference` (or `answer`), and may have `prompt` and `metadata`.
    With -f, a row without a reference answers the prompt of its `index` in the job's data, from 0, or else the next
    one. Ends with 1 where a response could not be graded.
    """
    from rich.console import Console
    from rich.table import Table

    from distill_workers.failures import Failure
    from distill_workers.local import grade as local

    if file is not None and any((reward, function, url, extract)):
        raise click.UsageError("-f takes the reward of the job; leave out the other options, or -f")
    if evaluation is not None and file is None:
        raise click.UsageError("--evaluation is one of the job that -f names")
    try:
        spec = None if file is None else _spec(file, dict(volumes), evaluation)
        answered = local.read_rows(rows, lambda: [] if spec is None else local.data_of(spec, evaluation))
        graded = asyncio.run(local.grade(answered, _rewards(spec, evaluation, reward, function, url, extract)))
    except ValidationError as error:
        raise CommandFailed("; ".join(sentences(error, Reward)), ExitCode.CONFIGURATION) from None
    except Failure as error:
        raise CommandFailed(str(error), error.code) from error
    if output == "json":
        write_json(graded)
    else:
        table = Table("row", "reference", "extracted", "from", "score")
        for row in graded:
            cells = (
                row["reference"],
                row["extracted"],
                row["origin"],
                "failed" if row["score"] is None else f"{row['score']:g}",
            )
            table.add_row(str(row["row"]), *(str(cell)[:SHOWN] for cell in cells))
        Console().print(table)
    return FAILED if any(row["score"] is None for row in graded) else int(ExitCode.DONE)


def _spec(file: Path, volumes: dict[str, str], evaluation: str | None) -> Spec:
    from distill_workers.local.run import with_volumes

    load_job(file)
    spec = parse_job(with_volumes(read_manifest(file.read_text(encoding="utf-8")), volumes)).spec
    known = [e.name for e in spec.evaluation]
    if evaluation is not None and evaluation not in known:
        raise CommandFailed(f"{file} has no evaluation {evaluation}; it has {', '.join(known) or 'none'}")
    return spec


def _rewards(
    spec: Spec | None,
    evaluation: str | None,
    reward: str | None,
    function: str | None,
    url: str | None,
    extract: str | None,
) -> "dict[str, BuiltReward]":
    from distill_workers.local import grade as local

    if spec is not None:
        return local.rewards_of(spec, evaluation)
    fields: dict[str, Any] = {"source": reward or "math", "function": function, "url": url, "extract": extract}
    return local.only(Reward.model_validate({k: v for k, v in fields.items() if v}))
