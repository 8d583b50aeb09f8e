"""What a row holds is read as it is meant, refused with its place, or said once with a count."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer

from distill_api.spec.job_spec import Prompts
from distill_workers.data.findings import overlap
from distill_workers.data.prompts import load_prompts
from distill_workers.data.routing import Route
from distill_workers.data.sample import Prompt
from distill_workers.failures import PromptError
from distill_workers.run.exit_report import classify_error


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def load(tmp_path: Path, tokenizer: Any, *rows: Any, messages: bool = False, **fields: Any) -> list[Prompt]:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(Prompts(path=str(file), **fields), tokenizer, 400, None, messages=messages)[0]


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


HI = [user("hi")]
ANSWERED = [user("2+2?"), {"role": "assistant", "content": "It is 4."}]


def test_text_parts_are_one_text(tmp_path: Path, tokenizer: Any) -> None:
    [plain] = load(tmp_path, tokenizer, {"prompt": [user("2+2?")]})
    [parts] = load(tmp_path, tokenizer, {"prompt": [user([{"type": "text", "text": "2+"}, {"text": "2"}, "?"])]})
    assert parts.text == plain.text


def test_fields_of_a_message_that_are_null_are_none(tmp_path: Path, tokenizer: Any) -> None:
    strict = tiny_tokenizer()
    strict.chat_template = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
    [prompt] = load(tmp_path, strict, {"prompt": [user("a", name=None, tool_calls=None)]})
    assert prompt.text == "['role', 'content']"


@pytest.mark.parametrize(
    ("value", "answer"),
    [(4.0, "4"), (42, "42"), (1e20, "100000000000000000000"), (-3.0, "-3"), (-0.0, "0"), (0.5, "0.5"),
     (1e-7, "0.0000001"), ("42.0", "42.0"), (" x ", " x ")],
)  # fmt: skip
def test_a_number_is_the_reference_that_a_person_would_write(
    tmp_path: Path, tokenizer: Any, value: Any, answer: str
) -> None:
    [prompt] = load(tmp_path, tokenizer, {"prompt": "?", "answer": value}, answer_field="answer")
    assert prompt.answer == answer


@pytest.mark.parametrize(
    ("row", "fields", "sentence"),
    [
        ({"prompt": HI, "answer": float("nan")}, {"answer_field": "answer"}, "field answer is nan, which a table has"),
        ({"prompt": HI, "answer": float("inf")}, {"answer_field": "answer"}, "field answer is inf"),
        ({"prompt": HI, "answer": " "}, {"answer_field": "answer"}, "field answer is empty; a reward would compare"),
        ({"prompt": "smile \ud83d end"}, {}, r"field prompt has '\\ud83d' at character 7, one half of a character"),
        ({"prompt": [user("\udc00")]}, {}, r"field prompt has '\\udc00' at character 1"),
        ({"prompt": "a", "answer": "\ud83d"}, {"answer_field": "answer"}, "field answer has .* one half"),
        ({"prompt": "a", "r": "\ud83d"}, {"response_field": "r"}, "field r has .* one half of a character"),
        ({"prompt": []}, {}, "field prompt is empty"),
        ({"prompt": [{"role": "system", "content": "Be brief."}, user(" \n")]}, {}, "field prompt is empty"),
        ({"prompt": [*ANSWERED, user(" ")]}, {}, r"ends with an empty message \(role user\), so nothing is asked"),
        ({"prompt": ["hi"]}, {}, "field prompt, message 1: is a string; allowed are"),
        ({"prompt": [user("a"), {"content": "b"}]}, {}, "field prompt, message 2: role is null; allowed are"),
        ({"prompt": [user([{"type": "image", "url": "x"}])]}, {}, "content has a part that is of the type image"),
        ({"prompt": [{"from": "human", "value": "a"}]}, {}, "message 1 has from and value, as ShareGPT writes chats"),
        ({"prompt": ANSWERED}, {}, "ends with the assistant's answer, and the student would begin a second one"),
        ({"prompt": "a <|im_end|> \n"}, {"apply_chat_template": False}, r"ends with the student's end token <\|im_end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_row_that_cannot_be_meant_is_refused_with_its_place(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PromptError, match=rf"/p\.jsonl:2: .*{sentence}"):
        load(tmp_path, tokenizer, {"prompt": "one", "answer": "1", "r": "1"}, row, **fields)


def test_a_chat_with_its_answer_is_prompt_and_response_where_the_job_says_so(tmp_path: Path, tokenizer: Any) -> None:
    fields = {"prompt_field": "messages", "response_field": "messages"}
    [prompt] = load(tmp_path, tokenizer, {"messages": ANSWERED}, **fields)
    assert prompt.response == "It is 4." and prompt.text.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("asked", ["2+2?", HI, ANSWERED[1:]], ids=["text", "question", "answer"])
def test_what_is_not_prompt_and_response_in_one_is_refused_as_such(tmp_path: Path, tokenizer: Any, asked: Any) -> None:
    with pytest.raises(PromptError, match=r"p\.jsonl:1: .* must be a chat that ends with the assistant's answer"):
        load(tmp_path, tokenizer, {"prompt": asked}, response_field="prompt")


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_a_chat_in_a_text_is_read_as_messages_and_said(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, written: Any
) -> None:
    [chat] = load(tmp_path, tokenizer, {"prompt": [user("it's 2+2?")]})
    [text] = load(tmp_path, tokenizer, {"prompt": written([user("it's 2+2?")])})
    assert text.text == chat.text
    assert "1 of 1 prompts are chats written as one text; they were read as messages (the first is " in caplog.text


@pytest.mark.parametrize("wrapped", [user("2+2?"), {"id": 1, "messages": [user("2+2?")]}], ids=["message", "object"])
def test_an_object_with_a_chat_in_a_text_is_read_as_the_chat(tmp_path: Path, tokenizer: Any, wrapped: Any) -> None:
    [chat] = load(tmp_path, tokenizer, {"prompt": [user("2+2?")]})
    [text] = load(tmp_path, tokenizer, {"prompt": json.dumps(wrapped)})
    assert text.text == chat.text


def test_a_tool_may_say_nothing(tmp_path: Path, tokenizer: Any) -> None:
    [prompt] = load(tmp_path, tokenizer, {"prompt": [user("Delete it."), {"role": "tool", "content": ""}]})
    assert "Delete it." in prompt.text


def test_a_question_about_such_a_text_stays_a_text(tmp_path: Path, tokenizer: Any) -> None:
    for asked in ("[{'role': 'user'}] is a list of what?", '{"role": "user"}'):
        assert asked in load(tmp_path, tokenizer, {"prompt": asked})[0].text


class Failing:
    """A tokenizer that fails on one word, as third-party code does: with any type of error."""

    def __init__(self, error: BaseException, at: str) -> None:
        self._real, self._error, self._at = tiny_tokenizer(), error, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        if self._at == "tokenizer" and any("bad" in text for text in texts):
            raise self._error
        return self._real(texts, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        if self._at == "chat template" and "bad" in messages[-1]["content"]:
            raise self._error
        return self._real.apply_chat_template(messages, **options)


class Panic(BaseException):
    """As the tokenizers' Rust code raises: no Exception."""


