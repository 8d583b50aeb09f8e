"""Rollouts on the page of a run: what the student wrote, token by token, coloured by how its teacher sees it."""

import html

from distill_workers.reporting.samples_file import Rollout

SHOWN_TOKENS = 400
"""Of a rollout's response and of its prompt."""
FULL_COLOUR_NATS = 3.0
"""Per-token KL at which the colour of a token is as strong as it gets."""
ROLLOUT_STYLE = """
.rollout { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; padding: .5rem 1rem;
           border-left: 3px solid #ddd; }
.prompt { color: #888; }
"""


def rollouts_html(rollouts: list[Rollout]) -> str:
    """Return responses as HTML: their tokens are red where the teacher holds them less likely than the student, blue
    where more."""
    if not rollouts:
        return ""
    parts = [
        "<h2>Rollouts</h2><p>Of the first step and of the last: any one, and the one furthest from the teacher. "
        '<span style="background:rgba(220,60,40,.6)">Red</span> tokens are less likely to the teacher than to the '
        'student, <span style="background:rgba(40,90,220,.6)">blue</span> ones more; point at one for its nats.</p>'
    ]
    for r in rollouts:
        facts = [f"step {r.step}", r.picked, r.source, f"{r.response_tokens} tokens"]
        facts += [f"{r.mean_kl:.3f} nats per token"]
        facts += [] if r.reward is None else [f"reward {r.reward:g}"]
        shown = zip(r.tokens[:SHOWN_TOKENS], r.kl[:SHOWN_TOKENS], strict=True)
        more = " …" if r.response_tokens > SHOWN_TOKENS else ""
        parts.append(
            f"<p>{html.escape(', '.join(fact for fact in facts if fact))}</p>"
            f'<div class="rollout"><span class="prompt">{html.escape(r.prompt[-4 * SHOWN_TOKENS :])}</span>'
            f"{''.join(_token(text, kl) for text, kl in shown)}{more}</div>"
        )
    return "\n".join(parts)


def _token(text: str, kl: float | None) -> str:
    if kl is None:  # of an environment, as the prompt is of the data
        return f'<span class="prompt">{html.escape(text)}</span>'
    strength = min(1.0, abs(kl) / FULL_COLOUR_NATS) * 0.8
    colour = "220,60,40" if kl > 0 else "40,90,220"
    return f'<span style="background:rgba({colour},{strength:.2f})" title="{kl:.3f}">{html.escape(text)}</span>'
