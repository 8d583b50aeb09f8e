"""Decoded rollouts on a terminal: each token coloured by how its teacher sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from distill_workers.reporting.samples_file import Rollout

FULL_COLOUR_NATS = 3.0
"""Per-token KL at which the colour of a token is as strong as it gets; as on the page of the report."""
LEAST_NATS = 0.05
"""Below it a token has no colour."""
LEAST_NATS_OF_FEW = 1.0
"""The same where a terminal has sixteen colours, and so no weak ones."""
FURTHEST = 5
"""Tokens that are listed where there are no colours."""


def chosen(rollouts: Iterable[Rollout], step: int | None, source: str | None, limit: int) -> list[Rollout]:
    """The last `limit` of the step, or of the newest one, and of the source."""
    found: list[Rollout] = []
    for rollout in rollouts:
        if source is not None and rollout.source != source:
            continue
        if step is None and found and found[-1].step != rollout.step:
            found = []
        if step is None or rollout.step == step:
            found.append(rollout)
    return found[-limit:]


def shown(rollout: Rollout, *, coloured: bool, few: bool = False) -> Text:
    """What it is, its prompt, and its response; `few`: in the sixteen colours of a plain terminal."""
    mean = sum(rollout.kl) / max(1, len(rollout.kl))
    facts = [
        f"step {rollout.step}",
        rollout.picked,
        rollout.source,
        f"{rollout.response_tokens} tokens",
        f"{mean:.3f} nats per token",
        "" if rollout.reward is None else f"reward {rollout.reward:g}",
    ]
    text = Text(", ".join(fact for fact in facts if fact) + "\n", style="bold")
    made = Text.assemble(text, (rollout.prompt.rstrip("\n") + "\n", "dim"))
    for token, kl in zip(rollout.tokens, rollout.kl, strict=True):
        made.append(token, style=colour(kl, few=few) if coloured else "")
    if rollout.response_tokens > len(rollout.tokens):
        made.append(" …")
    if not coloured:
        made.append("\n" + furthest(rollout))
    return made


def colour(kl: float, *, few: bool = False) -> str:
    """A background between that of the terminal and full red, or full blue."""
    if few:
        return "" if abs(kl) < LEAST_NATS_OF_FEW else f"white on {'red' if kl > 0 else 'blue'}"
    if abs(kl) < LEAST_NATS:
        return ""
    strength = min(1.0, abs(kl) / FULL_COLOUR_NATS)
    full = (220, 60, 40) if kl > 0 else (40, 90, 220)
    red, green, blue = (round(40 + (part - 40) * strength) for part in full)
    return f"white on rgb({red},{green},{blue})"


def furthest(rollout: Rollout) -> str:
    """The tokens that the teacher likes least, in nats."""
    ranked = sorted(zip(rollout.kl, rollout.tokens, strict=True), reverse=True)[:FURTHEST]
    return "furthest from the teacher: " + ", ".join(f"{token!r} {kl:.2f}" for kl, token in ranked)
