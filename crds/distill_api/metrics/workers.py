"""The metrics of trainers, engines and teachers."""

from distill_api.metrics.metric import REQUEST_BUCKETS, STEP_BUCKETS, Kind, Metric

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
    Metric("distill_objective_phase_number", Kind.GAUGE, "Number of the last step's phase in spec.phases, from 1."),
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
        "Share of tokens that are a span by themselves, of those that a teacher with a tokenizer of its own scored.",
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
    Metric(
        "distill_teacher_lag_steps",
        Kind.GAUGE,
        "Mean steps by which the weights that scored the last samples lagged behind the trainer; teacher.student.",
    ),
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
        "Reverse KL of single tokens of the last step (k1, by the engines' own log-probs), in a span its mean at each: "
        "mean, p50, p95 and max.",
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
