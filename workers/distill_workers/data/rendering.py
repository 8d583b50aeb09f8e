"""Rendering: from a question to the text that the student continues, and its token ids."""

import asyncio
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill_api.spec.job_spec import Prompts, Spec
from distill_api.spec.prompts import ROW_FIELD
from distill_workers.data.entries import Entry, messages_of
from distill_workers.data.fields import MISSING, Chat, find
from distill_workers.data.findings import Finding, Findings
from distill_workers.data.rows import one_line
from distill_workers.failures import PromptError

FIXED = (
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
    "chat_template",
)
"""Arguments of apply_chat_template that are the same for every prompt."""
PASSED_ON = (KeyboardInterrupt, SystemExit, asyncio.CancelledError)
"""What is no fault of a row. The tokenizers' own panics are BaseExceptions too."""


class Renderer:
    """A chat template and tokenizer, the student's unless `whose` says otherwise, as the prompts of one source use
    them."""

    whose = "the student"

    def __init__(self, prompts: Prompts, tokenizer: Any, tools: Sequence[dict[str, Any]] | None = None) -> None:
        """`tools` are given to the chat template. Raises PromptError for a student that cannot render such prompts."""
        self._tokenizer, self._system, self._apply = tokenizer, prompts.system_prompt, prompts.apply_chat_template
        self._arguments = dict(prompts.chat_template_arguments or {})
        self._eos, self._eos_text = getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "eos_token", None)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        named = set(getattr(tokenizer, "all_special_tokens", ())) | {t.content for t in added if t.special}
        special = sorted(named, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special and self._apply else None
        self._numbers: dict[int, int] = {}
        if self._apply:
            self._check_template()
        if tools is not None:
            self._arguments["tools"] = list(tools)

    def encode(self, entries: Sequence[Entry], findings: Findings) -> list[tuple[str, list[int]]]:
        """Return the text of each entry that the student continues, and its token ids. Raises PromptError."""
        texts = [self._text(entry, findings) for entry in entries]
        ids = self._ids(texts, entries)
        for entry, text, found in zip(entries, texts, ids, strict=True):
            self._check_end(entry.where, text, found)
        return list(zip(texts, ids, strict=True))

    def _check_template(self) -> None:
        template = getattr(self._tokenizer, "chat_template", None)
        if not template:
            raise PromptError(f"{self.whose} has no chat template; set prompts.applyChatTemplate: false")
        if fixed := sorted(set(FIXED) & self._arguments.keys()):
            raise PromptError(f"prompts.chatTemplateArguments sets {fixed[0]}, which is the same for every prompt")
        for name in self._arguments:
            if not re.search(rf"\b{re.escape(name)}\b", str(template)):
                raise PromptError(
                    f"prompts.chatTemplateArguments sets {name}, which the student's chat template does not have"
                )

    def _text(self, entry: Entry, findings: Findings) -> str:
        question, where = entry.question, entry.where
        if not self._apply:
            if isinstance(question, str):
                return question
            raise PromptError(f"{where}: is a list of chat messages, which needs prompts.applyChatTemplate: true")
        messages = messages_of(entry)
        if self._special is not None:
            for message in messages:
                if found := self._special.search(message["content"]):
                    findings.add(Finding.SPECIAL_TOKENS, where, found.group())
                    break
        return self.apply_template(messages, where)

    def apply_template(self, messages: Chat, where: str) -> str:
        """Return chat messages as the text that the student continues, with the system prompt. Raises PromptError."""
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self._arguments
                )
            )
        except PASSED_ON:
            raise
        except BaseException as error:  # a template raises whatever it likes
            raise PromptError(
                f"{where}: {self.whose}'s chat template refuses these messages: {_described(error)}"
            ) from None

    def _ids(self, texts: list[str], entries: Sequence[Entry]) -> list[list[int]]:
        # A template writes the special tokens itself.
        options = {"add_special_tokens": False} if self._apply else {}
        try:
            return self._shared(self._tokenizer(texts, **options)["input_ids"])
        except PASSED_ON:
            raise
        except BaseException:  # one of the texts: which, the next loop finds out
            found = []
            for text, entry in zip(texts, entries, strict=True):
                try:
                    found += self._tokenizer([text], **options)["input_ids"]
                except PASSED_ON:
                    raise
                except BaseException as error:
                    raise PromptError(
                        f"{entry.where}: {self.whose}'s tokenizer refuses this prompt: {_described(error)}"
                    ) from None
            return self._shared(found)

    def _shared(self, found: list[list[int]]) -> list[list[int]]:
        """Return equal ids as one object: a million prompts hold a hundred million, of 28 bytes if each its own."""
        one = self._numbers.setdefault
        return [[one(i, i) for i in ids] for ids in found]

    def _check_end(self, where: str, text: str, ids: list[int]) -> None:
        """Raise PromptError for a prompt that is no token, or after which the student has nothing to say."""
        if not ids:
            raise PromptError(f"{where}: the prompt has no token")
        if self._eos is None or not (ids[-1] == self._eos or text.rstrip().endswith(self._eos_text or "\0")):
            return
        what = (
            f"{self.whose}'s chat template does not begin the assistant's turn (add_generation_prompt)"
            if self._apply
            else f"leave it out of the field, or set add_eos_token: false in {self.whose}'s tokenizer_config.json"
        )
        raise PromptError(f"{where}: the prompt ends with {self.whose}'s end token {self._eos_text}; {what}")


