"""The lines of samples.jsonl: a few decoded rollouts of each step, and how much less likely each token is to the
teacher.

Two a step: the first by its prompt, which is any, and the one that the teacher likes least, which shows what the
student still does wrong. Long ones are cut off, and the file is rotated, so that no run fills its volume.
"""

from collections.abc import Callable

from distill_workers.data.sample import Sample
from distill_workers.reporting.token_kl import token_kl

TOKENS = 2048
"""Of a response that are kept, from its beginning; and of a prompt, from its end."""
LIMIT_BYTES = 32 * 2**20
"""At which samples.jsonl is rotated."""
Decode = Callable[[list[int]], str]


def picked_samples(samples: list[Sample]) -> list[tuple[str, Sample]]:
    """Return up to two of the student's own samples, and why: "first" and "furthest"."""
    own = [sample for sample in samples if sample.response_ids and not sample.supervised]
    if not own:
        return []
    # Not the first to arrive, which would be a short one.
    first = min(own, key=lambda sample: (sample.prompt_index, sample.index_in_group))
    furthest = max(own, key=lambda sample: float(token_kl(sample).mean()))
    return [("first", first), *([("furthest", furthest)] if furthest is not first else [])]


def sample_line(step: int, why: str, sample: Sample, decode: Decode) -> dict[str, object]:
    """Return the sample's line: `tokens` and `kl` (k1, nats; student's engine minus teacher) have one entry a token.

    An environment's tokens have the entry None in `kl`.
    """
    kl: list[float | None] = [None] * len(sample.response_ids)
    for place, value in zip(sample.trained(range(len(kl))), token_kl(sample).tolist(), strict=True):
        kl[place] = round(value, 3)
    return {
        "kind": "rollout",
        "step": step,
        "picked": why,
        "source": sample.source,
        "prompt_index": sample.prompt_index,
        "sibling": sample.index_in_group,
        "weight_version": sample.weight_version,
        "teacher_version": sample.teacher_version,
        "reward": sample.reward,
        "truncated": sample.truncated,
        "response_tokens": len(sample.response_ids),
        "prompt": decode(sample.prompt_ids[-TOKENS:]),
        "tokens": token_texts(sample.response_ids[:TOKENS], decode),
        "kl": kl[:TOKENS],
    }


def token_texts(ids: list[int], decode: Decode) -> list[str]:
    """Return the text of each token. Tokens that hold parts of one character are decoded together: the first of them
    has the text, the others have none."""
    known = {token: decode([token]) for token in set(ids)}
    texts: list[str] = []
    begin = 0
    while begin < len(ids):
        end = begin + 1
        while "�" in known[ids[begin]] and end < len(ids) and "�" in known[ids[end]]:
            end += 1
        whole = known[ids[begin]] if end == begin + 1 else decode(ids[begin:end])
        texts += [whole, *[""] * (end - begin - 1)]
        begin = end
    return texts
