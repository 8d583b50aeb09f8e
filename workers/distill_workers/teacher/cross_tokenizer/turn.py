"""How a chat template writes the assistant's turn: what stands before a response, and the token that ends it."""

import logging
from dataclasses import dataclass
from typing import Any

from distill_workers.teacher.cross_tokenizer.token_bytes import TokenBytes

log = logging.getLogger(__name__)

MARK = "\u2603"
"""A text of an assistant that no template writes by itself."""
QUESTION = {"role": "user", "content": "?"}


@dataclass(frozen=True)
class Turn:
    """The assistant's turn around a response."""

    lead: str = ""
    """White space between the generation prompt and the response, which a model of the template has learnt to write.
    The template writes it, or the tokenizer: SentencePiece's adds a space to the text behind a special token."""
    end: int | None = None
    """The special token behind it; None without a template, if it writes none, or if it refuses such a conversation."""


def turn_of(tokenizer: Any, tokens: TokenBytes | None = None) -> Turn:
    """Return the turn that a tokenizer's chat template writes. Without its `tokens`, the lead is that of the template
    alone."""
    if not getattr(tokenizer, "chat_template", None):
        return Turn()
    try:
        asked = str(tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True))
        text = str(tokenizer.apply_chat_template([QUESTION, {"role": "assistant", "content": MARK}], tokenize=False))
    except Exception as error:  # a template raises whatever it likes; prompts may be of another form
        log.info("preflight: a chat template renders no answer, so its end of turn is not known: %s", error)
        return Turn()
    before, _, behind = text.rpartition(MARK)
    lead = before.removeprefix(asked) if before.startswith(asked) else ""
    if tokens is not None and before.startswith(asked):
        lead = _tokenized_lead(tokenizer, tokens, asked, before, lead)
    ids = tokenizer.encode(behind, add_special_tokens=False)
    # White space behind it is the template's own business; what ends a turn is a special token.
    end = next((i for i in ids if i in tokenizer.all_special_ids), None)
    return Turn(lead if lead.isspace() else "", end)


def _tokenized_lead(tokenizer: Any, tokens: TokenBytes, asked: str, before: str, written: str) -> str:
    """Return the bytes of the tokens between a generation prompt `asked` and an answer, as text; `before` is the whole
    text before the answer. Where the two are no tokens of their own, it is what the template has `written`."""
    prompt, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (asked, before + MARK))
    if whole[: len(prompt)] != prompt:
        return written
    lead, mark, _ = tokens.joined(whole[len(prompt) :]).partition(MARK.encode())
    return lead.decode(errors="replace") if mark else written
