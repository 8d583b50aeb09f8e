"""Entries: the rows of a source, parsed and checked."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from sys import intern
from typing import Any

from distill_api.spec.job_spec import Prompts, ReasoningGym
from distill_workers.data.fields import ALLOWED, Chat, answer_of, chat_in_text, chat_of, required_field, whole_text
from distill_workers.data.findings import Finding, Findings
from distill_workers.data.routing import Route
from distill_workers.data.rows import hub_rows, one_line, path_rows
from distill_workers.data.text_rows import Row, kind
from distill_workers.failures import PromptError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Roles of a message that chat templates know."""
NO_ANSWERS = frozenset({"nan", "none", "null", "n/a", "<na>"})
"""What tables become where a value was missing, in small letters."""
POINT_ZERO = re.compile(r"\s*-?\d+\.0+\s*")
"""A whole number as a table of fractions writes it."""
TOOLS = frozenset({"tool", "function"})
"""Roles whose message may be empty: a tool that says nothing has been called all the same."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a source, parsed and checked."""

    where: str
    question: str | Chat
    """Text, or chat messages."""
    answer: str | None
    metadata: dict[str, Any]
    """Every other field."""
    response: str | None = None
    teacher: str = ""
    key: int = 0
    """Hash of what is asked, but for white space, by which copies are found in this process."""


def messages_of(entry: Entry) -> Chat:
    """Return the question as chat messages: a text is one of the user."""
    return [{"role": "user", "content": entry.question}] if isinstance(entry.question, str) else entry.question


def name_of(prompts: Prompts) -> str:
    """Return the name of a source for a message."""
    if prompts.reasoning_gym is not None:
        return f"reasoning-gym {prompts.reasoning_gym.task}"
    return f"data set {prompts.dataset.name}" if prompts.dataset is not None else str(prompts.path)


def entries_of(prompts: Prompts, route: Route, findings: Findings) -> Iterator[Entry]:
    """Yield the entries of a source, of whichever kind it is. Raises PromptError."""
    if prompts.reasoning_gym is not None:
        return reasoning_gym_entries(prompts.reasoning_gym, route, findings)
    assert prompts.dataset is not None or prompts.path is not None
    rows: Iterator[Row] = hub_rows(prompts.dataset) if prompts.dataset is not None else path_rows(str(prompts.path))
    if prompts.turns is not None:
        rows = (turn for row in rows for turn in turns_of(row, prompts, findings))
    return (read_row(row, prompts, route, findings) for row in rows)


def turns_of(row: Row, prompts: Prompts, findings: Findings) -> Iterator[Row]:
    """Yield a row for each turn of the assistant in a recorded conversation, with what stands before it as the prompt.

    A prompt is the state that a recorded agent was in, and needs no environment. Raises PromptError.
    """
    assert prompts.turns is not None
    where, record = row
    chat, number = _question(row, prompts, findings), 0
    if isinstance(chat, str):
        raise PromptError(
            f"{where}: field {prompts.prompt_field} is a text; prompts.turns needs a recorded conversation"
        )
    for place, message in enumerate(chat):
        # Two messages of the assistant in a row are one turn.
        if message["role"] != "assistant" or (place > 0 and chat[place - 1]["role"] == "assistant"):
            continue
        if place == 0:
            raise PromptError(f"{where}: field {prompts.prompt_field} begins with the assistant, so nothing is asked")
        number += 1
        if prompts.turns.first <= number <= (prompts.turns.last or number):
            yield f"{where}, turn {number}", {**record, prompts.prompt_field: chat[:place]}
    if not number:
        raise PromptError(f"{where}: field {prompts.prompt_field} has no turn of the assistant (prompts.turns)")


