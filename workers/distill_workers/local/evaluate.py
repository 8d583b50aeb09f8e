"""`distill evaluate`: a finished model, measured as a run measures its student: by one engine on this machine."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from distill_api.protocol import Variable
from distill_api.spec.job_spec import Evaluation, RewardSource, Spec
from distill_api.teacher.dataset_scores import TeacherLogprobs
from distill_api.teacher.student import teaches_itself
from distill_workers.engine.engine import Engine, Response
from distill_workers.evaluation.estimates import Estimate
from distill_workers.evaluation.evaluator import Evaluator, Measurement
from distill_workers.local.devices import place_here
from distill_workers.local.machine import check_temporary_folder
from distill_workers.local.placement import Placement
from distill_workers.metrics import Metrics
from distill_workers.model_folder import model_folder
from distill_workers.run.preflight.model_agreement import check_models, ends, load_tokenizer, teacher_tokenizers
from distill_workers.teacher.cross_tokenizer.translators import translators
from distill_workers.teacher.local_servers import TeacherServers
from distill_workers.teacher.teachers import Teachers

T = TypeVar("T")

HERE = "here"
"""The teacher is served on this machine, rather than at an address."""
POLL_SECONDS = 1.0
WEIGHTS = 0
"""Version of weights that no run has pushed."""


class OneEngine:
    """An engine as Evaluator asks for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def sample(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, top_p: float, seeds: list[int]
    ) -> list[Response]:
        return await self._engine.sample(prompt_ids, seeds, max_new_tokens, temperature, top_p)


def chosen(spec: Spec, names: Sequence[str], with_teacher: bool) -> list[Evaluation]:
    """Those of spec.evaluation that are named, or all. Raises ValueError for what cannot be measured."""
    known = {e.name: e for e in spec.evaluation}
    if not known:
        raise ValueError("the job has no spec.evaluation: add what shall be measured")
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"spec.evaluation has no {', '.join(unknown)}: it has {', '.join(known)}")
    found = [known[n] for n in names] if names else list(known.values())
    if with_teacher and teaches_itself(spec):
        raise ValueError(
            "--teacher: the teacher is the student itself (teacher.student), as the run has it at each step; the run "
            "measures the reverse KL to it, so leave --teacher out"
        )
    if not with_teacher and (bare := [e.name for e in found if e.reward.source is RewardSource.NONE]):
        raise ValueError(
            f"evaluation {', '.join(bare)} has no reward, and so measures the reverse KL alone: add --teacher"
        )
    return found


async def evaluate(spec: Spec, model: str, names: Sequence[str], teacher: str | None) -> list[Measurement]:
    """`teacher` is HERE, where those serve that do (as in DISTILL_TEACHER_ADDRESS), or None to leave out what needs it.

    Raises ValueError, Failure, and what a server that does not start or answer raises.
    """
    evaluations = chosen(spec, names, teacher is not None)
    # A teacher that is asked for here is wanted, also where the run itself does without.
    live = spec.objective.model_copy(update={"teacher_logprobs": TeacherLogprobs.LIVE})
    spec = spec.model_copy(update={"objective": live})
    check_temporary_folder()
    folder = model_folder(model, "--model")
    placement = place_here(spec, model, "--model", ranks=0, engines=1, teachers=teacher == HERE) or Placement()
    tokenizer = load_tokenizer(folder, "--model", trust_remote_code=spec.trust_remote_code)
    metrics, tokenizers = Metrics(), teacher_tokenizers(spec) if teacher is not None else {}
    evaluators = [Evaluator(spec, e, tokenizer, metrics, teachers=tokenizers) for e in evaluations]
    with tempfile.TemporaryDirectory(prefix="distill-evaluate-") as logs:
        devices = next(iter(placement.engines), None)
        engine = Engine(spec, 0, host="127.0.0.1", port=None, log_folder=logs, devices=devices)
        engine.stop_token_ids = check_models(spec, folder, tokenizer).stop_token_ids
        stops = (*engine.stop_token_ids, *ends(folder, tokenizer).ids)
        async with teachers_of(spec, teacher, Path(logs), metrics, placement) as (teachers, servers):
            if teachers is not None:
                teachers.bound_ids(len(tokenizer))
                teachers.translate(translators(spec, tokenizer, stops, tokenizers))
            try:
                starting = asyncio.gather(engine.start(str(folder)), *([teachers.start()] if teachers else []))
                await while_served(starting, servers)
                return [await e.measure(WEIGHTS, OneEngine(engine), teachers) for e in evaluators]
            finally:
                await engine.stop()
                await asyncio.gather(*(e.close() for e in evaluators))


async def while_served(work: Awaitable[T], servers: TeacherServers | None) -> T:
    """Return the result of `work`. Raises Failure as soon as one of the servers ends meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if servers is not None:
                servers.restart_ended(served=False)
            await asyncio.wait({task}, timeout=POLL_SECONDS)
        return task.result()
    finally:
        task.cancel()


@asynccontextmanager
async def teachers_of(
    spec: Spec, where: str | None, logs: Path, metrics: Metrics, placement: Placement
) -> AsyncIterator[tuple[Teachers | None, TeacherServers | None]]:
    """Those of the job, yet to be started; and their servers, where they are ours, which are on their way up."""
    if where is None:
        yield None, None
        return
    servers = TeacherServers(spec, logs, placement.teachers) if where == HERE else None
    try:
        if servers is not None:
            servers.start()
            where = servers.addresses
        teachers = Teachers.of_job(spec, {**os.environ, Variable.TEACHER: where}, metrics)
        try:
            yield teachers, servers
        finally:
            await teachers.close()
    finally:
        if servers is not None:
            servers.stop()


def table(model: str, measured: Sequence[Measurement]) -> Table:
    made = Table(title=model, title_justify="left", caption_justify="left")
    for name in ("evaluation", "measure", "value", "95 % interval"):
        made.add_column(name)
    for m in measured:
        rows = [("score", between(m.score, m.score_low, m.score_high)), *passes(m.pass_at)]
        rows += [("reverse KL, nats", between(m.reverse_kl)), ("teacher's score", between(m.teacher_score))]
        for measure, cells in rows:
            if cells is not None:
                made.add_row(m.name, measure, *cells)
        made.add_row(m.name, "prompts, failed responses", f"{m.prompts}, {m.failed}", "", end_section=True)
    return made


def passes(estimates: dict[int, Estimate]) -> list[tuple[str, tuple[str, str] | None]]:
    return [(f"pass@{k}", between(e.value, e.low, e.high)) for k, e in estimates.items()]


def between(value: float | None, low: float | None = None, high: float | None = None) -> tuple[str, str] | None:
    if value is None:
        return None
    return f"{value:.4f}", "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
