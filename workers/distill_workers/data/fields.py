"""Fields of a row: found by a path into it, and read as the chat, the answer or the text that they are meant to be."""

import ast
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from distill_workers.data.text_rows import kind
from distill_workers.failures import PromptError

Chat = list[dict[str, Any]]
ALLOWED = 'allowed are a string and a list of {"role": ..., "content": ...} with texts'
MISSING = object()


def find(record: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path such as reward_model.ground_truth or choices.0.text, or MISSING.

    A field whose own name has dots is found by it.
    """
    if path in record:
        return record[path]
    value: Any = record
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return MISSING
    return value


def required_field(record: Mapping[str, Any], path: str, where: str, setting: str) -> Any:
    """Return the value at a path. Raises PromptError, which names the `setting` of prompts, if the row lacks it."""
    value = find(record, path)
    if value is not MISSING:
        return value
    steps = path.split(".")
    reached, inside = next(
        ((".".join(steps[:n]), find(record, ".".join(steps[:n]))) for n in range(len(steps) - 1, 0, -1)
         if find(record, ".".join(steps[:n])) is not MISSING),
        ("it", record),
    )  # fmt: skip
    if isinstance(inside, Mapping):
        has = f"{reached} has {', '.join(sorted(map(str, inside))) or 'none'}"
    else:
        has = f"{reached} is {f'a list of {len(inside)}' if isinstance(inside, list) else kind(inside)}"
    raise PromptError(f"{where}: has no field {path} (prompts.{setting}); {has}")


def chat_of(value: list[Any], where: str, field: str) -> Chat:
    """Return the messages of a chat, each with its text as one string. Raises PromptError, with the message's place.

    Fields that are null are left out: Parquet gives every message the fields of all.
    """
    chat: Chat = []
    for number, message in enumerate(value, start=1):
        place = f"{where}: field {field}, message {number}"
        if not isinstance(message, dict):
            raise PromptError(f"{place}: is {kind(message)}; {ALLOWED}")
        if "role" not in message and "from" in message:
            raise PromptError(
                f"{place} has from and value, as ShareGPT writes chats; rename them to role and content, with the "
                "roles user and assistant in place of human and gpt"
            )
        if not isinstance(message.get("role"), str):
            raise PromptError(f"{place}: role is {kind(message.get('role'))}; {ALLOWED}")
        others = {k: v for k, v in message.items() if v is not None}
        chat.append({**others, "content": _content(message, place)})
    if not any(m["content"].strip() for m in chat if m["role"] != "system"):
        raise PromptError(f"{where}: field {field} is empty")
    return chat


def chat_in_text(text: str) -> Chat | None:
    """Return the chat that a text is the JSON of, or what Python prints of it; None for any other text.

    It may be one message, or an object with `messages`.
    """
    if not text.lstrip().startswith(("[", "{")) or "role" not in text:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            value = value.get("messages", [value])
        if (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
        ):
            return value
    return None


def answer_of(value: Any, where: str, field: str) -> str:
    """Return a reference answer as text: a whole number without a point, no number with an exponent.

    Raises PromptError.
    """
    if isinstance(value, str):
        if not value.strip():
            raise PromptError(f"{where}: field {field} is empty; a reward would compare with nothing")
        return whole_text(value, where, field)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise PromptError(f"{where}: field {field} is {kind(value)}; allowed are a string and a number")
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise PromptError(
            f"{where}: field {field} is {value}, which a table has where a value is missing; give the answer or leave "
            "the row out"
        )
    text = format(value if isinstance(value, Decimal) else Decimal(repr(value)), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def whole_text(text: str, where: str, field: str) -> str:
    """Return the text. Raises PromptError if it has half a surrogate pair, which no tokenizer and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: field {field} has {text[error.start]!r} at character {error.start + 1}, one half of a character "
            "that was cut in two (a surrogate); leave it out, or write the row anew"
        ) from None
    return text


def _content(message: dict[str, Any], place: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        raise PromptError(f"{place}: content is {kind(content)}; {ALLOWED}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            what = f"of the type {part.get('type')}" if isinstance(part, dict) else kind(part)
            raise PromptError(f"{place}: content has a part that is {what}; the student reads texts alone")
        texts.append(text)
    return "".join(texts)
