"""A trace of each step for OpenTelemetry, where the usual environment variables name a collector; off by default.

The root span is `step`, from its first wait to its new weights. Below it, each with the version of the weights that it
is of: `rollout` (generation of the batch, which begins before the step where maxPolicyLag lets it), `score` (teacher
and reward, from the first response on), `train` (forward, backward and update), `sync` (weights to the engines) and
`evaluate`. They overlap as the work does. Spans are made once a step is done, of times that were noted anyway: nothing
waits for the collector. A pass that a guard repeats has no trace.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill_api.job import DistillationJob
from distill_api.metrics import StepStage
from distill_api.protocol import Variable
from distill_workers.failures import ConfigurationError
from distill_workers.run.callbacks.base import TrainStep

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
CLOSE_SECONDS = 5.0
"""How long the end of a run waits for spans to be sent."""

STEP, VERSION, SAMPLES, TOKENS = "distill.step", "distill.policy_version", "distill.samples", "distill.tokens"
INPUT, OUTPUT = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
"""Of OpenTelemetry's conventions for generative AI."""

Span = tuple[str, tuple[float, float], dict[str, Any]]
"""Name, beginning and end in time.monotonic seconds, attributes."""


def is_traced(environment: Mapping[str, str]) -> bool:
    """Return whether the variables name a collector, and do not switch traces off.

    Raises ConfigurationError for an address or a protocol that the exporter cannot use.
    """
    variable, endpoint = _first(environment, ENDPOINTS)
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not endpoint or disabled or environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return False
    if not re.match(r"https?://[^/\s]", endpoint):
        raise ConfigurationError(
            f"{variable} is {endpoint}, and must be an address such as http://collector:4318, or unset for no traces"
        )
    variable, protocol = _first(environment, PROTOCOLS)
    if protocol not in ("", PROTOCOL):
        raise ConfigurationError(
            f"{variable} is {protocol}, and traces are sent by {PROTOCOL} only: set that, and the collector's HTTP "
            "port (4318) in OTEL_EXPORTER_OTLP_ENDPOINT"
        )
    return True


def _first(environment: Mapping[str, str], names: Sequence[str]) -> tuple[str, str]:
    """Return name and value of the first of the variables that has a value; an empty value where none has."""
    return next(((name, environment[name]) for name in names if environment.get(name)), (names[0], ""))


def traces_of(job: DistillationJob, environment: Mapping[str, str] = os.environ) -> list[TraceCallback]:
    """Return the callback that traces the steps of a job; nothing where no collector is named.

    Raises ConfigurationError as `is_traced`.
    """
    if not is_traced(environment):
        return []
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    about: dict[str, str | int] = {
        "service.name": environment.get("OTEL_SERVICE_NAME") or "distill-trainer",
        "distill.job": job.metadata.name,
        "distill.attempt": int(environment.get(Variable.ATTEMPT, "0")),
    }
    provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return [TraceCallback(provider)]


class TraceCallback:
    """Makes a trace of every step that is done, and of the evaluation after the last."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("distill_workers")

    async def before_update(self, step: TrainStep) -> None:
        if step.batch is None and step.evaluations:
            self._export(step)

    async def after_step(self, step: TrainStep) -> None:
        self._export(step)

    async def close(self) -> None:
        """Send what is left, and wait for it, but not for long: a collector may be gone."""
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, CLOSE_SECONDS)

    def _export(self, step: TrainStep) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        monotonic, wall = time.monotonic(), time.time()

        def nanoseconds(at: float) -> int:
            return int((wall + at - monotonic) * 1e9)

        known = {STEP: step.index + (step.batch is not None), VERSION: step.index}
        begin = nanoseconds(step.clock.begin)
        root = self._tracer.start_span("step", Context(), start_time=begin, attributes=known)
        below = set_span_in_context(root, Context())
        for name, (begin_at, end_at), attributes in spans(step):
            span = self._tracer.start_span(name, below, start_time=nanoseconds(begin_at), attributes=attributes)
            span.end(nanoseconds(end_at))
        root.end(nanoseconds(monotonic))


def spans(step: TrainStep) -> Iterator[Span]:
    """Yield the spans below that of a step; what did not happen in it has none."""
    clock, batch = step.clock, step.batch
    if (evaluated := clock.extent(StepStage.EVALUATE)) is not None:
        yield "evaluate", evaluated, {VERSION: step.index, "distill.evaluations": [e.name for e in step.evaluations]}
    if batch is None:
        return
    sampled = [s for s in step.samples if not s.supervised]
    if sampled and batch.first_generated_at is not None:
        usage = {INPUT: sum(len(s.prompt_ids) for s in sampled), OUTPUT: sum(s.trained_tokens for s in sampled)}
        oldest = min(s.weight_version for s in sampled)
        about = {SAMPLES: len(sampled), VERSION: oldest, **usage}
        yield "rollout", (batch.launched_at, batch.generated_at), about
    scoring_since = batch.launched_at if batch.first_generated_at is None else batch.first_generated_at
    # A sample that arrived in an earlier pass, which a guard had repeated, was scored before this one began to wait.
    scored_at = max(scoring_since, clock.arrived_at)
    read = sum(len(s.teacher_prompt_ids) + len(s.response_ids) for s in step.samples)
    yield "score", (scoring_since, scored_at), {SAMPLES: len(step.samples), INPUT: read}
    if (trained := clock.extent(StepStage.TRAIN)) is not None:
        yield "train", trained, {VERSION: step.index, TOKENS: sum(s.tokens for s in step.samples if not s.masked)}
    if (synced := clock.extent(StepStage.WEIGHT_SYNC)) is not None:
        yield "sync", synced, {VERSION: step.index + 1}
