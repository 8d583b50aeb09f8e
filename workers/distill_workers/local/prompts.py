"""`distill prompts`: how the rows of a job's data are read, rendered and counted, before a run does it."""

from collections.abc import Iterator
from dataclasses import dataclass

from distill_api.spec.job_spec import Evaluation, Prompts, Source, Spec
from distill_workers.data.entries import name_of
from distill_workers.data.findings import overlap, shared
from distill_workers.data.prompts import PromptReader, PromptRow
from distill_workers.data.routing import Route
from distill_workers.data.sample import Prompt
from distill_workers.model_folder import model_folder
from distill_workers.run.preflight.model_agreement import load_tokenizer, teacher_tokenizers


@dataclass(frozen=True)
class SourceRows:
    """What was read of one source or evaluation."""

    name: str
    data: str
    """The file, folder, data set or task."""
    rows: list[PromptRow]
    """The first rows, those that are left out too."""
    read: int
    left_out: int
    notes: list[str]
    """What should be known of the rows that were read, as sentences."""


def read_sources(spec: Spec, shown: int, *, every_row: bool) -> Iterator[SourceRows]:
    """Yield each source and evaluation of a job with its first `shown` rows.

    Only these are read, or `every_row`: then the notes are of all of them, and name training prompts in an evaluation.
    Raises Failure for what would end the job.
    """
    folder = model_folder(spec.student.model, "spec.student.model")
    tokenizer = load_tokenizer(folder, "spec.student.model", trust_remote_code=spec.trust_remote_code)
    teachers = teacher_tokenizers(spec)
    training: list[Prompt] = []
    parts: list[tuple[str, Source | Evaluation, Prompts, int | None]] = [
        *((source.name, source, source.prompts, None) for source in spec.data.all_sources),
        *((f"evaluation/{e.name}", e, e.prompts, e.max_prompts) for e in spec.evaluation),
    ]
    for name, part, prompts, limit in parts:
        longest, route = spec.rollout.max_prompt_tokens, Route.of(spec, part)
        reader = PromptReader(prompts, tokenizer, longest, route, teachers=teachers)
        first: list[PromptRow] = []
        kept: list[Prompt] = []
        for row in reader.read(kept=limit, rows=None if every_row else shown):
            if len(first) < shown:
                first.append(row)
            if not row.left_out:
                kept.append(row.prompt)
        notes = reader.sentences()
        if isinstance(part, Source):
            notes += filter(None, [shared(training, kept)])
            training += kept
        elif known := overlap(training, kept):
            notes.append(known)
        yield SourceRows(name, name_of(prompts), first, reader.seen, reader.long, notes)
