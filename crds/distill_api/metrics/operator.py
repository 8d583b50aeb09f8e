"""The metrics of the operator."""

from distill_api.metrics.metric import PHASE_BUCKETS, REQUEST_BUCKETS, Kind, Metric

OPERATOR_METRICS = (
    Metric("distill_operator_build_info", Kind.GAUGE, "1, with the version of the operator.", ("version",)),
    Metric("distill_operator_reconcile", Kind.COUNTER, "Reconciles by result: ok or error.", ("result",)),
    Metric(
        "distill_operator_reconcile_duration_seconds", Kind.HISTOGRAM, "Seconds of a reconcile.", (), REQUEST_BUCKETS
    ),
    Metric("distill_operator_queue_depth", Kind.GAUGE, "Jobs waiting to be reconciled."),
    Metric("distill_operator_queue_retries", Kind.COUNTER, "Reconciles that were put back after an error."),
    Metric(
        "distill_operator_queue_conflicts",
        Kind.COUNTER,
        "Reconciles that were put back since the object had changed meanwhile.",
    ),
    Metric(
        "distill_operator_watch_restarts",
        Kind.COUNTER,
        "Times that all watches began anew, since one had ended by an error or was missing.",
    ),
    Metric(
        "distill_operator_namespaces_failing",
        Kind.GAUGE,
        "Watched namespaces whose last list failed; where all are watched they count as one, and so does the list of "
        "the namespaces that have the label of watchNamespaceSelector.",
    ),
    Metric("distill_operator_api_requests", Kind.COUNTER, "Requests to the API server.", ("verb", "code")),
    Metric("distill_job_info", Kind.GAUGE, "1 for each job.", ("namespace", "name", "student", "teacher")),
    Metric("distill_job_condition", Kind.GAUGE, "1 where the condition is True.", ("namespace", "name", "type")),
    Metric(
        "distill_job_phase", Kind.GAUGE, "1 for the reason of the Succeeded condition.", ("namespace", "name", "phase")
    ),
    Metric(
        "distill_job_phase_duration_seconds",
        Kind.HISTOGRAM,
        "Seconds that jobs were Pending, Starting, Running, Restarting, Suspended or WaitingForQuota, once they have "
        "left the phase.",
        ("phase",),
        PHASE_BUCKETS,
    ),
    Metric("distill_job_restarts", Kind.GAUGE, "Failed attempts of a job.", ("namespace", "name")),
    Metric("distill_jobs", Kind.GAUGE, "Jobs by reason of their Succeeded condition.", ("state",)),
    Metric(
        "distill_shared_teacher_condition",
        Kind.GAUGE,
        "1 where the condition of a Teacher is True: Ready, SpecValid.",
        ("namespace", "name", "type"),
    ),
    Metric(
        "distill_shared_teacher_servers",
        Kind.GAUGE,
        "Servers of a Teacher: wanted, and ready, which answer.",
        ("namespace", "name", "state"),
    ),
    Metric("distill_shared_teacher_jobs", Kind.GAUGE, "Running jobs that learn from a Teacher.", ("namespace", "name")),
    Metric(
        "distill_shared_teacher_requests",
        Kind.GAUGE,
        "Scoring requests, waiting and under way, of the running jobs of a Teacher: by them it is scaled.",
        ("namespace", "name"),
    ),
    Metric(
        "distill_shared_teacher_scalings",
        Kind.COUNTER,
        "Decisions of a Teacher's autoscaling to have more servers (up), or fewer (down).",
        ("namespace", "name", "direction"),
    ),
)
