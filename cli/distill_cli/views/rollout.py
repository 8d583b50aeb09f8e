"""Decoded rollouts on a terminal: each token coloured by its reverse KL to the teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from distill_workers.reporting.samples_file import Rollout

FULL_COLOUR_NATS = 3.0
"""The reverse KL of a token at which its colour is strongest; the same as on the page of the report."""
MIN_COLOUR_NATS = 0.05
"""The reverse KL, of either sign, below which a token has no colour."""
MIN_COLOUR_NATS_OF_16 = 1.0
"""The same on a terminal of sixteen colours, which has no weak ones."""
FURTHEST_TOKENS = 5
"""How many tokens are listed where there are no colours."""


def select_rollouts(rollouts: Iterable[Rollout], step: int | None, source: str | None, limit: int) -> list[Rollout]:
    """Return the last `limit` rollouts of the step, by default the newest, and of the source, by default any."""
    found: list[Rollout] = []
    for rollout in rollouts:
        if source is not None and rollout.source != source:
            continue
        if step is None and found and found[-1].step != rollout.step:
            found = []
        if step is None or rollout.step == step:
            found.append(rollout)
    return found[-limit:]


def rollout_text(rollout: Rollout, *, coloured: bool, sixteen_colours: bool = False) -> Text:
    """Return a rollout's head, prompt and response; without colours, the furthest tokens below them."""
    facts = [
        f"step {rollout.step}",
        rollout.picked,
        rollout.source,
        f"{rollout.response_tokens} tokens",
        f"{rollout.mean_kl:.3f} nats per token",
        "" if rollout.reward is None else f"reward {rollout.reward:g}",
    ]
    head = Text(", ".join(fact for fact in facts if fact) + "\n", style="bold")
    text = Text.assemble(head, (rollout.prompt.rstrip("\n") + "\n", "dim"))
    for token, kl in zip(rollout.tokens, rollout.kl, strict=True):
        text.append(token, style=colour(kl, sixteen_colours=sixteen_colours) if coloured else "")
    if rollout.response_tokens > len(rollout.tokens):
        text.append(" …")
    if not coloured:
        text.append("\n" + furthest_tokens(rollout))
    return text


def colour(kl: float | None, *, sixteen_colours: bool = False) -> str:
    """Return the style of a token: red where the teacher finds it less likely than the student, blue where more, dim
    where it is an environment's."""
    if kl is None:
        return "dim"
    if sixteen_colours:
        return "" if abs(kl) < MIN_COLOUR_NATS_OF_16 else f"white on {'red' if kl > 0 else 'blue'}"
    if abs(kl) < MIN_COLOUR_NATS:
        return ""
    strength = min(1.0, abs(kl) / FULL_COLOUR_NATS)
    full = (220, 60, 40) if kl > 0 else (40, 90, 220)
    red, green, blue = (round(40 + (part - 40) * strength) for part in full)
    return f"white on rgb({red},{green},{blue})"


def furthest_tokens(rollout: Rollout) -> str:
    """Return the tokens of the highest reverse KL, in nats, as a line."""
    own = [(kl, token) for kl, token in zip(rollout.kl, rollout.tokens, strict=True) if kl is not None]
    ranked = sorted(own, reverse=True)[:FURTHEST_TOKENS]
    return "furthest from the teacher: " + ", ".join(f"{token!r} {kl:.2f}" for kl, token in ranked)
