"""The registry of every metric: code, dashboards, alerts and documentation use these names alone.

The identity of a series (namespace, job, role, pod) comes from the scrape target's labels, never from the code.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """A metric; `name` is without the suffix _total that a counter is exposed with."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


STEP_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
PHASE_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400, 604800)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class StepStage(StrEnum):
    """A stage of an optimiser step: the label `stage` of distill_step_duration_seconds."""

    ROLLOUT = "rollout"
    """Waiting for the samples of the step: the generation that did not overlap with training."""
    ENVIRONMENT = "environment"
    """The part of that wait in which rollout.environment answered, or had no process free for a conversation: its share
    of the conversation that took longest."""
    TEACHER_SCORE = "teacher_score"
    """Waiting for scores after the last sample of the step was generated."""
    TRAIN = "train"
    WEIGHT_SYNC = "weight_sync"
    CHECKPOINT = "checkpoint"
    EVALUATE = "evaluate"
    """Waiting for an evaluation after the gradient of the next step was complete."""


WORKER_METRICS = (
    Metric("distill_train_step", Kind.GAUGE, "Optimiser steps done."),
    Metric("distill_train_max_steps", Kind.GAUGE, "Optimiser steps to do."),
    Metric("distill_last_step_timestamp_seconds", Kind.GAUGE, "Unix time at which the last step ended."),
    Metric(
        "distill_reverse_kl_nats",
        Kind.GAUGE,
        "Reverse KL of student to teacher on the last step's samples, mean per token: the k1 estimator, log p_student "
        "- log p_teacher at the sampled token; a mean of few tokens can be negative.",
    ),
    Metric("distill_policy_rollout_kl_nats", Kind.GAUGE, "Mean |log p_trainer - log p_engine| at the sampled tokens."),
    Metric("distill_reward_mean", Kind.GAUGE, "Mean task reward of the last step's samples."),
    Metric("distill_source_reward_mean", Kind.GAUGE, "The same by source of the prompts.", ("source",)),
    Metric("distill_reward_stddev", Kind.GAUGE, "Standard deviation of the task reward of the last step's samples."),
    Metric("distill_entropy_nats", Kind.GAUGE, "Entropy of the student, estimated by -log p at the sampled tokens."),
    Metric("distill_loss", Kind.GAUGE, "Training loss of the last step, mean per response token."),
    Metric("distill_grad_norm", Kind.GAUGE, "Norm of the gradient before clipping."),
    Metric("distill_learning_rate", Kind.GAUGE, "Learning rate of the last step."),
    Metric(
        "distill_reverse_kl_k2_nats",
        Kind.GAUGE,
        "As distill_reverse_kl_nats by the k2 estimator, half the square of k1: never negative, biased.",
    ),
    Metric(
        "distill_reverse_kl_k3_nats",
        Kind.GAUGE,
        "As distill_reverse_kl_nats by the k3 estimator, exp(-k1) - 1 + k1: never negative, unbiased.",
    ),
    Metric(
        "distill_divergence_nats",
        Kind.GAUGE,
        "What the last step minimised, mean per response token: objective.divergence over top-k and tail, or k1.",
    ),
    Metric(
        "distill_forward_kl_nats",
        Kind.GAUGE,
        "Forward KL of teacher to student over the teacher's top-k and the tail, mean per response token, where "
        "the objective takes them.",
    ),
    Metric(
        "distill_teacher_reverse_kl_nats",
        Kind.GAUGE,
        "As distill_token_kl_nats, the mean, over the tokens that each teacher scored.",
        ("teacher",),
    ),
    Metric("distill_student_mass_ratio", Kind.GAUGE, "Mean probability that the student gives to the teacher's top-k."),
    Metric("distill_teacher_mass_ratio", Kind.GAUGE, "Mean probability that the teacher gives to its own top-k."),
    Metric("distill_overlap_ratio", Kind.GAUGE, "Mean share of the student's top-k that is in the teacher's top-k."),
    Metric("distill_coefficient", Kind.GAUGE, "Weight of the divergence in the last step."),
    Metric("distill_reward_coefficient", Kind.GAUGE, "Weight of the task reward in the last step."),
    Metric(
        "distill_importance_weight_mean", Kind.GAUGE, "Mean importance weight of tokens; 0 where they are left out."
    ),
    Metric("distill_importance_capped_ratio", Kind.GAUGE, "Share of tokens whose importance weight was capped."),
    Metric("distill_importance_gated_ratio", Kind.GAUGE, "Share of tokens left out by their own importance ratio."),
    Metric("distill_sequence_masked_ratio", Kind.GAUGE, "Share of tokens left out by the ratios of their response."),
    Metric("distill_ratio_clipped_ratio", Kind.GAUGE, "Share of tokens whose gradient the ratio clip stopped."),
    Metric("distill_advantage_clipped_ratio", Kind.GAUGE, "Share of tokens whose sampled term was bounded."),
    Metric(
        "distill_advantage_square_nats2",
        Kind.GAUGE,
        "Mean square of what the divergence adds to a token's advantage, after the baseline; support sampled-token.",
    ),
    Metric("distill_baseline_nats", Kind.GAUGE, "Mean of objective.baseline over the tokens."),
    Metric(
        "distill_reference_kl_nats",
        Kind.GAUGE,
        "Reverse KL of student to objective.reference on the last step's samples, mean per token (k1).",
    ),
    Metric(
        "distill_implicit_reward_nats",
        Kind.GAUGE,
        "Mean log p_teacher - log p_reference at the sampled tokens: the reward that objective.extrapolation scales.",
    ),
    Metric(
        "distill_tokens_aligned_ratio",
        Kind.GAUGE,
        "Share of tokens that are a span by themselves, where a teacher has a tokenizer of its own.",
    ),
    Metric(
        "distill_divergence_weight_mean",
        Kind.GAUGE,
        "Mean weight of a token's divergence: the teacher's coefficient times objective.weighting.",
    ),
    Metric("distill_divergence_selected_ratio", Kind.GAUGE, "Share of tokens whose divergence has a weight above 0."),
    Metric(
        "distill_privileged_copied_ratio",
        Kind.GAUGE,
        "Share of the responses' tokens in runs of four that prompts.teacherPrompt has and the student's prompt lacks.",
    ),
    Metric(
        "distill_teacher_entropy_nats",
        Kind.GAUGE,
        "Mean entropy of the teacher over its top-k and the tail.",
    ),
    Metric("distill_forward_kl_added_ratio", Kind.GAUGE, "Share of tokens above objective.forwardKlAboveEntropy."),
    Metric("distill_response_tokens_mean", Kind.GAUGE, "Mean length of the last step's responses."),
    Metric(
        "distill_truncated_ratio",
        Kind.GAUGE,
        "Share of responses cut off at maxResponseTokens; 0 where rollout.truncated drops them.",
    ),
    Metric("distill_policy_lag_steps", Kind.GAUGE, "Mean steps that the last samples lagged behind the trainer."),
    Metric("distill_weight_version", Kind.GAUGE, "Version of the weights in the engines."),
    Metric("distill_checkpoint_last_success_timestamp_seconds", Kind.GAUGE, "Unix time of the newest checkpoint."),
    Metric("distill_evaluation_score", Kind.GAUGE, "Mean reward of an evaluation.", ("evaluation",)),
    Metric(
        "distill_evaluation_pass_ratio",
        Kind.GAUGE,
        "Pass@k: share of the prompts that at least one of k responses solves, a reward of 1 or more.",
        ("evaluation", "k"),
    ),
    Metric("distill_evaluation_reverse_kl_nats", Kind.GAUGE, "Reverse KL on held-out prompts.", ("evaluation",)),
    Metric(
        "distill_token_kl_nats",
        Kind.GAUGE,
        "Reverse KL of single tokens of the last step (k1, by the engines' own log-probs): mean, p50, p95 and max.",
        ("statistic",),
    ),
    Metric("distill_token_kl_high_ratio", Kind.GAUGE, "Share of the last step's tokens with a reverse KL above 1 nat."),
    Metric(
        "distill_source_reverse_kl_nats",
        Kind.GAUGE,
        "Reverse KL of the last step's samples by the data source of their prompts (k1, by the engines' log-probs).",
        ("source",),
    ),
    Metric("distill_guard_decisions", Kind.COUNTER, "What guards decided, by guard and action.", ("guard", "action")),
    Metric(
        "distill_prompts_overlong",
        Kind.GAUGE,
        "Prompts left out, longer than maxPromptTokens, by source; of an evaluation: evaluation/NAME.",
        ("source",),
    ),
    Metric("distill_tokens", Kind.COUNTER, "Tokens: rollout generated, teacher scored, train trained on.", ("kind",)),
    Metric(
        "distill_samples_failed",
        Kind.COUNTER,
        "Samples that were dropped, by reason; truncated is that of rollout.truncated.",
        ("reason",),
    ),
    Metric(
        "distill_agent_rewritten_histories",
        Kind.COUNTER,
        "Requests of agents that say otherwise what the student said before: such a conversation begins anew.",
    ),
    Metric("distill_engine_restarts", Kind.COUNTER, "Engine servers that were started again."),
    Metric(
        "distill_step_duration_seconds",
        Kind.HISTOGRAM,
        "Seconds of a step by stage: rollout, environment, teacher_score (these three are waits), train, weight_sync, "
        "checkpoint, evaluate.",
        ("stage",),
        STEP_BUCKETS,
    ),
    Metric(
        "distill_teacher_request_duration_seconds",
        Kind.HISTOGRAM,
        "Seconds of a scoring request, retries not included.",
        (),
        REQUEST_BUCKETS,
    ),
    Metric(
        "distill_teacher_requests",
        Kind.COUNTER,
        "Scoring requests by teacher and HTTP code, or error; disagrees: a replica was refused.",
        ("code", "teacher"),
    ),
    Metric("distill_teacher_retries", Kind.COUNTER, "Scoring requests that failed and were to be sent again."),
    Metric(
        "distill_stored_scores",
        Kind.COUNTER,
        "Look-ups of the data set's responses in the store of scores by result: hit; miss: scored by the teacher. And "
        "refused: damaged entries or segments; unwritten: scores that could not be stored.",
        ("result", "teacher"),
    ),
    Metric("distill_teacher_queue_depth", Kind.GAUGE, "Scoring requests that wait for one of maxConcurrentRequests."),
    Metric(
        "distill_accelerator_seconds",
        Kind.COUNTER,
        "Accelerators of teacher, rollout and trainer times the seconds since the trainer was ready; without "
        "accelerators, processes times seconds.",
        ("part",),
    ),
    Metric("distill_tracker_errors", Kind.COUNTER, "What a tracker of spec.tracking could not write.", ("tracker",)),
    Metric("distill_reward_requests", Kind.COUNTER, "Requests of reward source http by code, or error.", ("code",)),
)

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
        "Seconds that jobs were Pending, Starting, Running, Restarting or Suspended, once they have left the phase.",
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


def scraped_name(metric: Metric) -> str:
    """Return the name of a metric as it is scraped: that of a counter ends in _total."""
    return f"{metric.name}_total" if metric.kind is Kind.COUNTER else metric.name
