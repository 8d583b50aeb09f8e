"""One DistillationJob: does it learn, what does it wait for, and what went wrong."""

from parts import Board, Panel, Row

JOB = 'namespace="$namespace", distillation_job="$job"'
"""Of what the job's pods export."""
NAMED = 'namespace="$namespace", name="$job"'
"""Of what the operator exports about it."""
PODS = 'namespace="$namespace", pod=~"$job-(teacher|rollout|trainer)-.*"'
"""Of what other exporters say about its pods."""


def of(metric: str) -> str:
    return f"{metric}{{{JOB}}}"


def rate(metric: str, window: str = "1m", more: str = "") -> str:
    return f"rate({metric}{{{JOB}{more}}}[{window}])"


def quantile(of_all: float, metric: str) -> str:
    return f"histogram_quantile({of_all}, sum by (le) ({rate(metric + '_bucket', '5m')}))"


def sglang(metric: str, more: str = "") -> str:
    """Its colon is an underscore for a Prometheus before 3."""
    return f'{{__name__=~"sglang[:_]{metric}", {JOB}{more}}}'


TRAIN, TEACHER = ', stage="train"', ', role="teacher"'
STEP = "distill_step_duration_seconds"
STEPS = f"scalar({rate(STEP + '_count', '5m', TRAIN)})"