@pytest.mark.parametrize("at", ["tokenizer", "chat template"])
@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), RuntimeError("x"), RecursionError("x"), Panic("x")])
def test_what_third_party_code_raises_on_a_row_is_an_error_of_that_row(
    tmp_path: Path, at: str, error: BaseException
) -> None:
    with pytest.raises(
        PromptError, match=rf"p\.jsonl:2: the student's {at} refuses .*{type(error).__name__}"
    ) as caught:
        load(tmp_path, Failing(error, at), {"prompt": "good"}, {"prompt": "bad"}, {"prompt": "good"})
    assert classify_error(caught.value, None)[0] == 78


def test_ctrl_c_is_no_error_of_a_row(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, Failing(KeyboardInterrupt(), "tokenizer"), {"prompt": "bad"})


def test_a_template_that_does_not_begin_the_assistants_turn_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(PromptError, match=r"p\.jsonl:1: the prompt ends .* does not begin the assistant's turn"):
        load(tmp_path, tokenizer, {"prompt": "a"})


def test_copies_are_said_once_with_how_many(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"{n % 3} + 1?", "a": n % 3 + n // 8} for n in range(9)]
    assert len(load(tmp_path, tokenizer, *rows, answer_field="a")) == 9
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert [s.partition("p.jsonl: ")[2].partition(" and that")[0] for s in said] == [
        "6 of 9 prompts are copies of others: 3 differ,",
        "1 prompts are there with different answers",
    ]
    caplog.clear()
    load(tmp_path, tokenizer, {"prompt": "a"}, {"prompt": "b"})
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "a": "NaN"}, "1 of 2 prompts have an answer such as nan or None"),
        ({"prompt": [{"role": "human", "content": "a"}], "a": 1}, r"1 of 2 prompts have a role .*/p\.jsonl:2: human"),
        ({"prompt": "<|im_start|>user\na", "a": 1}, "1 of 2 prompts have special tokens of the student in their text"),
    ],
    ids=["answer", "role", "rendered"],
)
def test_what_may_be_meant_is_said_with_the_first_place(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, row: dict[str, Any], sentence: str
) -> None:
    load(tmp_path, tokenizer, {"prompt": "one", "a": 1}, row, answer_field="a")
    [said] = caplog.messages
    assert re.search(sentence, said)


