"""Prompts: read once from JSONL files or made by reasoning-gym, tokenised, and handed out epoch by epoch."""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_api.spec import Prompts, ReasoningGym
from distill_workers.sample import Prompt

log = logging.getLogger(__name__)


class PromptError(ValueError):
    """Prompts that cannot be read: file, line, field, what is there and what is allowed."""


def load_prompts(prompts: Prompts, tokenizer: Any, max_prompt_tokens: int, limit: int | None) -> list[Prompt]:
    """The first `limit` prompts that are not over-long; how many were is logged. Raises PromptError."""
    if prompts.reasoning_gym is not None:
        entries, where = (
            reasoning_gym_entries(prompts.reasoning_gym),
            f"reasoning-gym {prompts.reasoning_gym.task}",
        )
    else:
        assert prompts.path is not None
        entries, where = jsonl_entries(Path(prompts.path), prompts), prompts.path
    result: list[Prompt] = []
    seen = long = 0
    for question, answer, metadata in entries:
        seen += 1
        text, ids = encode(prompts, tokenizer, question)
        if len(ids) > max_prompt_tokens:
            long += 1
            continue
        result.append(Prompt(index=seen - 1, ids=ids, text=text, answer=answer, metadata=metadata))
        if len(result) == limit:
            break
    if long:
        log.warning(
            "%s: %d of %d prompts left out, longer than rollout.maxPromptTokens %d",
            where,
            long,
            seen,
            max_prompt_tokens,
        )
    if not result:
        raise PromptError(
            f"{where}: all {seen} prompts are longer than rollout.maxPromptTokens {max_prompt_tokens}; raise it"
            if seen
            else f"{where}: has no prompts; put one JSON object on each line"
        )
    return result


Entry = tuple[str | list[dict[str, Any]], str | None, dict[str, Any]]
"""A question (text or chat messages), its reference answer, everything else."""


def jsonl_entries(path: Path, prompts: Prompts) -> Iterator[Entry]:
    for file in jsonl_files(path):
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield parse_line(line, f"{file}:{number}", prompts)
        except OSError as error:
            raise PromptError(f"{file}: cannot be read: {error.strerror}") from None


def jsonl_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.jsonl") if p.is_file())
        if not files:
            raise PromptError(f"{path}: the folder has no *.jsonl file")
        return files
    if not path.exists():
        raise PromptError(f"{path}: does not exist; mount the volume that holds it through trainer.template.volumes")
    return [path]


def parse_line(line: bytes, where: str, prompts: Prompts) -> Entry:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise PromptError(f"{where}: is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise PromptError(f"{where}: is {kind(record)}; each line must be one JSON object")
    question = take(record, prompts.prompt_field, where, "promptField")
    if not isinstance(question, str) and not is_chat(question):
        raise PromptError(
            f"{where}: field {prompts.prompt_field} is {kind(question)}; "
            'allowed are a string and a list of {"role": ..., "content": ...} with texts'
        )
    if not question or (isinstance(question, str) and not question.strip()):
        raise PromptError(f"{where}: field {prompts.prompt_field} is empty")
    answer: Any = None
    if prompts.answer_field is not None:
        answer = take(record, prompts.answer_field, where, "answerField")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise PromptError(
                f"{where}: field {prompts.answer_field} is {kind(answer)}; allowed are a string and a number"
            )
        answer = str(answer)
    rest = {k: v for k, v in record.items() if k not in (prompts.prompt_field, prompts.answer_field)}
    return question, answer, rest


def take(record: dict[str, Any], field: str, where: str, setting: str) -> Any:
    if field not in record:
        raise PromptError(
            f"{where}: has no field {field} (prompts.{setting}); it has {', '.join(sorted(record)) or 'none'}"
        )
    return record[field]


def is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def reasoning_gym_entries(task: ReasoningGym) -> Iterator[Entry]:
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(task.task, size=task.size, seed=task.seed, **task.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise PromptError(
            f"reasoningGym.task {task.task}: {error}; see reasoning-gym's list of tasks and options"
        ) from None
    for entry in dataset:
        metadata = {**entry["metadata"], "entry": entry, "task": task.task, "options": dict(task.options)}
        yield entry["question"], None if entry["answer"] is None else str(entry["answer"]), metadata


def encode(prompts: Prompts, tokenizer: Any, question: str | list[dict[str, Any]]) -> tuple[str, list[int]]:
    """The text that the student continues, and its ids."""
    if isinstance(question, str) and not prompts.apply_chat_template:
        return question, list(tokenizer(question)["input_ids"])
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not prompts.apply_chat_template:
        raise PromptError("a prompt is a list of chat messages, which needs prompts.applyChatTemplate: true")
    if prompts.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": prompts.system_prompt}, *messages]
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the student has no chat template; set prompts.applyChatTemplate: false")
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])


class Cursor:
    """An endless walk over the prompts, shuffled anew in each epoch. Its state is two numbers."""

    def __init__(self, prompts: list[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    def next(self, count: int) -> list[Prompt]:
        taken = []
        for _ in range(count):
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            taken.append(self._prompts[self._order[self._position]])
            self._position += 1
        return taken

    def peek(self, count: int) -> list[Prompt]:
        """The first prompts of the source, whatever the cursor has handed out."""
        return self._prompts[:count]

    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position, "prompts": len(self._prompts)}

    def restore(self, state: dict[str, int]) -> None:
        """Raises PromptError if the state is of other prompts."""
        if state["prompts"] != len(self._prompts):
            raise PromptError(
                f"the checkpoint was made with {state['prompts']} prompts and there are {len(self._prompts)} now; "
                "restore the data, or start in a new output folder"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order
