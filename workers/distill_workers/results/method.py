"""The objective of a job in sentences, with the papers that it is from."""

from collections.abc import Iterator

from distill_api.spec.job_spec import Advantage, Divergence, ImportanceWeight, Objective, RewardSource, Spec, Support
from distill_api.spec.objective import Baseline
from distill_api.teacher.control import Control
from distill_api.teacher.dataset_scores import DatasetResponses
from distill_api.training_phases import TrainingPhase, objectives
from distill_workers.objective.control import ADVANTAGE, SHARE

PAPERS = {
    "GKD": ("On-Policy Distillation of Language Models", "2306.13649"),
    "MiniLLM": ("MiniLLM", "2306.08543"),
    "PPO": ("Proximal Policy Optimization", "1707.06347"),
    "GRPO": ("DeepSeekMath", "2402.03300"),
    "RLOO": ("Back to Basics", "2402.14740"),
    "IcePop": ("Every Step Evolves", "2510.18855"),
    "vOPD": ("vOPD", "2605.07865"),
    "EOPD": ("EOPD", "2603.07079"),
    "IW-OPD": ("IW-OPD", "2606.22600"),
    "TIP": ("TIP", "2604.14084"),
    "OPSD": ("OPSD", "2601.18734"),
    "G-OPD": ("Learning beyond Teacher", "2602.12125"),
    "StableOPD": ("Demystifying OPD", "2604.08527"),
    "control": ("Does On-Policy Distillation Really Distill?", "2608.31046"),
}
"""Title, or its beginning, and arXiv number."""
DIVERGENCES = {
    Divergence.REVERSE_KL: "reverse KL divergence",
    Divergence.FORWARD_KL: "forward KL divergence",
    Divergence.JSD: "generalised Jensen-Shannon divergence",
}


def method(spec: Spec) -> list[str]:
    """Return sentences in Markdown: the divergence first, then what a job adds to it; of a job with phases, all of a
    phase in one."""
    if spec.phases:
        parts = zip(spec.phases, objectives(spec), strict=True)
        return [f"Phase `{phase.name}`, {_end(phase)}: {' '.join(_method(spec, o))}" for phase, o in parts]
    return _method(spec, spec.objective)


def _end(phase: TrainingPhase) -> str:
    """Return when a phase ends, as a part of a sentence."""
    ends = [] if phase.until_step is None else [f"until step {phase.until_step}"]
    if (flat := phase.until_flat) is not None:
        gain = f" of more than {flat.minimum_gain:g}" if flat.minimum_gain else ""
        ends.append(f"until {flat.patience} evaluations `{flat.evaluation}` in a row without a gain{gain}")
    return ", or ".join(ends) or "to the end"


def _method(spec: Spec, objective: Objective) -> list[str]:
    """Return the sentences of one objective."""
    if objective.control is not Control.NONE:
        return list(_control(objective))
    if objective.support is Support.TARGET:
        whose = _given_by(objective)
        what = f"the cross-entropy of {whose} is the loss; its coefficient is {objective.coefficient:g}."
        return [f"Supervised fine-tuning: {what}"]
    found = [f"On-policy distillation ({paper('GKD')}): the student learns from its own samples."]
    found.append(_divergence(objective))
    found.extend(_other_tokenizers(spec))
    if objective.discount:
        found.append(
            f"A token has credit for the discounted {objective.discounted_return.value} of the divergence of later "
            f"ones, discount {objective.discount:g} ({paper('MiniLLM')})."
        )
    found.extend(_variants(objective))
    if objective.dataset_share:
        found.append(
            f"A share of {objective.dataset_share:g} of a step's sequences is {_given_by(objective)} ({paper('GKD')})."
        )
    if objective.reward.source is not RewardSource.NONE:
        found.append(_reward(objective))
    if objective.support is Support.SAMPLED_TOKEN or objective.reward.source is not RewardSource.NONE:
        found.append(_policy_gradient(objective))
    return found


def _given_by(objective: Objective) -> str:
    teacher = objective.dataset_responses is DatasetResponses.TEACHER
    return "responses of the teacher, by greedy decoding" if teacher else "text of the data set"


def paper(name: str) -> str:
    """Return a link to the paper of a method."""
    title, number = PAPERS[name]
    return f"[{title}, arXiv {number}](https://arxiv.org/abs/{number})"


def _divergence(objective: Objective) -> str:
    name = DIVERGENCES[objective.divergence]
    if objective.divergence is Divergence.JSD:
        name += f" with beta {objective.jsd_beta:g}"
    if objective.support is Support.SAMPLED_TOKEN:
        how = f"at the sampled token, as an advantage of a policy gradient ({paper('MiniLLM')})"
    else:
        how = f"over the {objective.top_k} likeliest tokens of the teacher and a bucket for all others, differentiated"
    return f"The divergence is the {name}, {how}; its coefficient is {objective.coefficient:g}."