def read_row(row: Row, prompts: Prompts, route: Route, findings: Findings) -> Entry:
    """Return the entry in a row of a file or a data set. Raises PromptError."""
    where, record = row
    question = _question(row, prompts, findings)
    answer: str | None = None
    response: str | None = None
    if prompts.answer_field is not None:
        found = required_field(record, prompts.answer_field, where, "answerField")
        answer = answer_of(found, where, prompts.answer_field)
        if answer.strip().lower() in NO_ANSWERS:
            findings.add(Finding.NO_ANSWER, where)
        if isinstance(found, str) and POINT_ZERO.fullmatch(found):
            findings.add(Finding.POINT_ZERO, where)
    if prompts.response_field is not None and prompts.response_field == prompts.prompt_field:
        question, response = _without_answer(question, where, prompts.prompt_field)
    elif prompts.response_field is not None:
        value = required_field(record, prompts.response_field, where, "responseField")
        if not isinstance(value, str) or not value.strip():
            what = "empty" if isinstance(value, str) else kind(value)
            raise PromptError(f"{where}: field {prompts.response_field} is {what}; it must be a text to learn from")
        response = whole_text(value, where, prompts.response_field)
    if isinstance(question, list) and question[-1]["role"] == "assistant":
        raise PromptError(
            f"{where}: field {prompts.prompt_field} ends with the assistant's answer, and the student would begin a "
            f"second one; leave it out, or set prompts.responseField: {prompts.prompt_field}, which takes it as the "
            "data set's response"
        )
    if isinstance(question, list) and not question[-1]["content"].strip() and question[-1]["role"] not in TOOLS:
        raise PromptError(
            f"{where}: field {prompts.prompt_field} ends with an empty message (role {question[-1]['role']}), so "
            "nothing is asked; leave the row out"
        )
    known = (prompts.prompt_field, prompts.answer_field, prompts.response_field)
    metadata = {intern(k): v for k, v in record.items() if k not in known}  # every row has its own names otherwise
    teacher = route.teacher(prompts.teacher_field, record, where)
    key = _key(question)
    findings.count(key, answer, where)
    return Entry(where, question, answer, metadata, response, teacher, key)


def reasoning_gym_entries(task: ReasoningGym, route: Route, findings: Findings) -> Iterator[Entry]:
    """Yield the entries that a generator of reasoning-gym makes. Raises PromptError."""
    import reasoning_gym

    number = 0
    try:
        for number, entry in enumerate(
            reasoning_gym.create_dataset(task.task, size=task.size, seed=task.seed, **task.options), start=1
        ):
            metadata = {**entry["metadata"], "entry": entry, "task": task.task, "options": dict(task.options)}
            answer = None if entry["answer"] is None else str(entry["answer"])
            where, question = f"reasoning-gym {task.task} row {number}", entry["question"]
            findings.count(key := _key(question), answer, where)
            yield Entry(where, question, answer, metadata, None, route.teacher(None, {}, where), key)
    except PromptError:
        raise
    except Exception as error:  # generators have no common type for what their options make impossible
        raise PromptError(
            f"reasoningGym.task {task.task}: {one_line(error)} (after row {number}); see reasoning-gym's list of tasks "
            "and options"
        ) from None


def _question(row: Row, prompts: Prompts, findings: Findings) -> str | Chat:
    where, record = row
    field = prompts.prompt_field
    question = required_field(record, field, where, "promptField")
    if isinstance(question, str) and (chat := chat_in_text(question)) is not None:
        findings.add(Finding.CHAT_IN_TEXT if prompts.apply_chat_template else Finding.CHAT_AS_TEXT, where)
        question = chat if prompts.apply_chat_template else question
    if isinstance(question, str):
        if not question.strip():
            raise PromptError(f"{where}: field {field} is empty")
        return whole_text(question, where, field)
    if not isinstance(question, list):
        raise PromptError(f"{where}: field {field} is {kind(question)}; {ALLOWED}")
    chat = chat_of(question, where, field)
    for message in chat:
        whole_text(message["content"], where, field)
        if message["role"] not in ROLES:
            findings.add(Finding.ROLE, where, message["role"])
    return chat


def _without_answer(question: str | Chat, where: str, field: str) -> tuple[Chat, str]:
    """Return a chat without its last message, and that message's text. Raises PromptError if it is no answer."""
    if isinstance(question, str) or question[-1]["role"] != "assistant" or len(question) == 1:
        raise PromptError(
            f"{where}: field {field} is prompt and response in one (prompts.responseField), and so must be a chat that "
            "ends with the assistant's answer"
        )
    *asked, answer = question
    if not answer["content"].strip():
        raise PromptError(f"{where}: field {field} ends with an empty answer; it must be a text to learn from")
    return asked, answer["content"]


def _key(question: str | Chat) -> int:
    texts = [question] if isinstance(question, str) else [m["content"] for m in question if m["role"] != "system"]
    return hash(tuple(" ".join(text.split()) for text in texts))
