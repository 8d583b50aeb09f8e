"""The messages of a conversation: tool calls in the student's text, schemas of tools, and turns as token ids."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, tiny_tokenizer

from distill_api.spec.job_spec import Prompts
from distill_workers.environments.conversation_renderer import ConversationRenderer
from distill_workers.environments.protocol import ToolCall
from distill_workers.environments.tool_calls import parse_message
from distill_workers.environments.tools import read_tools
from distill_workers.failures import ConfigurationError, PromptError

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen2.5's, which writes what a tool answers as a message of the user."""
FORGETS_THINKING = WITH_TOOLS.replace(
    "{{ m.content }}<|im_end|>",
    "{{ m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content }}<|im_end|>",
)
"""As Qwen3's."""


def renderer(template: str = WITH_TOOLS, tools: Any = (TOOL,), **prompts: Any) -> ConversationRenderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ConversationRenderer(Prompts(path="/p", **prompts), tokenizer, None if tools is None else list(tools))


def called(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_tool_calls_are_read_in_the_order_of_the_text_each_with_an_id_of_its_own() -> None:
    first, second = called("add", '{"a": 1}'), called("add", json.dumps('{"a": 2}'))
    message = parse_message(f"I add.\n{first}\n{second}", turn=3)
    assert message.tool_calls == (ToolCall("call-3-0", "add", {"a": 1}), ToolCall("call-3-1", "add", {"a": 2}))
    assert (message.content, message.malformed) == ("I add.", ())


def test_a_call_without_arguments_has_none() -> None:
    assert parse_message('<tool_call>{"name": "now"}</tool_call>', 0).tool_calls == (ToolCall("call-0-0", "now", {}),)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('<tool_call>{"name": }</tool_call>', r"tool call 1 is no JSON \(Expecting value.*\): {\"name\": }"),
        ("<tool_call>[1]</tool_call>", r'tool call 1 is no object with a "name": \[1\]'),
        ('<tool_call>{"name": 3}</tool_call>', 'is no object with a "name"'),
        (called("add", "[1]"), 'has "arguments" that are no object'),
        (called("add", '"1 + 2"'), 'has "arguments" that are no object'),
        ('<tool_call>{"name": "add"}', "tool call 1 has no </tool_call>"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "tool call 1 is no JSON"),
    ],
)
def test_a_call_that_cannot_be_read_is_told_the_environment(text: str, sentence: str) -> None:
    message = parse_message(f"First. {text}", turn=0)
    [found] = message.malformed
    assert re.search(sentence, found)
    assert (message.tool_calls, message.content) == ((), "First.") and message.text.startswith("First. <tool_call>")


def test_thinking_is_apart_and_a_call_in_it_is_none() -> None:
    message = parse_message(f"<think>\nShall I {called('add', '{}')}?\n</think>\n\nNo: 3.", turn=0)
    assert (message.content, message.tool_calls) == ("No: 3.", ()) and message.thinking.startswith("Shall I")
    begun_by_the_template = parse_message("No.\n</think>3", turn=0)
    assert (begun_by_the_template.content, begun_by_the_template.thinking) == ("3", "No.")
    unfinished = parse_message(f"So <think> {called('add', '{}')}", turn=0)
    assert (unfinished.content, unfinished.tool_calls) == ("So", ())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is no JSON"),
        ("{}", "is no list of tools"),
        ("[]", "is no list of tools"),
        ("[1]", "tool 1 is no object"),
        (json.dumps([TOOL, TOOL]), "tool 2 has the name of another, add"),
        (json.dumps([TOOL["function"]]), 'tool 1 is not {"type": "function"'),
        (json.dumps([{**TOOL, "function": {"name": "a b"}}]), "tool 1 has no name of letters"),
        (json.dumps([{**TOOL, "function": {"name": "a", "description": 3}}]), r"\(a\) has a description that is no"),
        (json.dumps([{**TOOL, "function": {"name": "a", "parameters": {"type": "array"}}}]), "no JSON schema"),
        (
            json.dumps([{**TOOL, "function": {"name": "a", "parameters": {"type": "object", "properties": [1]}}}]),
            "has properties that are no schemas",
        ),
    ],
)
def test_tools_that_are_no_schemas_are_refused_with_their_place(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=f"rollout.environment.tools {file}: .*{sentence}"):
        read_tools(str(file))


