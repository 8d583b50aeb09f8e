"""`distill grade`: how a reward grades responses, before a run is graded so."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.job import load_job
from distill_api.protocol import ExitCode
from distill_api.spec import Extract, Reward, RewardSource
from distill_cli.failure import FAILED, CommandFailed
from distill_cli.options import output, write_json

if TYPE_CHECKING:
    from distill_workers.data.sample import Prompt

SHOWN = 60
"""Characters of a reference and of an extracted answer in the table."""


@click.command()
@click.argument("rows", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Grade by objective.reward of this job.")
@click.option(
    "--reward",
    type=click.Choice([s.value for s in RewardSource if s is not RewardSource.NONE]),
    help="Grade by this reward; by default math.",
)
@click.option("--function", help="MODULE:FUNCTION of the reward python.")
@click.option("--url", help="Service of the reward http.")
@click.option("--extract", type=click.Choice([e.value for e in Extract]), help="What the reward math compares.")
@output("table", "json")
def grade(
    rows: Path,
    file: Path | None,
    reward: str | None,
    function: str | None,
    url: str | None,
    extract: str | None,
    output: str,
) -> int:
    """Show how a reward grades responses, what of each is graded, and where it was found.

    ROWS is a JSONL file; each line has `response`, `reference` (or `answer`), and may have `prompt` and `metadata`.
    Ends with 1 where a response could not be graded.
    """
    from rich.console import Console
    from rich.table import Table

    from distill_workers.failures import Failure

    fields = {"source": reward or "math", "function": function, "url": url, "extract": extract}
    if file is not None and any((reward, function, url, extract)):
        raise click.UsageError("-f takes the reward of the job; leave out the other options, or -f")
    try:
        chosen = (
            load_job(file).spec.objective.reward
            if file
            else Reward.model_validate({k: v for k, v in fields.items() if v})
        )
        if chosen.source is RewardSource.NONE:
            raise CommandFailed(f"{file} has no objective.reward; name one with --reward")
        graded = asyncio.run(_grade(chosen, list(_read(rows))))
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


def _read(path: Path) -> "list[tuple[Prompt, str]]":
    from distill_workers.data.sample import Prompt

    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            reference = row["reference"] if "reference" in row else row.get("answer")
            answer = None if reference is None else str(reference)
            found.append(
                (
                    Prompt(number, [], str(row.get("prompt", "")), answer, dict(row.get("metadata", {}))),
                    str(row["response"]),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CommandFailed(
                f"{path}:{number}: must be a JSON object with response and reference", ExitCode.CONFIGURATION
            ) from None
    return found


async def _grade(reward: Reward, rows: "list[tuple[Prompt, str]]") -> list[dict[str, Any]]:
    from distill_workers.metrics import Metrics
    from distill_workers.rewards.base import RewardError
    from distill_workers.rewards.build import build_reward

    made = build_reward(reward, Metrics())

    async def one(prompt: "Prompt", response: str) -> dict[str, Any]:
        row = {"row": prompt.index, "reference": prompt.answer or ""}
        try:
            return row | dataclasses.asdict(await made.grade(prompt, response))
        except RewardError as error:
            return row | {"score": None, "extracted": "", "origin": str(error)}

    try:
        return list(await asyncio.gather(*(one(*row) for row in rows)))
    finally:
        await made.close()
