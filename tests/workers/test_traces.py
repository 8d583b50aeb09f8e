"""Traces: what a collector gets of each step, and that none is sent where none is named."""

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from run_folders import manifest_of
from test_loop import SMALL, Told, Weights, loop_of, train, virtually

from distill_api.job import DistillationJob, parse_job
from distill_workers.failures import ConfigurationError
from distill_workers.run.callbacks import traces
from distill_workers.run.callbacks.traces import TraceCallback, is_traced, traces_of
from distill_workers.serving.ports import reserve_port

COLLECTOR = "OTEL_EXPORTER_OTLP_ENDPOINT"
EVERY_SECOND = {"steps": 4, "evaluateEverySteps": 2}


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, ReadableSpan]]:
    """The spans of a run of four steps, evaluated every second one, by name; a trace each."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("distill_workers.run.loop.traces_of", lambda job: [TraceCallback(provider)])

    async def work() -> None:
        await train(loop_of(tmp_path, Weights(), Told({}), EVERY_SECOND))

    virtually(work)
    found: dict[int, dict[str, ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        assert span.context is not None
        found.setdefault(span.context.trace_id, {})[span.name] = span
    return sorted(found.values(), key=lambda spans: spans["step"].end_time or 0)


def attribute(spans: list[dict[str, ReadableSpan]], name: str, key: str) -> list[Any]:
    return [dict(one[name].attributes or {})[key] for one in spans if name in one]


def test_each_step_is_a_trace_with_its_stages(traced: list[dict[str, ReadableSpan]]) -> None:
    stages = {"step", "rollout", "score", "train", "sync"}
    evaluated = stages | {"evaluate"}
    assert [set(one) for one in traced] == [evaluated, stages, evaluated, stages, {"step", "evaluate"}]
    assert attribute(traced, "step", "distill.step") == [1, 2, 3, 4, 4]
    for one in traced:
        root = one["step"].context
        assert root is not None and one["step"].parent is None
        assert all(span.parent and span.parent.span_id == root.span_id for n, span in one.items() if n != "step")


def test_spans_have_tokens_and_the_version_of_their_weights(traced: list[dict[str, ReadableSpan]]) -> None:
    count = SMALL["promptsPerStep"] * SMALL["samplesPerPrompt"]
    assert attribute(traced, "rollout", "distill.policy_version") == [0, 1, 2, 3]
    assert attribute(traced, "train", "distill.policy_version") == [0, 1, 2, 3]
    assert attribute(traced, "sync", "distill.policy_version") == [1, 2, 3, 4]
    assert attribute(traced, "evaluate", "distill.policy_version") == [0, 2, 4]
    assert attribute(traced, "evaluate", "distill.evaluations") == [("heldout",)] * 3
    assert attribute(traced, "rollout", "distill.samples") == [count] * 4
    read = attribute(traced, "rollout", "gen_ai.usage.input_tokens")
    written = attribute(traced, "rollout", "gen_ai.usage.output_tokens")
    assert read == [count] * 4 and all(tokens > count for tokens in written)
    for name, key in (("score", "gen_ai.usage.input_tokens"), ("train", "distill.tokens")):
        assert attribute(traced, name, key) == [a + b for a, b in zip(read, written, strict=True)]


def test_spans_are_of_the_time_in_which_they_were(traced: list[dict[str, ReadableSpan]]) -> None:
    now = time.time() * 1e9
    for one in traced:
        for span in one.values():
            assert span.start_time is not None and span.end_time is not None
            assert now - 120e9 < span.start_time <= span.end_time < now + 1e9
        if "sync" in one:
            order = [one[name].end_time for name in ("rollout", "score", "sync", "step")]
            assert order == sorted(order) and one["train"].end_time <= one["sync"].start_time


def job_of(tmp_path: Path) -> DistillationJob:
    return parse_job(manifest_of(tmp_path))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {COLLECTOR: ""},
        {COLLECTOR: "http://collector:4318", "OTEL_SDK_DISABLED": "true"},
        {COLLECTOR: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_there_are_no_traces_unless_a_collector_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    assert traces_of(job_of(tmp_path), environment) == []


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({COLLECTOR: "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT is collector:4318, and must be an address"),
        (
            {COLLECTOR: "http://collector:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is grpc, and traces are sent by http/protobuf only",
        ),
    ],
)
def test_a_collector_that_cannot_be_spoken_to_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        is_traced(environment)
    assert sentence in str(raised.value)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """The address of a server that takes traces, and the paths and bodies of what it took."""
    taken: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    server.shutdown()
    server.server_close()


def test_a_collector_of_the_environment_gets_the_spans_before_the_run_ends(
    collector: tuple[str, list[tuple[str, bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, taken = collector
    monkeypatch.setenv(COLLECTOR, address)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=research")

    async def work() -> None:
        loop = loop_of(tmp_path, Weights(), Told({}), {"steps": 2})
        await train(loop)
        [of_run] = loop.traces
        await of_run.close()

    virtually(work)
    assert {path for path, _ in taken} == {"/v1/traces"}
    found = [part for _, body in taken for part in ExportTraceServiceRequest.FromString(body).resource_spans]
    about = {a.key: a.value.string_value for a in found[0].resource.attributes}
    assert (about["service.name"], about["distill.job"], about["team"]) == ("distill-trainer", "stages", "research")
    spans = [span for part in found for scope in part.scope_spans for span in scope.spans]
    assert [span.name for span in spans].count("step") == 3 and len({span.trace_id for span in spans}) == 3


def test_a_collector_that_is_gone_holds_up_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "CLOSE_SECONDS", 0.5)
    monkeypatch.setenv(COLLECTOR, f"http://127.0.0.1:{reserve_port()}")

    async def work() -> float:
        [of_run] = traces_of(job_of(tmp_path))
        of_run._tracer.start_span("step").end()
        begin = time.monotonic()
        await of_run.close()
        return time.monotonic() - begin

    assert asyncio.run(work()) < 3
