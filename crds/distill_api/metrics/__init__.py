"""The registry of every metric: code, dashboards, alerts and documentation use these names alone.

The identity of a series (namespace, job, role, pod) comes from the scrape target's labels, never from the code.
"""

from distill_api.metrics.metric import Kind, Metric, StepStage, scraped_name
from distill_api.metrics.operator import OPERATOR_METRICS
from distill_api.metrics.workers import WORKER_METRICS

__all__ = ["OPERATOR_METRICS", "WORKER_METRICS", "Kind", "Metric", "StepStage", "scraped_name"]
