"""What a valid job cannot learn or measure as written: found before it costs anything.

No rules of the API server: a job may be such on purpose, to measure something, and one that exists must stay mutable.
"""

from collections.abc import Iterator

from distill_api.spec.job_spec import Advantage, Decay, RewardSource, Spec
from distill_api.spec.objective import Baseline
from distill_api.teacher.control import Control
from distill_api.training_phases import objectives


def obstacles(spec: Spec) -> list[str]:
    """Return a sentence for each part of a job that can have no effect, with what to change."""
    return [
        *_phases_that_teach_nothing(spec),
        *_rewards_without_a_group(spec),
        *_baseline_without_a_group(spec),
        *_reference_that_is_the_teacher(spec),
        *_control_of_nothing(spec),
        *_repeated_greedy_responses(spec),
        *mixed_templates(spec),
    ]


def _phases_that_teach_nothing(spec: Spec) -> Iterator[str]:
    for phase, o in zip(spec.phases, objectives(spec), strict=False):  # without phases there is one objective more
        divergence = o.coefficient > 0 or o.coefficient_schedule.decay is not Decay.CONSTANT
        reward = o.reward_coefficient > 0 or o.reward_coefficient_schedule.decay is not Decay.CONSTANT
        if not (divergence or o.reference_coefficient > 0 or (reward and _has_reward(spec))):
            yield (
                f"spec.phases[{phase.name}].objective: coefficient is 0 and there is no reward, or "
                "rewardCoefficient is 0, so that its steps teach nothing; raise one of the two"
            )


def _has_reward(spec: Spec) -> bool:
    sources = [(s.reward or spec.objective.reward).source for s in spec.data.all_sources]
    return any(source is not RewardSource.NONE for source in sources)


def _rewards_without_a_group(spec: Spec) -> Iterator[str]:
    objective = spec.objective
    coefficient = any(
        o.reward_coefficient > 0 or o.reward_coefficient_schedule.decay is not Decay.CONSTANT for o in objectives(spec)
    )
    compares = objective.advantage is not Advantage.NONE
    alone = spec.rollout.samples_per_prompt == 1
    if alone and compares and coefficient and _has_reward(spec):
        yield (
            f"spec.rollout.samplesPerPrompt: is 1, and objective.advantage {objective.advantage.value} compares a "
            "response with the others to its prompt, so that the reward of each is worth 0 and teaches nothing; sample "
            "at least 2, or set objective.advantage: none"
        )


def _baseline_without_a_group(spec: Spec) -> Iterator[str]:
    samples = spec.rollout.samples_per_prompt
    baselines = {objective.baseline for objective in objectives(spec)}
    if Baseline.LEAVE_ONE_OUT in baselines and samples == 1:
        yield (
            "spec.rollout.samplesPerPrompt: is 1, and objective.baseline leave-one-out is the mean over the other "
            "responses to a prompt, so that it is 0 for each; sample at least 2, or set objective.baseline: top-k or "
            "batch-mean"
        )
    if Baseline.BATCH_MEAN in baselines and spec.rollout.prompts_per_step * samples == 1:
        yield (
            "spec.rollout.promptsPerStep: is 1, as samplesPerPrompt is, and objective.baseline batch-mean is the mean "
            "over the other responses of a step, so that it is 0 for each; sample more, or set objective.baseline: "
            "top-k"
        )


def _reference_that_is_the_teacher(spec: Spec) -> Iterator[str]:
    objective = spec.objective
    models = {t.name: t.title for t in spec.all_teachers}
    privileged = any(s.prompts.teacher_prompt or s.prompts.teacher_system_prompt for s in spec.data.all_sources)
    for teacher in spec.routed_teachers:
        same = objective.reference is not None and models[teacher.name] == models[objective.reference]
        if same and objective.extrapolation != 1 and not privileged:
            yield (
                f"spec.objective.reference: {objective.reference} is the model of teacher {teacher.name}, "
                f"{teacher.title}, so that there is no difference for objective.extrapolation to scale; name what the "
                "teacher was trained from"
            )


def _control_of_nothing(spec: Spec) -> Iterator[str]:
    taught = any(
        o.control is not Control.NONE and (o.coefficient > 0 or o.coefficient_schedule.decay is not Decay.CONSTANT)
        for o in objectives(spec)
    )
    if spec.objective.control is not Control.NONE and not taught:
        in_phases = " in each of spec.phases that a teacher is in" if spec.phases else ""
        yield (
            f"spec.objective.coefficient: is 0{in_phases}, so that the teacher teaches nothing in the job as it is, "
            "and objective.control changes nothing; set a coefficient above 0, or leave control out"
        )


def _repeated_greedy_responses(spec: Spec) -> Iterator[str]:
    for evaluation in spec.evaluation:
        greedy = evaluation.sampling.temperature == 0
        if greedy and evaluation.samples_per_prompt > 1 and evaluation.reward.source is not RewardSource.NONE:
            yield (
                f"spec.evaluation[{evaluation.name}].samplesPerPrompt: is {evaluation.samples_per_prompt}, and with "
                "sampling.temperature 0 all of them are one response, so that pass@k is the score; set a temperature "
                "above 0, or samplesPerPrompt: 1"
            )


def mixed_templates(spec: Spec) -> Iterator[str]:
    """Yield a sentence where a teacher with a tokenizer of its own is asked about conversations and about plain texts:
    how a response begins and ends in its tokens is one thing for the whole job."""
    parts = [(f"data source {source.name}", source.prompts) for source in spec.data.all_sources]
    parts += [(f"evaluation {e.name}", e.prompts) for e in spec.evaluation if e.measure_reverse_kl]
    chats, plain = ([name for name, p in parts if p.apply_chat_template is chat] for chat in (True, False))
    if chats and plain and any(teacher.tokenizer is not None for teacher in spec.all_teachers):
        yield (
            f"prompts.applyChatTemplate: is true for {', '.join(chats)} and false for {', '.join(plain)}, and beside a "
            "teacher's tokenizer one way must do for all, since a turn and a text do not begin and end alike in its "
            "tokens; make two jobs, or set measureReverseKL: false for an evaluation"
        )
