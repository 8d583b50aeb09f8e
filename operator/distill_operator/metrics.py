"""The operator's own metrics: names and help come from distill_api.metrics, values are read at the scrape.

Series of jobs are made anew from the current jobs each time, so a job that is gone leaves none behind.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from distill_api.metrics import OPERATOR_METRICS, Kind, Metric
from distill_api.metrics.metric import REQUEST_BUCKETS
from distill_api.status import ConditionStatus
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.runtime.histogram import Histogram
from distill_operator.teacher.teacher_registry import TeacherRegistry

Samples = list[tuple[tuple[str, ...], float]]
"""Label values and value of each series."""


class OperatorMetrics(Collector):
    """Collects one family for each metric of the registry."""

    def __init__(
        self,
        jobs: JobRegistry,
        teachers: TeacherRegistry,
        *,
        queue_depth: Callable[[], int],
        queue_retries: Callable[[], int],
        queue_conflicts: Callable[[], int] = lambda: 0,
        watch_restarts: Callable[[], int] = lambda: 0,
        namespaces_failing: Callable[[], int] = lambda: 0,
        api_requests: Mapping[tuple[str, str], int],
    ) -> None:
        self._jobs = jobs
        self._teachers = teachers
        self._api_requests = api_requests
        self.reconciles: Counter[str] = Counter(ok=0, error=0)
        self.durations = Histogram(REQUEST_BUCKETS)
        self._samples: dict[str, Callable[[], Samples]] = {
            "distill_operator_build_info": lambda: [((build_version(),), 1.0)],
            "distill_operator_reconcile": lambda: [((result,), float(n)) for result, n in self.reconciles.items()],
            "distill_operator_queue_depth": lambda: [((), float(queue_depth()))],
            "distill_operator_queue_retries": lambda: [((), float(queue_retries()))],
            "distill_operator_queue_conflicts": lambda: [((), float(queue_conflicts()))],
            "distill_operator_watch_restarts": lambda: [((), float(watch_restarts()))],
            "distill_operator_namespaces_failing": lambda: [((), float(namespaces_failing()))],
            "distill_operator_api_requests": lambda: [(key, float(n)) for key, n in dict(self._api_requests).items()],
            "distill_job_info": self._info,
            "distill_job_condition": self._conditions,
            "distill_job_phase": self._phases,
            "distill_job_restarts": self._restarts,
            "distill_jobs": self._states,
            "distill_shared_teacher_condition": self._teacher_conditions,
            "distill_shared_teacher_servers": self._teacher_servers,
            "distill_shared_teacher_jobs": lambda: self._teacher_numbers("jobs"),
            "distill_shared_teacher_requests": lambda: self._teacher_numbers("requests"),
            "distill_shared_teacher_scalings": self._teacher_scalings,
        }
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {
            "distill_operator_reconcile_duration_seconds": {(): self.durations},
            "distill_job_phase_duration_seconds": {(phase,): h for phase, h in jobs.phase_seconds.items()},
        }

    def collect(self) -> Iterator[Family]:
        for metric in OPERATOR_METRICS:
            yield self._family(metric)

    def registry(self) -> CollectorRegistry:
        found = CollectorRegistry()
        found.register(self)
        return found

    def _family(self, metric: Metric) -> Family:
        if metric.kind is Kind.HISTOGRAM:
            found = HistogramMetricFamily(metric.name, metric.help, labels=list(metric.labels))
            for labels, histogram in self._histograms[metric.name].items():
                found.add_metric(list(labels), histogram.cumulative(), histogram.total)
            return found
        kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
        family: CounterMetricFamily | GaugeMetricFamily = kind(metric.name, metric.help, labels=list(metric.labels))
        for labels, value in self._samples[metric.name]():
            family.add_metric(list(labels), value)
        return family

    def _info(self) -> Samples:
        return [
            ((key.namespace, key.name, job.student, job.teacher), 1.0) for key, job in self._jobs.snapshots().items()
        ]

    def _conditions(self) -> Samples:
        return [
            ((key.namespace, key.name, condition.type), float(condition.status is ConditionStatus.TRUE))
            for key, job in self._jobs.snapshots().items()
            for condition in job.status.conditions
        ]

    def _phases(self) -> Samples:
        return [((key.namespace, key.name, job.phase), 1.0) for key, job in self._jobs.snapshots().items()]

    def _restarts(self) -> Samples:
        return [((key.namespace, key.name), float(job.status.restarts)) for key, job in self._jobs.snapshots().items()]

    def _states(self) -> Samples:
        found = Counter(job.phase for job in self._jobs.snapshots().values())
        return [((state,), float(n)) for state, n in found.items()]

    def _teacher_conditions(self) -> Samples:
        return [
            ((key.namespace, key.name, condition.type), float(condition.status is ConditionStatus.TRUE))
            for key, teacher in self._teachers.snapshots().items()
            for condition in teacher.status.conditions
        ]

    def _teacher_servers(self) -> Samples:
        return [
            ((key.namespace, key.name, state), float(number))
            for key, teacher in self._teachers.snapshots().items()
            for state, number in (
                ("wanted", teacher.status.desired_replicas),
                ("ready", teacher.status.ready_replicas),
            )
        ]

    def _teacher_numbers(self, field: Literal["jobs", "requests"]) -> Samples:
        return [
            ((key.namespace, key.name), float(getattr(teacher.status, field)))
            for key, teacher in self._teachers.snapshots().items()
        ]

    def _teacher_scalings(self) -> Samples:
        return [
            ((key.namespace, key.name, direction), float(number))
            for key in self._teachers.snapshots()
            for direction, number in self._teachers.scalings(key).items()
        ]


def build_version() -> str:
    try:
        return version("distillation-operator")
    except PackageNotFoundError:
        return "unknown"