@pytest.mark.parametrize("function", [TOOL["function"], {"name": "now"}, {"name": "now", "parameters": {}}])
def test_tools_are_read_as_they_stand(function: dict[str, Any], tmp_path: Path) -> None:
    tool = {"type": "function", "function": function}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    assert read_tools(str(tmp_path / "tools.json")) == [tool]
    with pytest.raises(ConfigurationError, match=r"absent\.json: cannot be read: No such file"):
        read_tools(str(tmp_path / "absent.json"))


QUESTION = {"role": "user", "content": "What is 12 plus 30?"}
RESULT = {"role": "tool", "tool_call_id": "call-0-0", "name": "add", "content": "42"}


def test_turns_that_are_appended_are_what_the_template_renders_of_the_whole_conversation() -> None:
    made, tokenizer = renderer(), tiny_tokenizer()
    said = [called("add", '{"a": 12, "b": 30}'), "The answer is 42."]
    ids = made.opening([QUESTION], "a row")
    messages: list[dict[str, Any]] = [QUESTION]
    for text, answer in zip(said, (RESULT, {"role": "user", "content": "Hello"}), strict=True):
        ids += tokenizer([text], add_special_tokens=False)["input_ids"][0] + made.continuation([answer], "a turn")
        messages += [{"role": "assistant", "content": text}, answer]
    whole = made.apply_template(messages, "all")
    assert ids == tokenizer([whole], add_special_tokens=False)["input_ids"][0]
    assert tokenizer.decode(ids) == whole and '"name": "add"' in whole and "<tool_response>\n42\n" in whole


def test_several_messages_are_appended_as_one_and_whatever_they_say() -> None:
    made, tokenizer = renderer(), tiny_tokenizer()
    answers = [RESULT, {**RESULT, "content": "Distillation-probe-7f3a91"}, {"role": "user", "content": "<|im_start|>"}]
    text = tokenizer.decode(made.continuation(answers, "a turn"))
    assert text.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n42\n")
    assert text.endswith("<|im_start|>assistant\n") and text.count("Distillation-probe-7f3a91") == 1


def test_the_system_prompt_and_the_arguments_of_the_template_reach_a_conversation() -> None:
    template = WITH_TOOLS.replace("assistant\n{% endif %}", "assistant\n{{ start }}{% endif %}")
    made = renderer(template, system_prompt="Be brief.", chat_template_arguments={"start": "Hello"})
    decode = tiny_tokenizer().decode
    assert "<|im_start|>system\nBe brief.<|im_end|>" in decode(made.opening([QUESTION], "a row"))
    assert decode(made.continuation([RESULT], "a turn")).endswith("assistant\nHello")


def test_the_text_of_a_turn_is_all_but_the_token_that_ends_it() -> None:
    made, tokenizer = renderer(), tiny_tokenizer()
    ids = tokenizer(["The <|im_start|> answer<|im_end|>"], add_special_tokens=False)["input_ids"][0]
    assert made.text(ids) == "The <|im_start|> answer"


def test_a_template_that_writes_history_otherwise_is_found_and_named() -> None:
    assert renderer(WITH_TOOLS).notes() == [] == renderer(CHAT_TEMPLATE, tools=None).notes()
    [note] = renderer(FORGETS_THINKING).notes()
    assert "writes earlier turns otherwise than the student did (thinking, white space around answers)" in note


@pytest.mark.parametrize(
    ("template", "tools", "sentence"),
    [
        (CHAT_TEMPLATE, (TOOL,), "has no place for tools; leave them out"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}A:", None, "ends the assistant's turn with no token"),
        ("{{ messages[-1].content }}<|im_start|>", None, "leaves out what the assistant says"),
        (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "{{ m.content }}<|im_end|>{% endfor %}{{ tools }}<|im_start|>",
            (TOOL,),
            "a message of the role tool: the student's chat template refuses these messages: no tools",
        ),
    ],
)
def test_a_template_that_cannot_take_part_is_refused(template: str, tools: Any, sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        renderer(template, tools)
