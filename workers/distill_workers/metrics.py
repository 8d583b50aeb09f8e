"""The Prometheus metrics of trainer rank 0, set by name and scraped at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from distill_api.metrics import WORKER_METRICS, Kind


class Metrics:
    """A registry with every worker metric of distill_api.metrics; any other name is a KeyError.

    A gauge is exported from its first value on: a reverse KL of 0 before the first step would be the best of all.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._exported: set[str] = set()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in WORKER_METRICS:
            if metric.kind is Kind.GAUGE:
                self._gauges[metric.name] = Gauge(metric.name, metric.help, metric.labels, registry=None)
            elif metric.kind is Kind.COUNTER:
                self._counters[metric.name] = Counter(metric.name, metric.help, metric.labels, registry=self.registry)
            else:
                self._histograms[metric.name] = Histogram(
                    metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry
                )

    def set(self, name: str, value: float, **labels: str) -> None:
        gauge = self._gauge(name)
        (gauge.labels(**labels) if labels else gauge).set(value)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def change(self, name: str, amount: float) -> None:
        """Add to a gauge without labels."""
        self._gauge(name).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        histogram = self._histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._exported:
            self._exported.add(name)
            self.registry.register(self._gauges[name])
        return self._gauges[name]

    def text(self) -> bytes:
        return generate_latest(self.registry)