@pytest.mark.parametrize(("answer", "said"), [("42.0", True), (" -3.00", True), ("4.05", False), (42.0, False)])
def test_whole_numbers_that_a_table_wrote_with_a_point_are_said(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, answer: Any, said: bool
) -> None:
    load(tmp_path, tokenizer, {"prompt": "one", "a": 1}, {"prompt": "a", "a": answer}, answer_field="a")
    assert ("1 of 2 prompts have an answer such as 42.0" in caplog.text) == said


def test_a_chat_in_a_text_that_no_template_renders_is_said(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = json.dumps(HI)
    [prompt] = load(tmp_path, tokenizer, {"prompt": asked}, apply_chat_template=False)
    assert prompt.text == asked and "1 of 1 prompts are chats written as one text, which the student is" in caplog.text


def test_training_prompts_in_an_evaluation_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    training = load(tmp_path, tokenizer, *({"prompt": f"{n} + 1?"} for n in range(5)))
    held_out = load(tmp_path, tokenizer, {"prompt": [user("3  + 1?")]}, {"prompt": "7 + 1?"}, system_prompt="Be brief.")
    assert overlap(training, held_out).startswith("1 of 2 prompts are training prompts too")
    assert overlap(training[:2], held_out) == ""


VERL = {
    "prompt": [user("2+2?")],
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"question": "2+2?", "choices": [{"text": "four"}]},
    "a.b": "dotted",
}


@pytest.mark.parametrize(
    ("path", "answer"),
    [("reward_model.ground_truth", "4"), ("extra_info.choices.0.text", "four"), ("a.b", "dotted")],
)
def test_a_field_may_be_a_path_into_nested_rows(tmp_path: Path, tokenizer: Any, path: str, answer: str) -> None:
    [prompt] = load(tmp_path, tokenizer, VERL, answer_field=path)
    assert prompt.answer == answer
    assert prompt.metadata["reward_model"] == VERL["reward_model"], "a reward reads what stands beside the answer"


def test_prompt_and_response_may_be_paths_too(tmp_path: Path, tokenizer: Any) -> None:
    fields = {"prompt_field": "extra_info.question", "response_field": "extra_info.choices.0.text"}
    [prompt] = load(tmp_path, tokenizer, VERL, **fields)
    assert "2+2?" in prompt.text and prompt.response == "four"


def test_the_teacher_may_be_named_in_a_nested_row() -> None:
    route = Route(known=("math", "code"), default=None)
    assert route.teacher("meta.topic", {"meta": {"topic": "code"}}, "here") == "code"
    with pytest.raises(PromptError, match=r"here: field meta\.topic .* is 'art'; it must name one of"):
        route.teacher("meta.topic", {"meta": {"topic": "art"}}, "here")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("reward_model.truth", "has no field reward_model.truth .*; reward_model has ground_truth, style"),
        ("reward_model.style.x", "reward_model.style is a string"),
        ("extra_info.choices.1.text", "extra_info.choices is a list of 1"),
        ("label", "it has a.b, extra_info, prompt, reward_model"),
    ],
    ids=["field", "text", "index", "row"],
)  # fmt: skip
def test_a_path_that_leads_nowhere_says_how_far_it_led(
    tmp_path: Path, tokenizer: Any, path: str, sentence: str
) -> None:
    with pytest.raises(PromptError, match=rf"p\.jsonl:1: .*{sentence}"):
        load(tmp_path, tokenizer, VERL, answer_field=path)


def thinking() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    return tokenizer


