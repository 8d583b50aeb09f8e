"""The text of a response as rewards read it: without special tokens, but for those that begin or end the thinking.

Mistral's [THINK] and [/THINK] are special tokens, and so is <think> in some tokenizers. Were they left out, a box in
thinking that has not ended would be the answer.
"""

from collections.abc import Sequence
from typing import Any

from distill_workers.rewards.mathematics.answer import is_thinking_tag


class GradedText:
    """Decodes responses for rewards."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})  # the tokenizers of mistral-common have none
        ids, texts = getattr(tokenizer, "all_special_ids", []), getattr(tokenizer, "all_special_tokens", [])
        special = dict(zip(ids, texts, strict=True)) | {i: entry.content for i, entry in added.items() if entry.special}
        self._tags = {token: text for token, text in special.items() if is_thinking_tag(text)}

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text of a response's token ids."""
        parts, begin = list[str](), 0
        for place, token in enumerate(ids):
            if token in self._tags:
                parts += [self._decoded(ids[begin:place]), self._tags[token]]
                begin = place + 1
        return "".join([*parts, self._decoded(ids[begin:])])

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
