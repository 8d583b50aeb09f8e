"""Student and teacher that end, or begin, their turns differently are told apart by their files."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_workers.run.model_agreement import Ends, ModelsDisagree, ends, same_template, stop_ids

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None = CHATML, eos: str = "<|endoftext|>") -> Any:
    words = {word: i for i, word in enumerate([*SPECIAL, "[UNK]"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, additional_special_tokens=SPECIAL[1:])
    made.chat_template = template
    return made


def model(folder: Path, generation: Any, config: Any = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def test_a_base_model_learns_to_end_its_turn_as_its_teacher_does(tmp_path: Path) -> None:
    """Qwen's base models name <|endoftext|> alone, their template and their teachers end a turn by <|im_end|>."""
    student = ends(model(tmp_path / "base", 0, 0), tokenizer())
    teacher = ends(model(tmp_path / "instruct", [2, 0], 2), tokenizer(eos="<|im_end|>"))
    assert student == Ends(frozenset({0}), 2)
    assert stop_ids(student, teacher) == [0, 2]


def test_two_models_with_no_end_in_common_are_refused_with_both(tmp_path: Path) -> None:
    student = ends(model(tmp_path / "a", 0), tokenizer(None))
    teacher = ends(model(tmp_path / "b", [1]), tokenizer(None, "<|im_start|>"))
    with pytest.raises(ModelsDisagree, match=r"student's responses end by the ids \[0\] and the teacher's by \[1\]"):
        stop_ids(student, teacher)


def test_an_end_of_turn_that_no_model_stops_at_is_no_end(tmp_path: Path) -> None:
    found = ends(model(tmp_path / "a", 0), tokenizer())
    assert stop_ids(found, found) == [0]


def test_a_model_without_generation_config_ends_by_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ends(tmp_path, tokenizer(None, "<|im_end|>")) == Ends(frozenset({2}), None)


def test_equal_templates_agree_and_their_text_need_not_be_equal() -> None:
    same_template(tokenizer(), tokenizer(CHATML.replace("{% endfor %}", "{# a comment #}{% endfor %}")))
    same_template(tokenizer(None), tokenizer(None))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (CHATML.replace(" | trim", ""), "  What is 2"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "<think>"),
        ("{{ 'Be kind.' }}" + CHATML, "Be kind"),
        (None, "the teacher has no chat template and the student has one"),
    ],
    ids=["white space", "thinking", "a system prompt of its own", "none"],
)
def test_templates_that_differ_are_refused_with_the_place(theirs: str | None, message: str) -> None:
    with pytest.raises(ModelsDisagree, match=message):
        same_template(tokenizer(), tokenizer(theirs))


def test_a_template_that_refuses_a_system_message_is_compared_without() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    same_template(tokenizer(refuses), tokenizer(refuses))
    with pytest.raises(ModelsDisagree):
        same_template(tokenizer(refuses), tokenizer(refuses.replace(" | trim", "")))
