"""The objective of a job in sentences, with the papers that it is from."""

from distill_api.spec.job_spec import Advantage, Divergence, ImportanceWeight, Objective, RewardSource, Support

PAPERS = {
    "GKD": ("On-Policy Distillation of Language Models", "2306.13649"),
    "MiniLLM": ("MiniLLM", "2306.08543"),
    "PPO": ("Proximal Policy Optimization", "1707.06347"),
    "GRPO": ("DeepSeekMath", "2402.03300"),
    "RLOO": ("Back to Basics", "2402.14740"),
    "IcePop": ("Every Step Evolves", "2510.18855"),
}
"""Title, or its beginning, and arXiv number."""
DIVERGENCES = {
    Divergence.REVERSE_KL: "reverse KL divergence",
    Divergence.FORWARD_KL: "forward KL divergence",
    Divergence.JSD: "generalised Jensen-Shannon divergence",
}


def method(objective: Objective) -> list[str]:
    """Return sentences in Markdown: the divergence first, then what a job adds to it."""
    found = [f"On-policy distillation ({paper('GKD')}): the student learns from its own samples."]
    found.append(_divergence(objective))
    if objective.discount:
        found.append(
            f"A token has credit for the divergence of later ones, discount {objective.discount:g} "
            f"({paper('MiniLLM')})."
        )
    if objective.dataset_share:
        found.append(
            f"A share of {objective.dataset_share:g} of a step's sequences is text of the data set ({paper('GKD')})."
        )
    if objective.reward.source is not RewardSource.NONE:
        found.append(_reward(objective))
    if objective.support is Support.SAMPLED_TOKEN or objective.reward.source is not RewardSource.NONE:
        found.append(_policy_gradient(objective))
    return found


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
