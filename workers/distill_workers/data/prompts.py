"""Prompts: read once from their sources, tokenised, and iterated epoch by epoch, mixed by the sources' weights."""

import bisect
import dataclasses
import itertools
import logging
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from distill_api.spec.job_spec import Prompts, ReasoningGym, Spec
from distill_workers.data.routing import Route
from distill_workers.data.rows import hub_rows, path_rows
from distill_workers.data.sample import Prompt
from distill_workers.data.text_rows import Row, kind
from distill_workers.failures import PromptError
from distill_workers.metrics import Metrics

__all__ = ["Cursor", "PromptError", "load_data", "load_prompts"]

log = logging.getLogger(__name__)

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, fill the unit interval as evenly as any sequence does."""
SINGLE_TEACHER = Route()
"""The route of a job with one teacher."""


def load_data(spec: Spec, tokenizer: Any, metrics: Metrics) -> list[Prompt]:
    """Return the training prompts of all sources, with `index` counted through all of them. Raises PromptError."""
    result: list[Prompt] = []
    for source in spec.data.all_sources:
        route = Route.of(spec, source)
        found, long = load_prompts(source.prompts, tokenizer, spec.rollout.max_prompt_tokens, None, route)
        metrics.set("distill_prompts_overlong", long, source=source.name)
        first = result[-1].index + 1 if result else 0
        result += [dataclasses.replace(p, index=first + p.index, source=source.name) for p in found]
    return result


def load_prompts(
    prompts: Prompts, tokenizer: Any, max_prompt_tokens: int, limit: int | None, route: Route = SINGLE_TEACHER
) -> tuple[list[Prompt], int]:
    """Return the first `limit` prompts that are not too long, and how many were too long. Raises PromptError."""
    name = name_of(prompts)
    result: list[Prompt] = []
    seen = long = 0
    for entry in entries_of(prompts, route):
        seen += 1
        text, ids = encode(prompts, tokenizer, entry.question, entry.where)
        if len(ids) > max_prompt_tokens:
            long += 1
            continue
        prompt = Prompt(seen - 1, ids, text, entry.answer, entry.metadata, "", entry.response, entry.teacher)
        result.append(prompt)
        if len(result) == limit:
            break
    if long:
        log.warning(
            "%s: %d of %d prompts left out, longer than rollout.maxPromptTokens %d", name, long, seen, max_prompt_tokens
        )
    if not result:
        raise PromptError(
            f"{name}: all {seen} prompts are longer than rollout.maxPromptTokens {max_prompt_tokens}; raise it"
            if seen
            else f"{name}: has no prompts; each line of a JSONL file is one JSON object, each row of Parquet one prompt"
        )
    return result, long


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One row of a source, parsed and checked."""

    where: str
    question: str | list[dict[str, Any]]
    """Text, or chat messages."""
    answer: str | None
    metadata: dict[str, Any]
    """Every other field."""
    response: str | None = None
    teacher: str = ""


def name_of(prompts: Prompts) -> str:
    """Return the name of a source for a message."""
    if prompts.reasoning_gym is not None:
        return f"reasoning-gym {prompts.reasoning_gym.task}"
    return f"data set {prompts.dataset.name}" if prompts.dataset is not None else str(prompts.path)


def entries_of(prompts: Prompts, route: Route) -> Iterator[Entry]:
    """Yield the entries of a source, of whichever kind it is. Raises PromptError."""
    if prompts.reasoning_gym is not None:
        return reasoning_gym_entries(prompts.reasoning_gym, route)
    if prompts.dataset is not None:
        return (read_row(row, prompts, route) for row in hub_rows(prompts.dataset))
    assert prompts.path is not None
    return (read_row(row, prompts, route) for row in path_rows(prompts.path))


def read_row(row: Row, prompts: Prompts, route: Route) -> Entry:
    """Return the entry in a row of a file or a data set. Raises PromptError."""
    where, record = row
    question = required_field(record, prompts.prompt_field, where, "promptField")
    if not isinstance(question, str) and not is_chat(question):
        raise PromptError(
            f"{where}: field {prompts.prompt_field} is {kind(question)}; "
            'allowed are a string and a list of {"role": ..., "content": ...} with texts'
        )
    if not question or (isinstance(question, str) and not question.strip()):
        raise PromptError(f"{where}: field {prompts.prompt_field} is empty")
    answer: Any = None
    if prompts.answer_field is not None:
        answer = required_field(record, prompts.answer_field, where, "answerField")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise PromptError(
                f"{where}: field {prompts.answer_field} is {kind(answer)}; allowed are a string and a number"
            )
        answer = str(answer)
    response: Any = None
    if prompts.response_field is not None:
        response = required_field(record, prompts.response_field, where, "responseField")
        if not isinstance(response, str) or not response.strip():
            what = "empty" if isinstance(response, str) else kind(response)
            raise PromptError(f"{where}: field {prompts.response_field} is {what}; it must be a text to learn from")
    known = (prompts.prompt_field, prompts.answer_field, prompts.response_field)
    metadata = {k: v for k, v in record.items() if k not in known}
    return Entry(where, question, answer, metadata, response, route.teacher(prompts.teacher_field, record, where))


