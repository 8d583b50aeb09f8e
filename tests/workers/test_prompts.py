"""Prompts are read as they are meant, every fault names its place, and the cursor continues where it was."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer

from distill_api.spec import Prompts
from distill_workers.prompts import Cursor, PromptError, load_prompts
from distill_workers.sample import Prompt


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def load(path: Path, tokenizer: Any, *, limit: int | None = None, longest: int = 200, **fields: Any) -> list[Prompt]:
    return load_prompts(Prompts(path=str(path), **fields), tokenizer, longest, limit)


def test_a_text_goes_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "1+1?", "label": 2, "source": "x"})
    [prompt] = load(file, tokenizer, answer_field="label", system_prompt="Be brief.")
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt.ids) == prompt.text
    assert (prompt.answer, prompt.metadata) == ("2", {"source": "x"})


def test_chat_messages_are_a_prompt_too(tmp_path: Path, tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    [prompt] = load(write(tmp_path / "p.jsonl", {"prompt": messages}), tokenizer)
    assert prompt.text.count("<|im_start|>") == 4


def test_without_a_template_the_text_is_taken_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    [prompt] = load(write(tmp_path / "p.jsonl", {"prompt": "Hello"}), tokenizer, apply_chat_template=False)
    assert prompt.text == "Hello" and tokenizer.decode(prompt.ids) == "Hello"


def test_a_folder_is_all_its_files_in_order_and_blank_lines_are_nothing(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "three"})
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    texts = [p.text for p in load(tmp_path, tokenizer, apply_chat_template=False)]
    assert texts == ["one", "two", "three"]


def test_over_long_prompts_are_left_out_and_counted(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "x" * 500}, {"prompt": "short"})
    prompts = load(file, tokenizer, longest=50)
    assert [p.index for p in prompts] == [1]
    assert "1 of 2 prompts left out, longer than rollout.maxPromptTokens 50" in caplog.text


def test_only_the_first_prompts_are_read_where_a_limit_is_set(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken')
    assert len(load(file, tokenizer, limit=2)) == 2


@pytest.mark.parametrize(
    ("content", "fields", "sentence"),
    [
        (b"", {}, "p.jsonl: has no prompts"),
        (
            b'{"prompt": "a"}\n{"question": "b"}',
            {},
            r"p.jsonl:2: has no field prompt \(prompts.promptField\); it has question",
        ),
        (b'{"prompt": "a"}', {"answer_field": "label"}, r"p.jsonl:1: has no field label \(prompts.answerField\)"),
        (b'{"prompt": 5}', {}, "p.jsonl:1: field prompt is a number; allowed are a string and a list of"),
        (b'{"prompt": [{"role": "user"}]}', {}, "p.jsonl:1: field prompt is a list; allowed are"),
        (b'{"prompt": null}', {}, "p.jsonl:1: field prompt is null; allowed are"),
        (b'{"prompt": " "}', {}, "p.jsonl:1: field prompt is empty"),
        (b'{"prompt": "a", "l": [1]}', {"answer_field": "l"}, "field l is a list; allowed are a string and a number"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', {}, "p.jsonl:2: byte 12 is not UTF-8"),
        (b'{"prompt": "a"\n', {}, "p.jsonl:1: is not JSON"),
        (b'["a"]', {}, "p.jsonl:1: is a list; each line must be one JSON object"),
        (b'{"prompt": "%s"}' % (b"x" * 900), {}, "all 1 prompts are longer than rollout.maxPromptTokens 200; raise it"),
    ],
)
def test_a_fault_names_file_line_field_and_what_is_allowed(
    tmp_path: Path, tokenizer: Any, content: bytes, fields: dict[str, Any], sentence: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(PromptError, match=sentence):
        load(file, tokenizer, **fields)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"nothing\.jsonl: does not exist"):
        load(tmp_path / "nothing.jsonl", tokenizer)
    with pytest.raises(PromptError, match=r"has no \*\.jsonl file"):
        load(tmp_path, tokenizer)


def test_a_model_without_a_chat_template_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match=r"no chat template; set prompts\.applyChatTemplate: false"):
        load(write(tmp_path / "p.jsonl", {"prompt": "a"}), tokenizer)


def gym(**fields: Any) -> Prompts:
    return Prompts.model_validate({"reasoningGym": {"task": "chain_sum", "size": 5, **fields}})


def test_reasoning_gym_makes_the_same_prompts_for_the_same_seed(tokenizer: Any) -> None:
    first = load_prompts(gym(seed=3), tokenizer, 500, None)
    assert first == load_prompts(gym(seed=3), tokenizer, 500, None)
    assert first != load_prompts(gym(seed=4), tokenizer, 500, None)
    assert len(first) == 5 and all(p.answer for p in first)


@pytest.mark.parametrize(
    "fields", [{"task": "no_such_task"}, {"options": {"no_such": 1}}, {"options": {"min_terms": 0}}]
)
def test_a_wrong_task_or_option_is_named(tokenizer: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"reasoningGym\.task"):
        load_prompts(gym(**fields), tokenizer, 500, None)


PROMPTS = [Prompt(index=i, ids=[i], text=str(i)) for i in range(7)]


def indices(cursor: Cursor, count: int) -> list[int]:
    return [p.index for p in cursor.next(count)]


def test_each_epoch_has_every_prompt_once_in_another_order() -> None:
    cursor = Cursor(PROMPTS, seed=1, shuffle=True)
    epochs = [indices(cursor, 7) for _ in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert indices(Cursor(PROMPTS, seed=1, shuffle=True), 7) == epochs[0]
    assert indices(Cursor(PROMPTS, seed=2, shuffle=True), 7) != epochs[0]


def test_without_shuffling_the_order_is_that_of_the_file() -> None:
    assert indices(Cursor(PROMPTS, seed=1, shuffle=False), 9) == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_a_restored_cursor_goes_on_where_it_was() -> None:
    cursor = Cursor(PROMPTS, seed=1, shuffle=True)
    cursor.next(10)
    state = json.loads(json.dumps(cursor.state()))
    rest = indices(cursor, 12)
    other = Cursor(PROMPTS, seed=1, shuffle=True)
    other.restore(state)
    assert indices(other, 12) == rest


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(PromptError, match="made with 7 prompts and there are 3 now"):
        Cursor(PROMPTS[:3], seed=1, shuffle=True).restore(Cursor(PROMPTS, seed=1, shuffle=True).state())


def test_peeking_moves_nothing() -> None:
    cursor = Cursor(PROMPTS, seed=1, shuffle=True)
    before = cursor.state()
    assert [p.index for p in cursor.peek(2)] == [0, 1]
    assert cursor.state() == before
