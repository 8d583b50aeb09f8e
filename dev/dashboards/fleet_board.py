"""All jobs side by side: which learn, which wait, which fail, and what they hold."""

from parts import Board, Panel, Row

JOBS = 'namespace=~"$namespace", distillation_job=~"$job"'
NAMED = 'namespace=~"$namespace", name=~"$job"'
BY = "by (namespace, distillation_job)"
LEGEND = "{{namespace}}/{{distillation_job}}"


def of(metric: str, how: str = "max") -> str:
    return f"{how} {BY} ({metric}{{{JOBS}}})"


def named(metric: str) -> str:
    """Of the operator, whose label for the job is `name`."""
    return f'max {BY} (label_replace({metric}{{{NAMED}}}, "distillation_job", "$1", "name", "(.*)"))'


WAITS = "rollout|environment|teacher_score"
WAITING = (
    f'sum {BY} (rate(distill_step_duration_seconds_sum{{{JOBS}, stage=~"{WAITS}"}}[15m])) / '
    f'sum {BY} (rate(distill_step_duration_seconds_sum{{{JOBS}, stage=~"{WAITS}|train|weight_sync"}}[15m]))'
)
BOARD = Board(
    uid="distillation-fleet",
    title="Distillation fleet",
    description="All DistillationJobs: which learn, which wait, which fail, and what they hold.",
    head=[
        Panel(
            "Jobs that run",
            "Of those chosen above.",
            {"": f'sum(distill_job_phase{{{NAMED}, phase="Running"}}) or vector(0)'},
            width=6,
            kind="stat",
        ),
        Panel(
            "Jobs that wait to run",
            "For a queue, for pods, for models to load.",
            {"": f'sum(distill_job_phase{{{NAMED}, phase=~"Pending|Starting|Restarting"}}) or vector(0)'},
            width=6,
            kind="stat",
        ),
        Panel(
            "Accelerators held",
            "By the jobs that run; without accelerators, processes.",
            {"": f"sum(rate(distill_accelerator_seconds_total{{{JOBS}}}[5m]))"},
            width=6,
            kind="stat",
        ),
        Panel(
            "Tokens per second",
            "Trained on.",
            {"": f'sum(rate(distill_tokens_total{{{JOBS}, kind="train"}}[5m]))'},
            width=6,
            kind="stat",
        ),
    ],
    rows=[
        Row(
            "Jobs",
            [
                Panel(
                    "Jobs",
                    "The newest numbers of each.",
                    {
                        "progress": f"{of('distill_train_step')} / {of('distill_train_max_steps')}",
                        "reverse KL": of("distill_reverse_kl_nats"),
                        "evaluation": of("distill_evaluation_score"),
                        "seconds since the last step": f"time() - {of('distill_last_step_timestamp_seconds')}",
                        "failed attempts": named("distill_job_restarts"),
                        "stalled": f'max {BY} (label_replace(distill_job_condition{{{NAMED}, type="Stalled"}}, '
                        f'"distillation_job", "$1", "name", "(.*)"))',
                    },
                    width=24,
                    kind="table",
                ),
            ],
        ),
        Row(
            "Learning",
            [
                Panel("Reverse KL", "Of the rollouts, nats per token.", {LEGEND: of("distill_reverse_kl_nats")}),
                Panel(
                    "Evaluation",
                    "Mean reward on held-out prompts, the highest of a job's evaluations.",
                    {LEGEND: of("distill_evaluation_score")},
                    "percentunit",
                ),
                Panel(
                    "Reward",
                    "Task reward of the rollouts.",
                    {LEGEND: of("distill_reward_mean")},
                    needs="a task reward",
                ),
                Panel(
                    "Progress",
                    "Steps done, of all.",
                    {LEGEND: f"{of('distill_train_step')} / {of('distill_train_max_steps')}"},
                    "percentunit",
                ),
                Panel("Length of responses", "Mean tokens.", {LEGEND: of("distill_response_tokens_mean")}),
                Panel("Entropy", "Nats per token.", {LEGEND: of("distill_entropy_nats")}),
            ],
        ),
        Row(
            "Speed and cost",
            [
                Panel(
                    "Tokens per second",
                    "Trained on.",
                    {LEGEND: f'sum {BY} (rate(distill_tokens_total{{{JOBS}, kind="train"}}[5m]))'},
                ),
                Panel(
                    "Waiting",
                    "Share of the step in which the trainer waits for engines or teacher.",
                    {LEGEND: WAITING},
                    "percentunit",
                ),
                Panel(
                    "Accelerators held",
                    "Stacked; without accelerators, processes.",
                    {LEGEND: f"sum {BY} (rate(distill_accelerator_seconds_total{{{JOBS}}}[5m]))"},
                    kind="stacked",
                ),
                Panel(
                    "Failed requests to teachers",
                    "Share of the scoring requests.",
                    {
                        LEGEND: f'1 - sum {BY} (rate(distill_teacher_requests_total{{{JOBS}, code="200"}}[5m])) / '
                        f"sum {BY} (rate(distill_teacher_requests_total{{{JOBS}}}[5m]))"
                    },
                    "percentunit",
                ),
                Panel(
                    "Use of the GPUs",
                    "Mean by namespace, by DCGM's exporter.",
                    {
                        "{{namespace}}": 'avg by (namespace) (DCGM_FI_DEV_GPU_UTIL{namespace=~"$namespace", '
                        'pod=~"($job)-(teacher|rollout|trainer)-.*"})'
                    },
                    "percent",
                    needs="a GPU, and DCGM's exporter",
                ),
                Panel(
                    "Time since the last checkpoint",
                    "What a failure now would cost.",
                    {LEGEND: f"time() - {of('distill_checkpoint_last_success_timestamp_seconds')}"},
                    "s",
                ),
            ],
        ),
        Row(
            "Failures",
            [
                Panel(
                    "Jobs by phase",
                    "Of those chosen above.",
                    {"{{phase}}": f"sum by (phase) (distill_job_phase{{{NAMED}}})"},
                    kind="stacked",
                ),
                Panel("Failed attempts", "By job.", {LEGEND: named("distill_job_restarts")}),
                Panel(
                    "Restarted engines",
                    "By job.",
                    {LEGEND: f"sum {BY} (distill_engine_restarts_total{{{JOBS}}})"},
                ),
            ],
        ),
    ],
    many=True,
    annotations={"Failed attempts": (f"changes(distill_job_restarts{{{NAMED}}}[1m]) > 0", "red")},
)