HEAD = [
    Panel(
        "Progress",
        "Optimiser steps done, of all.",
        {"": f"max({of('distill_train_step')} / {of('distill_train_max_steps')})"},
        "percentunit",
        4,
        "stat",
    ),
    Panel(
        "Reverse KL",
        "Nats per token on the last step's samples (k1).",
        {"": f"max({of('distill_reverse_kl_nats')})"},
        "short",
        4,
        "stat",
    ),
    Panel(
        "Reward",
        "Mean task reward of the last step's samples.",
        {"": f"max({of('distill_reward_mean')})"},
        "short",
        4,
        "stat",
        needs="a task reward",
    ),
    Panel(
        "Time since the last step",
        "Stalled is raised after the job's stallTimeoutSeconds.",
        {"": f"time() - max({of('distill_last_step_timestamp_seconds')})"},
        "s",
        4,
        "stat",
    ),
    Panel(
        "Time since the last checkpoint",
        "What a failure now would cost.",
        {"": f"time() - max({of('distill_checkpoint_last_success_timestamp_seconds')})"},
        "s",
        4,
        "stat",
    ),
    Panel(
        "Failed attempts", "Against backoffLimit.", {"": f"max(distill_job_restarts{{{NAMED}}})"}, "short", 4, "stat"
    ),
]
LEARNING = [
    Panel(
        "Reverse KL",
        "Student to teacher, nats per token. Should fall; a mean of few tokens can be negative.",
        {
            "rollouts": of("distill_reverse_kl_nats"),
            "{{evaluation}}": of("distill_evaluation_reverse_kl_nats"),
        },
    ),
    Panel(
        "Reverse KL by teacher",
        "Of the rollouts, over the tokens that each teacher scored.",
        {"{{teacher}}": of("distill_teacher_reverse_kl_nats")},
    ),
    Panel(
        "Reverse KL by source",
        "Of the rollouts, by the data source of their prompts.",
        {"{{source}}": of("distill_source_reverse_kl_nats")},
        needs="data.sources",
    ),
    Panel(
        "Evaluation",
        "Mean reward on held-out prompts.",
        {
            "{{evaluation}}": of("distill_evaluation_score"),
            "{{evaluation}}, pass@{{k}}": of("distill_evaluation_pass_ratio"),
        },
        "percentunit",
    ),
    Panel(
        "Reward",
        "Task reward of the rollouts.",
        {"mean": of("distill_reward_mean"), "standard deviation": of("distill_reward_stddev")},
        needs="a task reward",
    ),
    Panel(
        "Reward by source",
        "Mean task reward of the rollouts, by the data source of their prompts.",
        {"{{source}}": of("distill_source_reward_mean")},
        needs="data.sources and a task reward",
    ),
    Panel(
        "Loss and gradient",
        "The norm is that before clipping.",
        {"loss": of("distill_loss"), "norm of the gradient": of("distill_grad_norm")},
    ),
    Panel("Learning rate", "Of the last step.", {"learning rate": of("distill_learning_rate")}, "sci"),
    Panel("Entropy", "Nats per token. A fall to nothing is a collapse.", {"entropy": of("distill_entropy_nats")}),
    Panel(
        "Trainer against engine",
        "The gap should stay near zero, the weight near one.",
        {
            "|log p trainer - log p engine|": of("distill_policy_rollout_kl_nats"),
            "mean importance weight": of("distill_importance_weight_mean"),
            "capped importance weights": of("distill_importance_capped_ratio"),
        },
    ),
    Panel(
        "Reverse KL of single tokens",
        "Of the last step. Few tokens far from the teacher are normal; a growing share above 1 nat is not.",
        {"{{statistic}}": of("distill_token_kl_nats"), "share above 1 nat": of("distill_token_kl_high_ratio")},
    ),
    Panel(
        "What is minimised",
        "The divergence of the objective, and the other estimators of the reverse KL at the sampled tokens.",
        {
            "divergence": of("distill_divergence_nats"),
            "k2": of("distill_reverse_kl_k2_nats"),
            "k3": of("distill_reverse_kl_k3_nats"),
        },
    ),
    Panel(
        "Teacher's top-k",
        "Where the objective takes it. What lies outside is one bucket: both masses should be near one.",
        {
            "mass of the student": of("distill_student_mass_ratio"),
            "mass of the teacher": of("distill_teacher_mass_ratio"),
            "student's top-k in it": of("distill_overlap_ratio"),
            "forward KL, nats": of("distill_forward_kl_nats"),
        },
    ),
    Panel(
        "Corrections",
        "Shares of tokens. Should be small: what is capped, left out or clipped teaches less.",
        {
            "left out by their importance ratio": of("distill_importance_gated_ratio"),
            "left out with their response": of("distill_sequence_masked_ratio"),
            "ratio clipped": of("distill_ratio_clipped_ratio"),
            "advantage clipped": of("distill_advantage_clipped_ratio"),
        },
    ),
    Panel(
        "Sampled advantage",
        "With support sampled-token. What a baseline is for: its mean square should be lower than without one. "
        "The tokens of a longer span share what the teacher says of it.",
        {
            "mean square, nats²": of("distill_advantage_square_nats2"),
            "baseline, nats": of("distill_baseline_nats"),
            "share of tokens that are a span": of("distill_tokens_aligned_ratio"),
        },
        needs="support sampled-token, and a baseline or a teacher with a tokenizer of its own",
    ),
    Panel(
        "Reference",
        "An extrapolation raises the teacher's lead over it; a coefficient keeps the reverse KL to it small.",
        {
            "reverse KL to it, nats": of("distill_reference_kl_nats"),
            "lead of the teacher, nats": of("distill_implicit_reward_nats"),
        },
        needs="objective.reference",
    ),
    Panel(
        "Weights of tokens",
        "Which tokens the divergence teaches at, and where forward KL is added to it.",
        {
            "mean weight": of("distill_divergence_weight_mean"),
            "share with a weight above 0": of("distill_divergence_selected_ratio"),
            "share with forward KL": of("distill_forward_kl_added_ratio"),
            "entropy of the teacher, nats": of("distill_teacher_entropy_nats"),
        },
        needs="objective.forwardKlAboveEntropy for that share",
    ),
    Panel(
        "Coefficients",
        "By schedule, and lowered by guards.",
        {
            "divergence": of("distill_coefficient"),
            "reward": of("distill_reward_coefficient"),
        },
    ),
    Panel(
        "Phase of the objective",
        "The number of the phase that the last step had, from 1, in the order of spec.phases.",
        {"number": of("distill_objective_phase_number")},
        needs="spec.phases",
    ),
    Panel(
        "Decisions of guards",
        "In five minutes. Each is an event in status.progress.",
        {"{{guard}}: {{action}}": f"sum by (guard, action) (increase({of('distill_guard_decisions_total')}[5m]))"},
        needs="guards",
    ),
]
SAMPLES = [
    Panel("Length of responses", "Mean tokens.", {"tokens": of("distill_response_tokens_mean")}),
    Panel(
        "Truncated responses", "Cut off at maxResponseTokens.", {"share": of("distill_truncated_ratio")}, "percentunit"
    ),
    Panel(
        "Copied from the teacher's prompt",
        "Share of the responses' tokens in runs of four that only the teacher was told: the student cannot know them.",
        {"share": of("distill_privileged_copied_ratio")},
        "percentunit",
        needs="prompts.teacherPrompt",
    ),
    Panel(
        "Policy lag",
        "Steps that the last samples lagged behind the trainer; at most maxPolicyLag.",
        {"steps": of("distill_policy_lag_steps")},
    ),
    Panel(
        "Lag of the teacher",
        "Steps by which the student's weights that scored the last samples lagged behind the trainer.",
        {"steps": of("distill_teacher_lag_steps")},
        needs="teacher.student",
    ),
    Panel(
        "Prompts left out", "Longer than maxPromptTokens, by source.", {"{{source}}": of("distill_prompts_overlong")}
    ),
    Panel(
        "Requests of http rewards",
        "By code.",
        {"{{code}}": f"sum by (code) ({rate('distill_reward_requests_total')})"},
        "reqps",
        needs="reward source http",
    ),
    Panel(
        "Version of the weights",
        "In the engines: the step that they are of.",
        {"version": of("distill_weight_version")},
    ),
]
SPEED = [
    Panel(
        "Seconds of a step, by stage",
        "Stacked: the height is the step. The widest band is the bottleneck, and status.progress.advice says what to "
        "change.",
        {"{{stage}}": f"sum by (stage) ({rate(STEP + '_sum', '5m')}) / {STEPS}"},
        "s",
        12,
        "stacked",
    ),
    Panel(
        "Tokens per second",
        "rollout: generated, teacher: scored, train: trained on.",
        {"{{kind}}": f"sum by (kind) ({rate('distill_tokens_total')})"},
        width=12,
    ),
    Panel(
        "Latency of the teacher",
        "Of a scoring request.",
        {
            "median": quantile(0.5, "distill_teacher_request_duration_seconds"),
            "95 %": quantile(0.95, "distill_teacher_request_duration_seconds"),
            "99 %": quantile(0.99, "distill_teacher_request_duration_seconds"),
        },
        "s",
    ),
    Panel(
        "Requests to the teacher",
        "By HTTP code, or error; and those that are sent again.",
        {
            "{{code}}": f"sum by (code) ({rate('distill_teacher_requests_total')})",
            "sent again": f"sum({rate('distill_teacher_retries_total')})",
        },
        "reqps",
    ),
    Panel(
        "Stored scores",
        "Of the data set's responses: hit: read; miss: scored by the teacher; refused: damaged; unwritten: no room.",
        {"{{result}}": f"sum by (result) ({rate('distill_stored_scores_total')})"},
        needs="objective.teacherLogprobs",
    ),
    Panel(
        "Queue of the teacher",
        "Requests that wait for one of teacher.maxConcurrentRequests in the trainer, and in SGLang.",
        {
            "in the trainer": of("distill_teacher_queue_depth"),
            "in SGLang": f"sum({sglang('num_queue_reqs', TEACHER)})",
        },
    ),
    Panel(
        "Requests in SGLang",
        "A queue at the teacher: more replicas. None anywhere: the trainer is the bottleneck.",
        {
            "{{role}} running": f"sum by (role) ({sglang('num_running_reqs')})",
            "{{role}} queued": f"sum by (role) ({sglang('num_queue_reqs')})",
        },
    ),
    Panel(
        "Tokens per second in SGLang",
        "What the servers themselves say that they generate.",
        {"{{role}}": f"sum by (role) ({sglang('gen_throughput')})"},
    ),
    Panel(
        "Accelerator-hours",
        "Held since the trainer was ready, by teacher, rollout and trainer.",
        {"{{part}}": f"sum by (part) (increase({of('distill_accelerator_seconds_total')}[$__range])) / 3600"},
        "h",
    ),
    Panel(
        "Accelerator-hours of a point of evaluation",
        "Held in the range shown, for each hundredth that the score has risen above its lowest.",
        {
            "{{evaluation}}": f"scalar(sum(increase({of('distill_accelerator_seconds_total')}[$__range]))) / 3600 / "
            f"(100 * (max by (evaluation) (max_over_time({of('distill_evaluation_score')}[$__range])) - "
            f"min by (evaluation) (min_over_time({of('distill_evaluation_score')}[$__range]))))"
        },
        "h",
    ),
]
MACHINES = [
    Panel(
        "Use of the GPUs",
        "By DCGM's exporter.",
        {"{{pod}} GPU {{gpu}}": f"DCGM_FI_DEV_GPU_UTIL{{{PODS}}}"},
        "percent",
        needs="a GPU, and DCGM's exporter",
    ),
    Panel(
        "Memory of the GPUs",
        "By DCGM's exporter.",
        {"{{pod}} GPU {{gpu}}": f"DCGM_FI_DEV_FB_USED{{{PODS}}}"},
        "decmbytes",
        needs="a GPU, and DCGM's exporter",
    ),
    Panel(
        "Memory of Ray's nodes",
        "By Ray's own metrics, of the head and the engines' pods.",
        {"{{pod}}": f"sum by (pod) (ray_node_mem_used{{{JOB}}})"},
        "bytes",
    ),
]
FAILURES = [
    Panel(
        "Samples made again",
        "In five minutes, by reason; beside them, requests of agents that say otherwise what the student said before.",
        {
            "{{reason}}": f"sum by (reason) (increase({of('distill_samples_failed_total')}[5m]))",
            "histories rewritten by agents": f"sum(increase({of('distill_agent_rewritten_histories_total')}[5m]))",
        },
        needs="a fault: a sample that fails",
    ),
    Panel(
        "Restarts",
        "A failed attempt costs what came after the last checkpoint; an engine costs what it was drawing.",
        {
            "attempts of the job": f"distill_job_restarts{{{NAMED}}}",
            "engines": of("distill_engine_restarts_total"),
        },
    ),
    Panel("Conditions", "1 is True.", {"{{type}}": f"distill_job_condition{{{NAMED}}}"}),
    Panel(
        "Restarts of containers",
        "By kube-state-metrics: a container that was killed for memory, for one.",
        {"{{pod}}": f"sum by (pod) (kube_pod_container_status_restarts_total{{{PODS}}})"},
        needs="kube-state-metrics",
    ),
    Panel(
        "Lines that trackers could not write",
        "TensorBoard, Weights & Biases, MLflow. They never end a run.",
        {"{{tracker}}": of("distill_tracker_errors_total")},
    ),
]
BOARD = Board(
    uid="distillation-job",
    title="Distillation job",
    description="One DistillationJob: does it learn, and what does it wait for.",
    head=HEAD,
    rows=[
        Row("Learning", LEARNING),
        Row("Samples", SAMPLES),
        Row("Speed and cost", SPEED),
        Row("Machines", MACHINES),
        Row("Failures", FAILURES),
    ],
    many=False,
    annotations={
        "Failed attempts": (f"changes(distill_job_restarts{{{NAMED}}}[1m]) > 0", "red"),
        "Restarted engines": (f"increase({of('distill_engine_restarts_total')}[1m]) > 0", "orange"),
        "Guards": (f"sum by (guard, action) (increase({of('distill_guard_decisions_total')}[1m])) > 0", "purple"),
    },
)
