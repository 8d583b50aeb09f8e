"""The messages of a conversation as token ids.

What the student sampled and what was appended stays as it is, and is never decoded and encoded again. That is the one
rule, also for chat templates that write earlier turns otherwise, such as without their thinking. Only what follows the
student's newest turn is rendered. It is found with a probe: a conversation whose assistant says a word of ours, and
then the messages. What the template writes after that word, from the end of the assistant's turn to the next generation
prompt, does not depend on what the assistant said.
"""

import json
from collections.abc import Sequence
from typing import Any

from distill_api.spec.job_spec import Prompts
from distill_workers.data.entries import Entry
from distill_workers.data.findings import Findings
from distill_workers.data.rendering import Renderer, TeacherRenderer
from distill_workers.data.sample import Prompt
from distill_workers.environments.protocol import Message
from distill_workers.environments.tools import Tool
from distill_workers.failures import PromptError

MOST_TOOL_SETS = 64
"""Renderers kept with tools of their own: an agent has a few sets of tools, and names one with each request."""
PROBE_WORD = "Distillation-probe-7f3a91"
QUESTION: Message = {"role": "user", "content": "What is 1 plus 2?"}
PROBE: tuple[Message, ...] = (QUESTION, {"role": "assistant", "content": PROBE_WORD})
SAID = {
    "plain answers": "It is 3.",
    "thinking": "<think>\n1 plus 2 is 3.\n</think>\n\nIt is 3.",
    "white space around answers": " It is 3. \n",
}
"""What a template may write otherwise in an earlier turn of the assistant, and an example of it."""


class ConversationRenderer(Renderer):
    """The student's chat template and tokenizer, as the conversations of one source use them."""

    def __init__(self, prompts: Prompts, tokenizer: Any, tools: Sequence[Tool] | None) -> None:
        """Raises PromptError for a student that cannot take part in conversations, or has no place for tools."""
        if not prompts.apply_chat_template:
            raise PromptError("rollout.environment needs prompts.applyChatTemplate: true, which renders its messages")
        super().__init__(prompts, tokenizer, tools)
        self._prompts = prompts
        self._with_tools: dict[str, ConversationRenderer] = {}
        self._teachers = TeacherRenderer.of(prompts, tokenizer, tools)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._own_tokens = {*getattr(tokenizer, "all_special_ids", ()), *added}
        if tools is not None:
            without = Renderer(prompts, tokenizer).apply_template([QUESTION], "tools")
            if self.apply_template([QUESTION], "tools") == without:
                raise PromptError(
                    "the student's chat template has no place for tools; leave them out, and describe them in "
                    "prompts.systemPrompt"
                )
        self._answers: list[Message] = [{"role": "user", "content": "And 2 plus 2?"}]
        if tools is not None:
            self._answers.append({"role": "tool", "tool_call_id": "call-0-0", "name": "add", "content": "3"})
        self.turn_ends = {self._checked_turn_end(message) for message in self._answers}
        """Ids with which the template ends a turn of the student: engines must stop at them."""

    def with_tools(self, tools: Sequence[Tool]) -> "ConversationRenderer":
        """Return the renderer of the same source with other tools. Raises PromptError as for a new one."""
        name = json.dumps(tools)
        if name not in self._with_tools:
            made = ConversationRenderer(self._prompts, self._tokenizer, tools)
            if len(self._with_tools) >= MOST_TOOL_SETS:
                del self._with_tools[next(iter(self._with_tools))]
            self._with_tools[name] = made
        return self._with_tools[name]

    def opening(self, messages: list[Message], where: str) -> list[int]:
        """Return the ids of the messages that a conversation begins with. Raises PromptError."""
        [(_, ids)] = self.encode([Entry(where, messages, None, {})], Findings())
        return ids

    def privileged_opening(self, messages: list[Message], prompt: Prompt, where: str) -> list[int] | None:
        """Return the ids of the messages that the teacher is given in their place, with the fields of the prompt's row;
        None where it is given the same. Raises PromptError."""
        if self._teachers is None:
            return None
        entry = Entry(where, messages, prompt.answer, prompt.metadata, prompt.response)
        [(_, ids)] = self._teachers.encode([entry], Findings())
        return ids

    def continuation(self, messages: list[Message], where: str) -> list[int]:
        """Return the ids between the student's turn and its next: the end of its turn, which it may have sampled
        itself, the messages, and the beginning of the next turn. Raises PromptError."""
        return self._encoded(self._after_turn(messages, where), where)

    def text(self, ids: list[int], *, cut_off: bool = False) -> str:
        """Return the text of a turn of the student, whose last id is its end unless it was cut off."""
        return str(self._tokenizer.decode(ids if cut_off else ids[:-1], skip_special_tokens=False))

    def notes(self) -> list[str]:
        """Return a sentence about a template that writes earlier turns otherwise than the student did; else nothing."""
        rewritten = [
            what for what, said in SAID.items() if any(self._is_rewritten(said, message) for message in self._answers)
        ]
        if not rewritten:
            return []
        return [
            f"the student's chat template writes earlier turns otherwise than the student did "
            f"({', '.join(rewritten)}); in a conversation every turn stays as it was sampled, so the student reads "
            "what it wrote itself"
        ]

    def _after_turn(self, messages: list[Message], where: str) -> str:
        text = self.apply_template([*PROBE, *messages], where)
        _, found, after = text.partition(PROBE_WORD)
        if not found:
            raise PromptError("the student's chat template leaves out what the assistant says")
        return after

    def _checked_turn_end(self, message: Message) -> int:
        """Return the id that ends a turn. Raises PromptError where tokens of two turns could not be told apart."""
        where = f"a message of the role {message['role']}"
        after = self._encoded(self._after_turn([message], where), where)
        if not after or after[0] not in self._own_tokens:
            raise PromptError(
                "the student's chat template ends the assistant's turn with no token of its own, so a turn's tokens "
                "would depend on the next; an environment needs a template that does, such as <|im_end|>"
            )
        return after[0]

    def _is_rewritten(self, said: str, message: Message) -> bool:
        spoken: Message = {"role": "assistant", "content": said}
        where = "the preflight"
        whole = self._encoded(self.apply_template([QUESTION, spoken, message], where), where)
        opening = self._encoded(self.apply_template([QUESTION], where), where)
        return whole != [*opening, *self._encoded(said, where), *self.continuation([message], where)]

    def _encoded(self, text: str, where: str) -> list[int]:
        """Return the ids of a text that the template wrote. Raises PromptError."""
        [ids] = self._ids([text], [Entry(where, text, None, {})])
        return ids
