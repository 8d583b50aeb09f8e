"""The operator: is it up, does it keep up, and what does it ask of the API server."""

from parts import Board, Panel, Row

NAMED = 'namespace=~"$namespace", name=~"$job"'
SHARED = 'namespace=~"$namespace"'
RECONCILE = "distill_operator_reconcile"


def quantile(of_all: float, metric: str, by: str = "le") -> str:
    return f"histogram_quantile({of_all}, sum by ({by}) (rate({metric}_bucket[5m])))"


BOARD = Board(
    uid="distillation-operator",
    title="Distillation operator",
    description="The operator: is it up, does it keep up, and what does it ask of the API server.",
    head=[
        Panel(
            "Operators",
            "That answer, by version.",
            {"{{version}}": "sum by (version) (distill_operator_build_info)"},
            width=6,
            kind="stat",
        ),
        Panel("Jobs", "That it knows.", {"": "sum(distill_jobs)"}, width=6, kind="stat"),
        Panel(
            "Jobs waiting to be reconciled",
            "A few are normal.",
            {"": "sum(distill_operator_queue_depth)"},
            width=6,
            kind="stat",
        ),
        Panel(
            "Reconciles that fail",
            "Share in five minutes.",
            {"": f'sum(rate({RECONCILE}_total{{result="error"}}[5m])) / sum(rate({RECONCILE}_total[5m]))'},
            "percentunit",
            6,
            "stat",
        ),
    ],
    rows=[
        Row(
            "Reconciles",
            [
                Panel(
                    "Reconciles", "By result.", {"{{result}}": f"sum by (result) (rate({RECONCILE}_total[5m]))"}, "ops"
                ),
                Panel(
                    "Seconds of a reconcile",
                    "A slow API server is the usual cause.",
                    {
                        "median": quantile(0.5, f"{RECONCILE}_duration_seconds"),
                        "95 %": quantile(0.95, f"{RECONCILE}_duration_seconds"),
                        "99 %": quantile(0.99, f"{RECONCILE}_duration_seconds"),
                    },
                    "s",
                ),
                Panel(
                    "Queue",
                    "Jobs that wait; and those that are put back after an error or a conflict, a second.",
                    {
                        "waiting": "sum(distill_operator_queue_depth)",
                        "put back": "sum(rate(distill_operator_queue_retries_total[5m]))",
                        "conflicts": "sum(rate(distill_operator_queue_conflicts_total[5m]))",
                    },
                ),
                Panel(
                    "Watches and lists that failed",
                    "Times that all watches began anew; and watched namespaces that cannot be listed now.",
                    {
                        "watches begun anew": "sum(increase(distill_operator_watch_restarts_total[5m]))",
                        "namespaces failing": "sum(distill_operator_namespaces_failing)",
                    },
                ),
                Panel(
                    "Requests to the API server",
                    "By verb.",
                    {"{{verb}}": "sum by (verb) (rate(distill_operator_api_requests_total[5m]))"},
                    "reqps",
                ),
                Panel(
                    "Requests that the API server refuses",
                    "By verb and code. 409 is a conflict, and normal; 403 is a missing right.",
                    {
                        "{{verb}} {{code}}": "sum by (verb, code) "
                        '(rate(distill_operator_api_requests_total{code!~"2.."}[5m]))'
                    },
                    "reqps",
                    needs="a fault: a request that is refused",
                ),
            ],
        ),
        Row(
            "Jobs",
            [
                Panel(
                    "Jobs by state",
                    "Reason of their condition Succeeded.",
                    {"{{state}}": "sum by (state) (distill_jobs)"},
                    kind="stacked",
                ),
                Panel(
                    "Time in a phase, median",
                    "Of those that have left it in the range shown.",
                    {
                        "{{phase}}": "histogram_quantile(0.5, sum by (le, phase) "
                        "(increase(distill_job_phase_duration_seconds_bucket[$__range])))"
                    },
                    "s",
                ),
                Panel(
                    "Time in a phase, 95 %",
                    "Of those that have left it in the range shown.",
                    {
                        "{{phase}}": "histogram_quantile(0.95, sum by (le, phase) "
                        "(increase(distill_job_phase_duration_seconds_bucket[$__range])))"
                    },
                    "s",
                ),
                Panel(
                    "Phases",
                    "Of the jobs chosen above.",
                    {"{{namespace}}/{{name}} {{phase}}": f"distill_job_phase{{{NAMED}}}"},
                ),
                Panel(
                    "Conditions",
                    "1 is True.",
                    {"{{namespace}}/{{name}} {{type}}": f"distill_job_condition{{{NAMED}}}"},
                ),
                Panel(
                    "Failed attempts",
                    "Of the jobs chosen above.",
                    {"{{namespace}}/{{name}}": f"distill_job_restarts{{{NAMED}}}"},
                ),
            ],
        ),
        Row(
            "Teachers that are shared",
            [
                Panel(
                    "Servers",
                    "Wanted, and ready: those that answer.",
                    {"{{namespace}}/{{name}} {{state}}": f"distill_shared_teacher_servers{{{SHARED}}}"},
                ),
                Panel(
                    "Requests",
                    "Waiting and under way at all trainers: by them a Teacher is scaled.",
                    {"{{namespace}}/{{name}}": f"distill_shared_teacher_requests{{{SHARED}}}"},
                ),
                Panel(
                    "Jobs that learn",
                    "From each Teacher.",
                    {"{{namespace}}/{{name}}": f"distill_shared_teacher_jobs{{{SHARED}}}"},
                ),
                Panel(
                    "Decisions to scale",
                    "Of the last hour: up, more servers; down, fewer.",
                    {
                        "{{namespace}}/{{name}} {{direction}}": f"sum by (namespace, name, direction) "
                        f"(increase(distill_shared_teacher_scalings_total{{{SHARED}}}[1h]))"
                    },
                ),
                Panel(
                    "Conditions of Teachers",
                    "1 is True.",
                    {"{{namespace}}/{{name}} {{type}}": f"distill_shared_teacher_condition{{{SHARED}}}"},
                ),
            ],
        ),
    ],
    many=True,
)