class TeacherRenderer(Renderer):
    """The prompts of a source as its teacher is asked them, where that is another question: privileged context."""

    def __init__(self, prompts: Prompts, tokenizer: Any, tools: Sequence[dict[str, Any]] | None = None) -> None:
        super().__init__(prompts, tokenizer, tools)
        self._prompt, self._teacher_system = prompts.teacher_prompt, prompts.teacher_system_prompt

    @staticmethod
    def of(prompts: Prompts, tokenizer: Any, tools: Sequence[dict[str, Any]] | None = None) -> "TeacherRenderer | None":
        """Return the renderer of a source; None where the teacher is asked the same."""
        same = prompts.teacher_prompt is None and prompts.teacher_system_prompt is None
        return None if same else TeacherRenderer(prompts, tokenizer, tools)

    def encode(self, entries: Sequence[Entry], findings: Findings) -> list[tuple[str, list[int]]]:
        return super().encode([self._privileged(entry) for entry in entries], findings)

    def _privileged(self, entry: Entry) -> Entry:
        """Return the entry with the teacher's question in place of the student's. Raises PromptError."""
        question = entry.question
        last = question if isinstance(question, str) else question[-1]["content"]
        if self._prompt is not None:
            asked = filled(self._prompt, entry, last, "teacherPrompt")
            question = asked if isinstance(question, str) else [*question[:-1], {**question[-1], "content": asked}]
        if self._teacher_system is not None:
            chat = [{"role": "user", "content": question}] if isinstance(question, str) else question
            system = filled(self._teacher_system, entry, last, "teacherSystemPrompt")
            others = chat[1:] if chat[0]["role"] == "system" else chat
            question = [{"role": "system", "content": system}, *others]
        return dataclasses.replace(entry, question=question)


class OwnTokensRenderer(TeacherRenderer):
    """The prompts of a source as a teacher with a tokenizer of its own is asked them, by its own chat template."""

    def __init__(self, prompts: Prompts, tokenizer: Any, name: str) -> None:
        self.whose = f"teacher {name}"
        super().__init__(prompts, tokenizer)

    def _check_template(self) -> None:
        # An argument such as enable_thinking is the student's template's; where this one lacks it, it says nothing.
        template = str(getattr(self._tokenizer, "chat_template", None))
        self._arguments = {k: v for k, v in self._arguments.items() if re.search(rf"\b{re.escape(k)}\b", template)}
        super()._check_template()


def filled(template: str, entry: Entry, prompt: str, setting: str) -> str:
    """Return a text with the fields of a row in place of their names in braces. Raises PromptError for one it lacks."""
    known = {"prompt": prompt, "answer": entry.answer, "response": entry.response}

    def value(match: re.Match[str]) -> str:
        name = match[1]
        found = known.get(name)
        if found is None:
            found = find(entry.metadata, name)
        if found is MISSING or found is None:
            has = ", ".join([*(key for key, text in known.items() if text is not None), *map(str, entry.metadata)])
            raise PromptError(f"{entry.where}: has no {{{name}}} for prompts.{setting}; it has {has}")
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)

    return ROW_FIELD.sub(value, template)


class WithArguments:
    """A tokenizer whose chat template is always given the same arguments."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        self._tokenizer, self._arguments = tokenizer, dict(arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return self._tokenizer(*texts, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(messages, **{**self._arguments, **options})


def template_arguments(spec: Spec) -> list[dict[str, Any]]:
    """Return the arguments that a job's sources and evaluations give to the chat template, each different set once."""
    used = [*(source.prompts for source in spec.data.all_sources), *(e.prompts for e in spec.evaluation)]
    found: list[dict[str, Any]] = []
    for prompts in used:
        arguments = dict(prompts.chat_template_arguments or {})
        if prompts.apply_chat_template and arguments not in found:
            found.append(arguments)
    return found or [{}]


def _described(error: BaseException) -> str:
    from jinja2 import TemplateError

    text = one_line(error) if isinstance(error, Exception) else " ".join(str(error).split())[:500]
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
