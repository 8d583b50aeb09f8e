"""Prompts: read once from their sources, rendered as the student is asked, and tokenised."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_api.spec.job_spec import Prompts, Spec
from distill_workers.data.entries import Entry, entries_of, messages_of, name_of
from distill_workers.data.findings import Findings, shared
from distill_workers.data.rendering import OwnTokensRenderer, Renderer, TeacherRenderer
from distill_workers.data.routing import Route
from distill_workers.data.sample import Prompt
from distill_workers.failures import PromptError
from distill_workers.metrics import Metrics

log = logging.getLogger(__name__)

BATCH = 512
"""Prompts that are tokenised at once."""
PROGRESS_SECONDS = 10.0
"""Between two lines of the log while a source is read."""
SINGLE_TEACHER = Route()
"""The route of a job with one teacher."""
Tokenizers = Mapping[str, Any]
"""Of teachers with a tokenizer of their own (teacher.tokenizer), by their names."""
STUDENTS: Tokenizers = {}
"""All teachers have the student's tokenizer."""


def load_data(spec: Spec, tokenizer: Any, metrics: Metrics, teachers: Tokenizers = STUDENTS) -> list[Prompt]:
    """Return the training prompts of all sources, with `index` counted through all of them. Raises PromptError."""
    result: list[Prompt] = []
    for source in spec.data.all_sources:
        route = Route.of(spec, source)
        longest, messages = spec.rollout.max_prompt_tokens, spec.rollout.environment is not None
        found, long = load_prompts(
            source.prompts, tokenizer, longest, None, route, messages=messages, teachers=teachers
        )
        metrics.set("distill_prompts_overlong", long, source=source.name)
        if result and (known := shared(result, found)):
            log.warning("source %s: %s", source.name, known)
        first = result[-1].index + 1 if result else 0
        result += [dataclasses.replace(p, index=first + p.index, source=source.name) for p in found]
    return result


def load_prompts(
    prompts: Prompts,
    tokenizer: Any,
    max_prompt_tokens: int,
    limit: int | None,
    route: Route = SINGLE_TEACHER,
    *,
    messages: bool = False,
    teachers: Tokenizers = STUDENTS,
) -> tuple[list[Prompt], int]:
    """Return the first `limit` prompts that are not too long, and how many were too long. Raises PromptError."""
    reader = PromptReader(prompts, tokenizer, max_prompt_tokens, route, messages=messages, teachers=teachers)
    result = [row.prompt for row in reader.read(kept=limit) if not row.left_out]
    name, seen, long = name_of(prompts), reader.seen, reader.long
    for sentence in reader.sentences():
        log.warning("%s: %s", name, sentence)
    if not result:
        raise PromptError(
            f"{name}: all {seen} prompts are longer than rollout.maxPromptTokens {max_prompt_tokens}; raise it"
            if seen
            else f"{name}: has no prompts; each line of a JSONL file is one JSON object, each row of Parquet one prompt"
        )
    return result, long


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a source as a prompt of the student."""

    where: str
    prompt: Prompt
    left_out: str = ""
    """Why the prompt is no part of the run; empty for one that is."""
    teacher_text: str | None = None
    """What the teacher is asked instead, where it is privileged."""


class PromptReader:
    """A reader of one source, with counts of what it read."""

    def __init__(
        self,
        prompts: Prompts,
        tokenizer: Any,
        max_prompt_tokens: int,
        route: Route = SINGLE_TEACHER,
        *,
        messages: bool = False,
        teachers: Tokenizers = STUDENTS,
    ) -> None:
        """`messages`: prompts have them too. Raises PromptError for a model that cannot render such prompts."""
        self._prompts, self._longest, self._route, self._messages = prompts, max_prompt_tokens, route, messages
        self._renderer, self._teachers = Renderer(prompts, tokenizer), TeacherRenderer.of(prompts, tokenizer)
        self._tokenizers, self._of_teacher = teachers, dict[str, OwnTokensRenderer]()
        self.findings, self._teacher_findings = Findings(), Findings()
        self.seen = self.long = 0

    def read(self, *, kept: int | None = None, rows: int | None = None) -> Iterator[PromptRow]:
        """Yield the rows until `kept` of them are not left out, or the first `rows`. Raises PromptError.

        No row is read beyond those.
        """
        entries = itertools.islice(entries_of(self._prompts, self._route, self.findings), rows)
        told, left = time.monotonic(), kept
        while batch := list(itertools.islice(entries, BATCH if left is None else min(BATCH, left))):
            rendered = self._renderer.encode(batch, self.findings)
            for entry, (text, ids), (asked, privileged) in zip(batch, rendered, self._privileged(batch), strict=True):
                row = (entry.answer, entry.metadata, "", entry.response, entry.teacher, entry.key)
                messages = messages_of(entry) if self._messages else None
                prompt = Prompt(self.seen, ids, text, *row, privileged_ids=privileged, messages=messages)
                self.seen += 1
                too_long = max(len(ids), len(prompt.teacher_ids)) > self._longest
                self.long += too_long
                left = left if left is None or too_long else left - 1
                whose = "" if len(ids) > self._longest else "the teacher's prompt is "
                reason = f"{whose}longer than rollout.maxPromptTokens {self._longest}" if too_long else ""
                yield PromptRow(entry.where, prompt, reason, asked)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                log.info(
                    "%s: %s prompts read, the newest at %s", name_of(self._prompts), f"{self.seen:,}", batch[-1].where
                )

    def sentences(self) -> list[str]:
        """Return what should be known of the rows that were read, with counts."""
        long = f"{self.long} of {self.seen} prompts left out, longer than rollout.maxPromptTokens {self._longest}"
        of_teacher = (f"as the teacher is asked: {s}" for s in self._teacher_findings.sentences(self.seen))
        return [*([long] if self.long else []), *self.findings.sentences(self.seen), *of_teacher]

    def _privileged(self, batch: list[Entry]) -> Sequence[tuple[str, list[int]] | tuple[None, None]]:
        """Return what the teacher is asked in each entry, as text and ids; None where it is asked the same."""
        found: list[tuple[str, list[int]] | tuple[None, None]] = [(None, None)] * len(batch)
        for name in {entry.teacher for entry in batch}:
            renderer = self._renderer_of(name)
            if renderer is not None:
                places = [place for place, entry in enumerate(batch) if entry.teacher == name]
                rendered = renderer.encode([batch[place] for place in places], self._teacher_findings)
                for place, asked in zip(places, rendered, strict=True):
                    found[place] = asked
        return found

    def _renderer_of(self, name: str) -> TeacherRenderer | None:
        """Return what renders the prompts of a teacher; None where it is asked the same.

        A tokenizer of its own must be able to render a source that has a prompt of it. Raises PromptError.
        """
        if name in self._tokenizers and name not in self._of_teacher:
            self._of_teacher[name] = OwnTokensRenderer(self._prompts, self._tokenizers[name], name)
        return self._of_teacher.get(name, self._teachers)
