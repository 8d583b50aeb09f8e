"""Findings: what of a source's rows is surely not meant though it can be read; said once, with a count."""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum

from distill_workers.data.sample import Prompt


class Finding(StrEnum):
    """The end of a sentence about some of the prompts."""

    CHAT_IN_TEXT = "are chats written as one text; they were read as messages"
    CHAT_AS_TEXT = (
        "are chats written as one text, which the student is asked as it stands, as prompts.applyChatTemplate is false"
    )
    POINT_ZERO = (
        "have an answer such as 42.0, as tables write the whole numbers of a column with gaps; exact-match takes it "
        "for another than 42"
    )
    NO_ANSWER = "have an answer such as nan or None, as a table has where a value is missing"
    ROLE = "have a role that chat templates do not know"
    SPECIAL_TOKENS = (
        "have special tokens of the student in their text, as if they were rendered already; then set "
        "prompts.applyChatTemplate: false"
    )


class Findings:
    """Counts of the findings of one source."""

    def __init__(self) -> None:
        self._counts: Counter[Finding] = Counter()
        self._first: dict[Finding, str] = {}
        self._answers: dict[int, int] = {}
        """Hash of the answer to each prompt that was seen, by the prompt's key."""
        self._copies: Counter[int] = Counter()
        """Further copies of each prompt that was seen before."""
        self._most: tuple[int, str] = (0, "")
        self._contradictions: set[int] = set()

    def add(self, finding: Finding, where: str, example: str = "") -> None:
        """Count one row."""
        self._counts[finding] += 1
        self._first.setdefault(finding, where + (f": {example}" if example else ""))

    def count(self, key: int, answer: str | None, where: str) -> None:
        """Count one prompt among its copies."""
        found = hash(answer)
        if key not in self._answers:
            self._answers[key] = found
            return
        if self._answers[key] != found:
            self._contradictions.add(key)
        self._copies[key] += 1
        if self._copies[key] > self._most[0]:
            self._most = (self._copies[key], where)

    def sentences(self, prompts: int) -> list[str]:
        """Return a sentence for each finding, of `prompts` that were read."""
        said = [
            f"{n} of {prompts} prompts {finding} (the first is {self._first[finding]})"
            for finding, n in self._counts.items()
        ]
        if copies := sum(self._copies.values()):
            most, where = self._most
            said.append(
                f"{copies} of {prompts} prompts are copies of others: {prompts - copies} differ, and that of {where} "
                f"is there {most + 1} times; an epoch asks each as often"
            )
        if self._contradictions:
            said.append(f"{len(self._contradictions)} prompts are there with different answers")
        return said


def overlap(training: Iterable[Prompt], evaluation: Sequence[Prompt]) -> str:
    """Return a sentence about an evaluation's prompts that are training prompts too; empty without any."""
    known = _known(training, evaluation)
    if not known:
        return ""
    return (
        f"{known} of {len(evaluation)} prompts are training prompts too, so it does not measure what is new to the "
        "student; leave them out of one of the two"
    )


def shared(others: Iterable[Prompt], source: Sequence[Prompt]) -> str:
    """Return a sentence about a source's prompts that the sources before it have too; empty without any."""
    known = _known(others, source)
    return f"{known} of {len(source)} prompts are those of other sources too, and are asked as often" if known else ""


def _known(others: Iterable[Prompt], prompts: Sequence[Prompt]) -> int:
    """Return how many of the prompts are among the others."""
    keys = {prompt.key for prompt in prompts}
    there = {prompt.key for prompt in others if prompt.key in keys}
    return sum(prompt.key in there for prompt in prompts)
