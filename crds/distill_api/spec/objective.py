"""The objective: the divergence of the student from its teacher, and a task reward."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import Rule
from distill_api.spec.reward import Reward, RewardSource
from distill_api.spec.schedule import CoefficientSchedule
from distill_api.teacher import dataset_scores
from distill_api.teacher.control import ON_POLICY, Control
from distill_api.teacher.source import TeacherName


class Divergence(StrEnum):
    REVERSE_KL = "reverse-kl"
    FORWARD_KL = "forward-kl"
    JSD = "jsd"


class Support(StrEnum):
    SAMPLED_TOKEN = "sampled-token"
    TOP_K = "top-k"
    TARGET = "target"


class Baseline(StrEnum):
    NONE = "none"
    TOP_K = "top-k"
    LEAVE_ONE_OUT = "leave-one-out"
    BATCH_MEAN = "batch-mean"


class DiscountedReturn(StrEnum):
    MEAN = "mean"
    SUM = "sum"


class Advantage(StrEnum):
    GROUP = "group"
    LEAVE_ONE_OUT = "leave-one-out"
    NONE = "none"


class ImportanceWeight(StrEnum):
    TRUNCATED = "truncated"
    GATED = "gated"
    NONE = "none"


class Correction(Model):
    """Off-policy corrections of the policy gradient.

    The importance ratio of a token is its probability by the trainer, before the step, over its probability by the
    engine that sampled it; it differs from 1 by the engine's other kernels and older weights. With a teacher of another
    tokenizer it is the product of the ratios over the token's span. The divergence of support top-k is not corrected:
    it is valid on any sequence (GKD).
    """

    importance_weight: ImportanceWeight = Field(
        ImportanceWeight.TRUNCATED,
        description="Importance weight of a token. truncated: its ratio, bounded to low and high (truncated importance "
        "sampling); gated: its ratio, and 0 outside low and high (IcePop); none: 1.",
    )
    low: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Lower bound of a token's importance ratio; IcePop uses 0.5."
    )
    high: Annotated[float, Field(ge=1, le=100)] = Field(
        2.0, description="Upper bound of a token's importance ratio; IcePop uses 5."
    )
    sequence_low: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Lower bound of the geometric mean of a response's ratios, below which it is masked."
    )
    sequence_high: Annotated[float, Field(ge=1, le=100)] | None = Field(
        None,
        description="Upper bound of the geometric mean of a response's ratios, above which it is masked; absent is "
        "none.",
    )
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Clip range epsilon of the policy ratio within a step (PPO, arXiv 1707.06347)."
    )


class Weighting(Model):
    """Weights of tokens in the divergence; a reward has its own coefficient."""

    prefix: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0,
        description="gamma of a token's weight 1 + gamma (1 - the part of the response's divergence before it) "
        "(IW-OPD, arXiv 2606.22600).",
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Share of a response's tokens that are kept, those with the most entropy or divergence (TIP, arXiv "
        "2604.14084).",
    )
    correct: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Weight of responses with a reward of 1 or more."
    )
    wrong: Annotated[float, Field(ge=0, le=1000)] = Field(1.0, description="Weight of responses with a lower reward.")


class Objective(Model):
    """The training objective: a divergence from the teacher on the student's own samples, and a task reward."""

    rules = (
        ON_POLICY,
        Rule(
            "support sampled-token goes with divergence reverse-kl only; choose support top-k",
            "self.support != 'sampled-token' || self.divergence == 'reverse-kl'",
            lambda o: o.support is not Support.SAMPLED_TOKEN or o.divergence is Divergence.REVERSE_KL,
        ),
        Rule(
            "discount goes with support sampled-token only; top-k differentiates the divergence of each token",
            "self.support == 'sampled-token' || self.discount == 0.0",
            lambda o: o.support is Support.SAMPLED_TOKEN or o.discount == 0,
        ),
        Rule(
            "discountedReturn sum goes with discount above 0 only: without one there is nothing to add up",
            "self.discount > 0.0 || self.discountedReturn == 'mean'",
            lambda o: o.discount > 0 or o.discounted_return is DiscountedReturn.MEAN,
        ),
        # A differentiated divergence has no sampled gradient whose variance a baseline could lower.
        Rule(
            "baseline goes with support sampled-token only",
            "self.support == 'sampled-token' || self.baseline == 'none'",
            lambda o: o.support is Support.SAMPLED_TOKEN or o.baseline is Baseline.NONE,
        ),
        # E[u b grad log pi] is 0 only if the weight u does not depend on what was sampled.
        Rule(
            "baseline goes without weighting.prefix, and with weighting.correct as wrong: else it moves the gradient",
            "self.baseline == 'none' || "
            "(self.weighting.prefix == 0.0 && self.weighting.correct == self.weighting.wrong)",
            lambda o: (
                o.baseline is Baseline.NONE or (o.weighting.prefix == 0 and o.weighting.correct == o.weighting.wrong)
            ),
        ),
        Rule(
            "forwardKlAboveEntropy goes with divergence reverse-kl only",
            "!has(self.forwardKlAboveEntropy) || self.divergence == 'reverse-kl'",
            lambda o: o.forward_kl_above_entropy is None or o.divergence is Divergence.REVERSE_KL,
        ),
        # A differentiated divergence is that of a state; |log pi - log pi_T| depends on the token that was drawn.
        Rule(
            "weighting.share goes with support top-k only: chosen by a sampled token, its gradient is biased",
            "self.support == 'top-k' || self.weighting.share == 1.0",
            lambda o: o.support is Support.TOP_K or o.weighting.share == 1,
        ),
        Rule(
            "weighting.correct and wrong go with a reward only: it says which responses are correct",
            "self.reward.source != 'none' || (self.weighting.correct == 1.0 && self.weighting.wrong == 1.0)",
            lambda o: o.reward.source is not RewardSource.NONE or o.weighting.correct == o.weighting.wrong == 1,
        ),
        Rule(
            "topK goes with support top-k, baseline top-k or forwardKlAboveEntropy only",
            "self.support == 'top-k' || self.baseline == 'top-k' || has(self.forwardKlAboveEntropy) || self.topK == 16",
            lambda o: o.teacher_top_k is not None or o.top_k == 16,
        ),
        Rule(
            "entryClip goes with divergence forward-kl only: there one token of the vocabulary can outweigh all others",
            "!has(self.entryClip) || self.divergence == 'forward-kl'",
            lambda o: o.entry_clip is None or o.divergence is Divergence.FORWARD_KL,
        ),
        Rule(
            "jsdBeta goes with divergence jsd only",
            "self.divergence == 'jsd' || self.jsdBeta == 0.5",
            lambda o: o.divergence is Divergence.JSD or o.jsd_beta == 0.5,
        ),
        Rule(
            "reference goes with extrapolation other than 1 or referenceCoefficient above 0, and they with it",
            "has(self.reference) == (self.extrapolation != 1.0 || self.referenceCoefficient > 0.0)",
            lambda o: (o.reference is not None) == (o.extrapolation != 1 or o.reference_coefficient > 0),
        ),
        # Servers give log-probs of the sampled token and of their own likeliest ones, not of another model's.
        Rule(
            "reference goes without the teacher's top-k (support, baseline, forwardKlAboveEntropy): it is scored at "
            "the sampled token alone",
            "!has(self.reference) || "
            "(self.support == 'sampled-token' && self.baseline != 'top-k' && !has(self.forwardKlAboveEntropy))",
            lambda o: o.reference is None or o.teacher_top_k is None,
        ),
        dataset_scores.SUPPORT,
        dataset_scores.DATASET_SHARE,
        dataset_scores.TARGET,
        dataset_scores.DATASET_RESPONSES,
    )
    divergence: Divergence = Field(
        Divergence.REVERSE_KL, description="Divergence between student and teacher: reverse-kl, forward-kl or jsd."
    )
    support: Support = Field(
        Support.SAMPLED_TOKEN,
        description="Tokens over which the divergence is taken. sampled-token: at the sampled token, as an advantage; "
        "top-k: over the teacher's top-k tokens and a tail bucket, differentiated; target: at the data set's token, "
        "cross-entropy (SFT).",
    )
    top_k: Annotated[int, Field(ge=1, le=256)] = Field(
        16, description="Number k of the teacher's likeliest tokens, where support, baseline or forward KL take them."
    )
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Weight beta of the teacher in the mixture of divergence jsd (GKD, arXiv 2306.13649)."
    )
    entry_clip: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None,
        description="Upper bound, in nats, of what one token of the vocabulary adds to divergence forward-kl (OPSD, "
        "arXiv 2601.18734).",
    )
    dataset_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of a step's sequences taken from responseField of the data set, not sampled from the "
        "student (1 - lambda of GKD).",
    )
    dataset_responses: dataset_scores.DatasetResponses = Field(
        dataset_scores.DatasetResponses.ROW,
        description="Source of datasetShare's responses. row: responseField; teacher: its own, by greedy decoding.",
    )
    teacher_logprobs: dataset_scores.TeacherLogprobs = Field(
        dataset_scores.TeacherLogprobs.LIVE,
        description="Source of the teacher's log-probs of the data set's responses. live: the teacher, each time; "
        "cached: the teacher, once, kept on the output volume; precomputed: what cached kept, without a teacher "
        "(offline).",
    )
    coefficient: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Coefficient of the divergence in the objective."
    )
    coefficient_schedule: CoefficientSchedule = Field(
        default_factory=CoefficientSchedule, description="Schedule of coefficient over the steps."
    )
    advantage_clip: Annotated[float, Field(gt=0, le=1000)] = Field(
        10.0, description="Bound, in nats, of the absolute value of a token's divergence term in support sampled-token."
    )
    discount: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Credit of a token for later divergence, with support sampled-token; 0: its own divergence alone.",
    )
    discounted_return: DiscountedReturn = Field(
        DiscountedReturn.MEAN,
        description="What discount weighs of later tokens. mean: their discounted mean (MiniLLM, arXiv 2306.08543); "
        "sum: their discounted sum.",
    )
    baseline: Baseline = Field(
        Baseline.NONE,
        description="Subtracted from a token's divergence in support sampled-token, for less variance. top-k: its "
        "expectation, over the teacher's top-k and a tail bucket (vOPD, arXiv 2605.07865); leave-one-out: the mean "
        "over the other responses to the prompt; batch-mean: the mean over the other responses of the step.",
    )
    forward_kl_above_entropy: Annotated[float, Field(ge=0, le=20)] | None = Field(
        None,
        description="Entropy of the teacher, nats, above which forward KL over its top-k and a tail bucket is added "
        "(EOPD, arXiv 2603.07079).",
    )
    reference: TeacherName | None = Field(
        None,
        description="Name of the one of spec.teachers that is the reference: it teaches nobody, and scores every "
        "sample, always by the student's own prompt.",
    )
    extrapolation: Annotated[float, Field(ge=0, le=10)] = Field(
        1.0,
        description="lambda of the reward log-prob of the teacher less that of the reference: above 1 the student is "
        "led beyond its teacher, below 1 it stays nearer to the reference (G-OPD, arXiv 2602.12125).",
    )
    reference_coefficient: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0,
        description="Coefficient of the reverse KL to the reference, at the sampled token (StableOPD, arXiv "
        "2604.08527).",
    )
    control: Control = Field(
        Control.NONE,
        description="fixed-advantage: the same job, taught by nothing. In place of all that the teacher says stands "
        "one advantage, -0.5, at the fifth of a response's tokens that the student finds least likely (arXiv "
        "2608.31046).",
    )
    weighting: Weighting = Field(default_factory=Weighting, description="Weights of tokens in the divergence.")
    correction: Correction = Field(
        default_factory=Correction, description="Off-policy corrections of the policy gradient."
    )
    reward: Reward = Field(default_factory=Reward, description="Task reward, added to the advantage; by default none.")
    reward_coefficient: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Coefficient of the task reward's advantage in the objective."
    )
    reward_coefficient_schedule: CoefficientSchedule = Field(
        default_factory=CoefficientSchedule, description="Schedule of rewardCoefficient over the steps."
    )
    advantage: Advantage = Field(
        Advantage.GROUP,
        description="Advantage of a response from the rewards of its group, the responses to the same prompt. group: "
        "centred and scaled (GRPO, arXiv 2402.03300); leave-one-out: minus the mean of the others (RLOO, arXiv "
        "2402.14740); none: the reward itself.",
    )

    @property
    def teacher_top_k(self) -> int | None:
        """Return how many of the teacher's likeliest tokens are needed at each response token; None for none."""
        needed = (
            self.support is Support.TOP_K,
            self.baseline is Baseline.TOP_K,
            self.forward_kl_above_entropy is not None,
        )
        return self.top_k if any(needed) else None