def required_field(record: dict[str, Any], field: str, where: str, setting: str) -> Any:
    """Return a field of a row. Raises PromptError, which names the `setting` of prompts, if the row lacks it."""
    if field not in record:
        raise PromptError(
            f"{where}: has no field {field} (prompts.{setting}); it has {', '.join(sorted(record)) or 'none'}"
        )
    return record[field]


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of chat messages."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def reasoning_gym_entries(task: ReasoningGym, route: Route) -> Iterator[Entry]:
    """Yield the entries that a generator of reasoning-gym makes. Raises PromptError."""
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(task.task, size=task.size, seed=task.seed, **task.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise PromptError(
            f"reasoningGym.task {task.task}: {error}; see reasoning-gym's list of tasks and options"
        ) from None
    for number, entry in enumerate(dataset, start=1):
        metadata = {**entry["metadata"], "entry": entry, "task": task.task, "options": dict(task.options)}
        answer = None if entry["answer"] is None else str(entry["answer"])
        where = f"reasoning-gym {task.task} row {number}"
        yield Entry(where, entry["question"], answer, metadata, teacher=route.teacher(None, {}, where))


def encode(prompts: Prompts, tokenizer: Any, question: str | list[dict[str, Any]], where: str) -> tuple[str, list[int]]:
    """Return the text that the student continues, and its token ids. Raises PromptError."""
    from jinja2 import TemplateError

    if isinstance(question, str) and not prompts.apply_chat_template:
        return question, list(tokenizer(question)["input_ids"])
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not prompts.apply_chat_template:
        raise PromptError(f"{where}: is a list of chat messages, which needs prompts.applyChatTemplate: true")
    if prompts.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": prompts.system_prompt}, *messages]
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the student has no chat template; set prompts.applyChatTemplate: false")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise PromptError(f"{where}: the student's chat template refuses these messages: {error}") from None
    # The template writes the special tokens itself.
    return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])


class SourceIterator:
    """An endless iterator over the prompts of one source, shuffled anew in each epoch."""

    def __init__(self, prompts: list[Prompt], key: str, shuffle: bool) -> None:
        """`key` seeds the order of each epoch."""
        self.prompts, self._key, self._shuffle = prompts, key, shuffle
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    def next(self) -> Prompt:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        self._position += 1
        return self.prompts[self._order[self._position - 1]]

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, "prompts": len(self.prompts)}

    def restore(self, state: dict[str, Any]) -> None:
        if state["prompts"] != len(self.prompts):
            raise PromptError(
                f"the checkpoint was made with {state['prompts']} prompts and there are {len(self.prompts)} now; "
                "restore the data, or start in a new output folder"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        if self._shuffle:
            random.Random(f"{self._key}/{epoch}").shuffle(order)
        return order


class Cursor:
    """An endless stream of prompts: one iterator for each source, mixed by the sources' weights.

    Each source has a part of the unit interval, as long as its share of the weights. Prompt n is of the source in whose
    part (start + n·GOLDEN_RATIO) mod 1 falls. So any run of prompts holds the sources by their weights, give or take
    two prompts, in no fixed pattern.
    """

    def __init__(
        self, prompts: list[Prompt], *, seed: int, shuffle: bool, weights: Mapping[str, float] | None = None
    ) -> None:
        """`weights` are by the names of sources; a source that is left out has the weight 1."""
        by_source: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            by_source.setdefault(prompt.source, []).append(prompt)
        alone = len(by_source) == 1
        self._iterators = {
            name: SourceIterator(of_source, f"{seed}" if alone else f"{seed}/{name}", shuffle)
            for name, of_source in by_source.items()
        }
        self._names = list(self._iterators)
        self._ends = list(itertools.accumulate((weights or {}).get(name, 1.0) for name in self._names))
        self._start = random.Random(f"{seed}/sources").random()
        self._taken = 0

    def next(self, count: int) -> list[Prompt]:
        """Return the next prompts and move the cursor behind them."""
        return [self._iterators[self._choose()].next() for _ in range(count)]

    def peek(self, count: int) -> list[Prompt]:
        """Return the first prompts of each source in turn, wherever the cursor stands."""
        rows = itertools.zip_longest(*(iterator.prompts[:count] for iterator in self._iterators.values()))
        return [prompt for row in rows for prompt in row if prompt is not None][:count]

    def state(self) -> dict[str, Any]:
        states = {name: iterator.state() for name, iterator in self._iterators.items()}
        return states[self._names[0]] if len(states) == 1 else {"drawn": self._taken, "sources": states}

    def restore(self, state: dict[str, Any]) -> None:
        """Move the cursor to a `state`. Raises PromptError if the state is of other prompts."""
        states = state["sources"] if "sources" in state else {self._names[0]: state}
        if states.keys() != self._iterators.keys():
            raise PromptError(
                f"the checkpoint was made with the sources {', '.join(states)} and there are "
                f"{', '.join(self._names)} now; restore data.sources, or start in a new output folder"
            )
        for name, iterator in self._iterators.items():
            iterator.restore(states[name])
        self._taken = state.get("drawn", 0)

    def _choose(self) -> str:
        if len(self._names) == 1:
            return self._names[0]
        point = (self._start + self._taken * GOLDEN_RATIO) % 1.0 * self._ends[-1]
        self._taken += 1
        return self._names[min(bisect.bisect_right(self._ends, point), len(self._names) - 1)]
