"""`distill prompts`: what a job's student will be asked, before a run asks it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_api.job import load_job, parse_job
from distill_api.manifest import read_manifest
from distill_api.names import ONLY_TEACHER
from distill_cli.failure import CommandFailed
from distill_cli.options import one_file, output, volumes, write_json

if TYPE_CHECKING:
    from distill_workers.data.prompts import PromptRow
    from distill_workers.local.prompts import SourceRows


@click.command()
@one_file
@click.option(
    "-n", "count", type=click.IntRange(min=0), default=3, show_default=True, help="Rows to show of each source."
)
@click.option("--all", "every_row", is_flag=True, help="Read all rows, so that counts and notes are of all of them.")
@volumes
@output("lines", "json")
def prompts(file: Path, count: int, every_row: bool, volumes: tuple[tuple[str, str], ...], output: str) -> int:
    """Show how the first rows of a job's data are read, rendered by the student's chat template and counted in tokens.

    Of each source and evaluation, with what is left out and why. A row that would end the job ends this too, with 78.
    """
    from distill_workers.failures import Failure
    from distill_workers.local.prompts import read_sources
    from distill_workers.local.run import with_volumes

    load_job(file)
    spec = parse_job(with_volumes(read_manifest(file.read_text(encoding="utf-8")), dict(volumes))).spec
    found = []
    try:
        for source in read_sources(spec, count, every_row=every_row):
            found.append(_as_json(source))
            if output == "lines":
                click.echo("\n".join(_lines(source)))
    except Failure as error:
        raise CommandFailed(str(error), error.code) from error
    if output == "json":
        write_json(found)
    return 0


def _lines(source: "SourceRows") -> list[str]:
    lines = [f"{source.name}: {source.data}"]
    for row in source.rows:
        facts = [row.where, f"{len(row.prompt.ids)} tokens"]
        facts += [f"answer {row.prompt.answer!r}"] if row.prompt.answer is not None else []
        facts += [f"response {row.prompt.response!r}"] if row.prompt.response is not None else []
        facts += [f"teacher {row.prompt.teacher}"] if row.prompt.teacher != ONLY_TEACHER else []
        facts += [f"left out: {row.left_out}"] if row.left_out else []
        lines += [f"--- {', '.join(facts)}", row.prompt.text]
        if row.teacher_text is not None:
            lines += [f"--- the teacher is asked, {len(row.prompt.teacher_ids)} tokens", row.teacher_text]
    lines.append(f"--- {source.read} rows read, {source.left_out} left out")
    return [*lines, *(f"note: {note}" for note in source.notes), ""]


def _as_json(source: "SourceRows") -> dict[str, Any]:
    return {
        "name": source.name,
        "data": source.data,
        "read": source.read,
        "leftOut": source.left_out,
        "notes": source.notes,
        "rows": [_row(row) for row in source.rows],
    }


def _row(row: "PromptRow") -> dict[str, Any]:
    prompt = row.prompt
    return {
        "where": row.where,
        "tokens": len(prompt.ids),
        "text": prompt.text,
        "answer": prompt.answer,
        "response": prompt.response,
        "teacher": prompt.teacher,
        "teacherText": row.teacher_text,
        "leftOut": row.left_out,
    }