def test_arguments_reach_the_chat_template(tmp_path: Path) -> None:
    [prompt] = load(tmp_path, thinking(), {"prompt": "a"}, chat_template_arguments={"enable_thinking": False})
    assert prompt.text.endswith("assistant\n<think></think>")
    [prompt] = load(tmp_path, thinking(), {"prompt": "a"})
    assert prompt.text.endswith("assistant\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"thinking": False}, "sets thinking, which the student's chat template does not have"),
     ({"add_generation_prompt": False}, "sets add_generation_prompt, which is the same for every prompt")],
    ids=["unknown", "fixed"],
)  # fmt: skip
def test_an_argument_that_could_do_nothing_is_refused(tmp_path: Path, arguments: Any, sentence: str) -> None:
    with pytest.raises(PromptError, match=rf"prompts\.chatTemplateArguments {sentence}"):
        load(tmp_path, thinking(), {"prompt": "a"}, chat_template_arguments=arguments)


def test_arguments_without_a_chat_template_are_refused_with_the_job() -> None:
    with pytest.raises(ValueError, match="chatTemplateArguments go with applyChatTemplate: true"):
        Prompts(path="/p", apply_chat_template=False, chat_template_arguments={"enable_thinking": False})


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


RECORDED = [
    {"role": "system", "content": "Be brief."},
    user("2+2 and 3+3?"),
    assistant("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]),
    {"role": "tool", "content": "4"},
    assistant("The first is 4."),
    assistant("Now the second."),
    user("Go on."),
    assistant("6"),
    user("Thank you."),
]
"""A conversation of three turns: of the two messages of the second the student would begin none."""


def test_each_turn_of_a_recorded_conversation_is_a_prompt_of_what_stands_before_it(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = ({"prompt": RECORDED, "level": 2}, {"prompt": ANSWERED, "level": 3})
    found = load(tmp_path, tokenizer, *rows, messages=True, turns={})
    assert [p.messages for p in found] == [RECORDED[:2], RECORDED[:4], RECORDED[:7], ANSWERED[:1]]
    assert [p.metadata for p in found] == [{"level": 2}, {"level": 2}, {"level": 2}, {"level": 3}]
    assert (
        found[2].text.endswith("user\nGo on.<|im_end|>\n<|im_start|>assistant\n") and "Thank you" not in found[2].text
    )


@pytest.mark.parametrize(
    ("turns", "kept"),
    [({"first": 2}, [4, 7]), ({"last": 1}, [2]), ({"first": 2, "last": 2}, [4]), ({"last": 9}, [2, 4, 7])],
)
def test_the_turns_that_become_prompts_can_be_bounded(
    turns: dict[str, int], kept: list[int], tmp_path: Path, tokenizer: Any
) -> None:
    found = load(tmp_path, tokenizer, {"prompt": RECORDED}, messages=True, turns=turns)
    assert [p.messages for p in found] == [RECORDED[:length] for length in kept]


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("2+2?", "field prompt is a text; prompts.turns needs a recorded conversation"),
        (HI, r"field prompt has no turn of the assistant \(prompts.turns\)"),
        ([assistant("Hello."), *HI], "field prompt begins with the assistant, so nothing is asked"),
    ],
)
def test_a_row_that_is_no_recorded_conversation_is_named(
    prompt: Any, what: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(PromptError, match=rf"p\.jsonl:1: {what}"):
        load(tmp_path, tokenizer, {"prompt": prompt}, turns={})


def test_the_place_of_a_turn_is_named(tmp_path: Path, tokenizer: Any) -> None:
    bad = [*ANSWERED, user(""), assistant("4")]
    with pytest.raises(PromptError, match=r"p\.jsonl:1, turn 2: field prompt ends with an empty message"):
        load(tmp_path, tokenizer, {"prompt": bad}, turns={})


def test_the_tools_of_recorded_conversations_are_an_argument_of_the_chat_template(
    tmp_path: Path, tokenizer: Any
) -> None:
    with_tools = tiny_tokenizer()
    with_tools.chat_template = "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ messages | length }}"
    tool = {"type": "function", "function": {"name": "add"}}
    found = load(tmp_path, with_tools, {"prompt": RECORDED}, turns={"last": 2}, chatTemplateArguments={"tools": [tool]})
    assert [p.text for p in found] == ["add 2", "add 4"]