def _other_tokenizers(spec: Spec) -> Iterator[str]:
    teachers = [teacher for teacher in spec.all_teachers if teacher.tokenizer is not None]
    if teachers:
        alone = len(spec.all_teachers) == 1
        names = "the teacher" if alone else ", ".join(f"`{teacher.name}`" for teacher in teachers)
        yield (
            f"Responses were scored as text in the tokens of {names}, whose tokenizer is not the student's: the "
            "divergence is over spans, the shortest runs of tokens that are the same text to both, and each token of a "
            "span has that of the whole span."
        )


def _variants(objective: Objective) -> Iterator[str]:
    """Yield a sentence for each baseline, addition and weight of the divergence."""
    match objective.baseline:
        case Baseline.TOP_K:
            yield (
                "Its expectation over the teacher's top-k and a bucket for all others is subtracted, as a baseline "
                f"({paper('vOPD')})."
            )
        case Baseline.LEAVE_ONE_OUT:
            yield "Its mean over the other responses to the prompt is subtracted, as a baseline."
        case Baseline.BATCH_MEAN:
            yield "Its mean over the other responses of the step is subtracted, as a baseline."
    if objective.extrapolation != 1:
        yield (
            f"The teacher's log-probabilities less those of the reference, `{objective.reference}`, are a reward of "
            f"weight {objective.extrapolation:g}; weight 1 would be distillation alone ({paper('G-OPD')})."
        )
    if objective.reference_coefficient > 0:
        yield _held_back(objective)
    if (clip := objective.entry_clip) is not None:
        yield f"What one token of the vocabulary adds is at most {clip:g} nats ({paper('OPSD')})."
    if (entropy := objective.forward_kl_above_entropy) is not None:
        yield f"Where the teacher's entropy is above {entropy:g} nats, the forward KL is added ({paper('EOPD')})."
    weighting = objective.weighting
    if (gamma := weighting.prefix) > 0:
        yield f"A token weighs more the less divergence stands before it, gamma {gamma:g} ({paper('IW-OPD')})."
    if (share := weighting.share) < 1:
        yield f"A share of {share:g} of a response's tokens is kept, those that can teach most ({paper('TIP')})."
    if (weighting.correct, weighting.wrong) != (1, 1):
        yield _by_outcome(objective)


def _control(objective: Objective) -> Iterator[str]:
    """Yield the sentences of a control: what stands in the teacher's place, then what the job has beside a teacher."""
    yield (
        f"A control ({paper('control')}): nothing that the teacher says is in the loss. In its place stands the "
        f"advantage {ADVANTAGE:g} at those {SHARE:.0%} of a response's tokens that the student finds least likely; "
        f"its coefficient is {objective.coefficient:g}."
    )
    if objective.reference_coefficient > 0:
        yield _held_back(objective)
    if (objective.weighting.correct, objective.weighting.wrong) != (1, 1):
        yield _by_outcome(objective)
    if objective.reward.source is not RewardSource.NONE:
        yield _reward(objective)
    yield _policy_gradient(objective)


def _held_back(objective: Objective) -> str:
    return (
        f"The reverse KL to the reference, `{objective.reference}`, is added; its coefficient is "
        f"{objective.reference_coefficient:g} ({paper('StableOPD')})."
    )


def _by_outcome(objective: Objective) -> str:
    weighting = objective.weighting
    return f"Correct responses have the weight {weighting.correct:g}, others {weighting.wrong:g}."


def _reward(objective: Objective) -> str:
    advantage = {
        Advantage.GROUP: f"centred and scaled within the responses to a prompt ({paper('GRPO')})",
        Advantage.LEAVE_ONE_OUT: f"minus the mean of the other responses to the prompt ({paper('RLOO')})",
        Advantage.NONE: "as it is",
    }[objective.advantage]
    source, coefficient = objective.reward.source.value, objective.reward_coefficient
    return f"A task reward, `{source}`, is added to the advantage {advantage}; its coefficient is {coefficient:g}."


def _policy_gradient(objective: Objective) -> str:
    correction = objective.correction
    weights = {
        ImportanceWeight.TRUNCATED: f"truncated to {correction.low:g} … {correction.high:g}",
        ImportanceWeight.GATED: f"gated to {correction.low:g} … {correction.high:g} ({paper('IcePop')})",
        ImportanceWeight.NONE: "not used",
    }[correction.importance_weight]
    return (
        f"The policy ratio is clipped by {correction.ratio_clip:g} ({paper('PPO')}); the importance weights of the "
        f"engines' samples are {weights}."
    )
