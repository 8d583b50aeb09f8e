"""Rollouts on the page of a run: what the student wrote, token by token, coloured by how its teacher sees it."""

import html
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHOWN_TOKENS = 400
"""Of a rollout's response and of its prompt."""
SERVED_BYTES = 2 * 2**20
"""Of the newest rollouts that the trainer serves: some tens of the longest."""
FILES = ("samples.1.jsonl", "samples.jsonl")
"""The older half, and the newer."""
FULL_COLOUR_NATS = 3.0
"""Per-token KL at which the colour of a token is as strong as it gets."""
ROLLOUT_STYLE = """
.rollout { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; padding: .5rem 1rem;
           border-left: 3px solid #ddd; }
.prompt { color: #888; }
"""


@dataclass(frozen=True)
class Rollout:
    """A rollout of samples.jsonl; `kl` in nats, one for each of `tokens`."""

    step: int
    picked: str
    source: str
    reward: float | None
    response_tokens: int
    prompt: str
    tokens: list[str]
    kl: list[float]


def read_rollouts(run_folder: Path) -> list[Rollout]:
    """Those of the first step that is still there, and of the last."""
    found: list[Rollout] = []
    for rollout in every_rollout(run_folder):
        found = [r for r in found if r.step in (found[0].step, rollout.step)] + [rollout]
    return found


def every_rollout(run_folder: Path) -> Iterator[Rollout]:
    """All that samples.jsonl and its older half hold, in their order."""
    for name in FILES:
        path = run_folder / name
        if path.exists():
            with path.open(encoding="utf-8") as lines:
                yield from rollouts_in(lines)


def rollouts_in(lines: Iterable[str]) -> Iterator[Rollout]:
    """Those of lines of samples.jsonl, which holds the examples of evaluations too."""
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if line["kind"] == "rollout":
            yield Rollout(**{name: line[name] for name in Rollout.__dataclass_fields__})


def newest_lines(run_folder: Path, limit_bytes: int = SERVED_BYTES) -> bytes:
    """The last whole lines of samples.jsonl, and before them of its older half, that fit; oldest first."""
    found = b""
    for name in reversed(FILES):
        path = run_folder / name
        left = limit_bytes - len(found)
        if left <= 0 or not path.exists():
            continue
        with path.open("rb") as file:
            size = file.seek(0, 2)
            begin = max(0, size - left)
            # One byte more tells whether a line begins here.
            file.seek(max(0, begin - 1))
            tail = file.read(size - max(0, begin - 1))
        if begin:
            tail = tail.partition(b"\n")[2]
        # What has no end is being written, or was cut short by a kill.
        found = tail[: tail.rfind(b"\n") + 1] + found
        if begin:
            break
    return found


def rollouts_html(rollouts: list[Rollout]) -> str:
    """Responses whose tokens are red where the teacher holds them less likely than the student, blue where more."""
    if not rollouts:
        return ""
    parts = [
        "<h2>Rollouts</h2><p>Of the first step and of the last: any one, and the one furthest from the teacher. "
        '<span style="background:rgba(220,60,40,.6)">Red</span> tokens are less likely to the teacher than to the '
        'student, <span style="background:rgba(40,90,220,.6)">blue</span> ones more; point at one for its nats.</p>'
    ]
    for r in rollouts:
        mean = sum(r.kl) / max(1, len(r.kl))
        facts = [f"step {r.step}", r.picked, r.source, f"{r.response_tokens} tokens", f"{mean:.3f} nats per token"]
        facts += [] if r.reward is None else [f"reward {r.reward:g}"]
        shown = zip(r.tokens[:SHOWN_TOKENS], r.kl[:SHOWN_TOKENS], strict=True)
        more = " …" if r.response_tokens > SHOWN_TOKENS else ""
        parts.append(
            f"<p>{html.escape(', '.join(fact for fact in facts if fact))}</p>"
            f'<div class="rollout"><span class="prompt">{html.escape(r.prompt[-4 * SHOWN_TOKENS :])}</span>'
            f"{''.join(_token(text, kl) for text, kl in shown)}{more}</div>"
        )
    return "\n".join(parts)


def _token(text: str, kl: float) -> str:
    strength = min(1.0, abs(kl) / FULL_COLOUR_NATS) * 0.8
    colour = "220,60,40" if kl > 0 else "40,90,220"
    return f'<span style="background:rgba({colour},{strength:.2f})" title="{kl:.3f}">{html.escape(text)}</span>'
