"""Student and teacher that end, or begin, their turns differently are told apart by their files."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_api.spec.job_spec import Spec
from distill_workers.engine.request import Request
from distill_workers.failures import ConfigurationError
from distill_workers.run.preflight.chat_template import same_special_tokens, same_thinking
from distill_workers.run.preflight.model_agreement import (
    Agreement,
    Ends,
    ModelsDisagree,
    check_models,
    ends,
    load_tokenizer,
    same_template,
    stop_ids,
)
from distill_workers.run.preflight.model_limits import limits

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
    same_template(tokenizer(None), tokenizer())  # prompts of a student without one are plain texts


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (CHATML.replace(" | trim", ""), "  What is 2"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "<think>"),
        ("{{ 'Be kind.' }}" + CHATML, "Be kind"),
        (None, "the student has a chat template and the teacher has none"),
    ],
    ids=["white space", "thinking", "a system prompt of its own", "none"],
)
def test_templates_that_differ_are_refused_with_the_place(theirs: str | None, message: str) -> None:
    with pytest.raises(ModelsDisagree, match=message):
        same_template(tokenizer(), tokenizer(theirs))


def test_a_template_that_refuses_a_system_message_is_compared_without() -> None:
    same_template(tokenizer(NO_SYSTEM), tokenizer(NO_SYSTEM))
    with pytest.raises(ModelsDisagree):
        same_template(tokenizer(NO_SYSTEM), tokenizer(NO_SYSTEM.replace(" | trim", "")))


ONE_QUESTION = "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}" + CHATML
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def test_templates_are_compared_by_what_the_students_renders() -> None:
    same_template(tokenizer(ONE_QUESTION), tokenizer())
    same_template(tokenizer(NO_SYSTEM), tokenizer())
    with pytest.raises(ModelsDisagree, match="  What is 2"):
        same_template(tokenizer(ONE_QUESTION), tokenizer(CHATML.replace(" | trim", "")))


@pytest.mark.parametrize("teacher", [ONE_QUESTION, NO_SYSTEM])
def test_a_teacher_whose_template_refuses_what_the_students_renders_is_refused(teacher: str) -> None:
    with pytest.raises(ModelsDisagree, match=r"refuses a conversation \(roles system, user, assistant, user\)"):
        same_template(tokenizer(), tokenizer(teacher))


def spec(teacher: Path, **rollout: Any) -> Spec:
    return Spec.model_validate(
        {
            "student": {"model": "/models/student"},
            "teacher": {"model": str(teacher)},
            "data": {"prompts": {"path": "/data"}},
            "schedule": {"steps": 1},
            "rollout": rollout,
        }
    )


def saved(folder: Path, of: Any, generation: Any) -> Path:
    of.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def test_the_engines_are_told_the_ends_that_the_student_lacks(tmp_path: Path) -> None:
    student = saved(tmp_path / "base", tokenizer(), 0)
    teacher = saved(tmp_path / "instruct", tokenizer(eos="<|im_end|>"), [2, 0])
    mine = load_tokenizer(student, "spec.student.model", trust_remote_code=False)
    assert check_models(spec(teacher), student, mine) == Agreement((2,), [])
    assert check_models(spec(teacher, stopTokenIds=[3]), student, mine) == Agreement((3,), [])
    assert Request([1], 0, 8, stop_token_ids=(2,)).sampling()["stop_token_ids"] == [2]
    assert "stop_token_ids" not in Request([1], 0, 8).sampling()


def test_a_reference_need_not_know_conversations_but_must_have_their_tokens(tmp_path: Path) -> None:
    """The model that the teacher was trained from has no chat template, and ends by another token."""
    student, teacher = saved(tmp_path / "student", tokenizer(), 0), saved(tmp_path / "teacher", tokenizer(), 0)
    base = saved(tmp_path / "base", tokenizer(None), 1)
    job = spec(teacher).model_dump(by_alias=True, exclude_unset=True)
    teachers = [{"name": n, "model": str(folder)} for n, folder in (("expert", teacher), ("base", base))]
    objective = {"reference": "base", "extrapolation": 1.5}
    job |= {"teacher": None, "teachers": teachers, "objective": objective}
    job["data"]["defaultTeacher"] = "expert"
    with_reference = Spec.model_validate(job)
    assert check_models(with_reference, student, tokenizer()) == Agreement((), [])
    taught = Spec.model_validate({**job, "objective": {}})
    with pytest.raises(ModelsDisagree, match="the teacher has none"):
        check_models(taught, student, tokenizer())
    words = {word: i for i, word in enumerate([*SPECIAL[:2], "[UNK]"])}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), eos_token=SPECIAL[0]
    )
    saved(base, other, 0)
    with pytest.raises(ModelsDisagree, match="SpecialTokens"):
        check_models(with_reference, student, tokenizer())


def test_templates_are_compared_with_the_arguments_that_the_job_gives_them(tmp_path: Path) -> None:
    """A teacher that is asked for a short answer where the job says so, and a student that is not."""
    student, quiet = tokenizer(CHATML + "{# terse #}"), "{% if terse %}<brief>{% endif %}"
    teacher = saved(tmp_path / "teacher", tokenizer(CHATML + quiet), 0)
    mine = saved(tmp_path / "student", student, 0)
    plain = spec(teacher)
    assert check_models(plain, mine, student) == Agreement((), [])
    prompts = plain.data.prompts.model_copy(update={"chat_template_arguments": {"terse": True}})  # type: ignore[union-attr]
    off = plain.model_copy(update={"data": plain.data.model_copy(update={"prompts": prompts})})
    with pytest.raises(ModelsDisagree, match="<brief>"):
        check_models(off, mine, student)


@pytest.mark.parametrize(
    ("student", "teacher", "arguments", "refused"),
    [
        ("{% if hybrid %}THINKS{% endif %}", "{# hybrid #}", {"hybrid": True}, True),
        ("{% if not single %}THINKS{% endif %}", "{# single #}", {"single": True}, False),
        ("THINKS", "OFF", {"enable_thinking": False}, False),
        ("THINKS", "", {"enable_thinking": True}, True),
    ],
)
def test_thinking_modes_are_compared_with_the_arguments_that_the_job_gives(
    student: str, teacher: str, arguments: dict[str, bool], refused: bool, tmp_path: Path
) -> None:
    """One that is told not to think is asked by a prompt that says so, and the teacher is shown that prompt."""

    def template(mode: str) -> str:
        off = "{% if enable_thinking is defined and enable_thinking is false %}<no>{% endif %}"
        return CHATML.replace("assistant\n", "assistant\n" + mode.replace("THINKS", off).replace("OFF", "<no>"))

    folder = saved(tmp_path / "teacher", tokenizer(template(teacher)), 0)
    mine = saved(tmp_path / "student", tokenizer(template(student)), 0)
    job = spec(folder)
    prompts = job.data.prompts.model_copy(update={"chat_template_arguments": arguments})  # type: ignore[union-attr]
    job = job.model_copy(update={"data": job.data.model_copy(update={"prompts": prompts})})
    with pytest.raises(ModelsDisagree, match="ThinkingMode") if refused else contextlib.nullcontext():
        check_models(job, mine, tokenizer(template(student)))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"model": "/models/elsewhere"}, r"its files \(/models/elsewhere\) are not on the trainer's machine"),
        ({"model": "Qwen/Qwen3-8B"}, r"its files \(Qwen/Qwen3-8B\) are not on the trainer's machine"),
        ({"endpoint": {"url": "http://t:1"}}, "no file of an endpoint's model is here"),
    ],
    ids=["another machine", "hub", "endpoint"],
)
def test_a_teacher_whose_files_are_elsewhere_is_noted_as_not_compared(
    teacher: dict[str, Any], said: str, tmp_path: Path
) -> None:
    student = saved(tmp_path / "base", tokenizer(), 0)
    job = Spec.model_validate({**spec(Path("/t")).model_dump(mode="json", by_alias=True), "teacher": teacher})
    agreement = check_models(job, student, tokenizer())
    [note] = agreement.notes
    assert agreement.stop_token_ids == () and re.match(
        f"ModelsNotCompared: how teacher .* not known, as {said}; ", note
    )


@pytest.mark.parametrize(
    ("teacher", "stop", "noted"),
    [([0], [], True), ([2, 0], [], False), ([0], [2], False)],
    ids=["base teacher", "instruct teacher", "the job says"],
)
def test_an_end_of_turn_that_the_teacher_does_not_end_by_is_noted(
    teacher: list[int], stop: list[int], noted: bool, tmp_path: Path
) -> None:
    """An instruct student of a base teacher: both end by <|endoftext|>, which the student never says."""
    mine = saved(tmp_path / "instruct", tokenizer(), [2, 0])
    theirs = saved(tmp_path / "teacher", tokenizer(), teacher)
    notes = check_models(spec(theirs, stopTokenIds=stop), mine, tokenizer()).notes
    assert [note[:54] for note in notes] == ["StopTokens: the student ends its turns by the id 2, an"] * noted


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("generation_config.json", '{"eos_token_id": ', "cannot be read: .*; copy the model again"),
        ("generation_config.json", "[]", "is no JSON object"),
        ("generation_config.json", '{"eos_token_id": ["2"]}', r"eos_token_id is \['2'\]; it must be a token id"),
    ],
)
def test_a_damaged_file_of_either_model_is_a_configuration_error_that_names_it(
    file: str, text: str, said: str, tmp_path: Path
) -> None:
    whole, damaged = (saved(tmp_path / name, tokenizer(), 0) for name in ("whole", "damaged"))
    (damaged / file).write_text(text)
    for student, teacher in ((whole, damaged), (damaged, whole)):
        with pytest.raises(ConfigurationError, match=f"/damaged/{file}:? {said}"):
            check_models(spec(teacher), student, tokenizer())
    (damaged / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"/damaged/config\.json cannot be read: .*; copy the model again"):
        check_models(spec(whole), damaged, tokenizer())


def test_a_template_that_renders_no_answer_has_no_end_of_turn(tmp_path: Path) -> None:
    assert ends(model(tmp_path / "a", 0), tokenizer(ONE_QUESTION)) == Ends(frozenset({0}), None)


def test_a_student_without_tokenizer_files_is_a_configuration_error_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConfigurationError, match=f"spec.student.model: {tmp_path} has no tokenizer"):
        load_tokenizer(tmp_path, "spec.student.model", trust_remote_code=False)


OFF = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN3 = CHATML.replace("assistant\n{% endif", f"assistant\n{OFF}{{% endif")


def test_a_model_that_can_think_and_one_that_never_does_are_told_apart() -> None:
    """Qwen3-8B and Qwen3-30B-A3B-Instruct-2507 render one prompt, and answer it in two ways."""
    same_template(tokenizer(QWEN3), tokenizer(CHATML))
    with pytest.raises(
        ModelsDisagree, match=r"ThinkingMode: the student's .* takes enable_thinking, .* one mode alone"
    ):
        same_thinking(tokenizer(QWEN3), tokenizer(CHATML))
    with pytest.raises(ModelsDisagree, match="the teacher's takes enable_thinking"):
        same_thinking(tokenizer(CHATML), tokenizer(QWEN3))
    same_thinking(tokenizer(QWEN3), tokenizer(QWEN3))
    same_thinking(tokenizer(None), tokenizer(QWEN3))


def test_a_special_token_that_one_model_reads_in_pieces_is_named_with_both_readings() -> None:
    words = {word: i for i, word in enumerate(["<|endoftext|>", "|>", "<|", "[UNK]"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    pieces.chat_template = CHATML

    same_special_tokens(tokenizer(), tokenizer(eos="<|im_end|>"))
    mine = r"SpecialTokens: token 0 of a rendered conversation is '<\|im_start\|>' \(id 1\) to the student and "
    with pytest.raises(ModelsDisagree, match=mine + r"'<\|' \(id 2\) to the teacher"):
        same_special_tokens(tokenizer(), pieces)


def limited(folder: Path, positions: int, rows: int = 4, **config: Any) -> Path:
    saved(folder, tokenizer(), 0)
    (folder / "config.json").write_text(
        json.dumps({"max_position_embeddings": positions, "vocab_size": rows, "eos_token_id": 0, **config})
    )
    return folder


@pytest.mark.parametrize(
    ("student", "teacher", "ends_well"),
    [(80, 81, True), (79, 81, False), (80, 80, False), (80, 79, False), (200, 200, True)],
)
def test_prompt_and_response_fit_both_models_or_the_sentence_has_all_numbers(
    student: int, teacher: int, ends_well: bool, tmp_path: Path
) -> None:
    """A teacher of 80 positions scores 79 tokens: SGLang refuses an input as long as its context."""
    mine = limited(tmp_path / "student", student)
    job = spec(limited(tmp_path / "teacher", teacher), maxPromptTokens=48, maxResponseTokens=32)
    if ends_well:
        check_models(job, mine, tokenizer())
        return
    numbers = rf"ContextLength: .*48 .*32 tokens are 80, but the student has {student} and teacher \w+ has {teacher}"
    with pytest.raises(ModelsDisagree, match=numbers):
        check_models(job, mine, tokenizer())


def test_a_student_is_measured_also_where_its_teacher_is_an_endpoint(tmp_path: Path) -> None:
    job = spec(Path("/models/elsewhere"), maxPromptTokens=48, maxResponseTokens=32)
    with pytest.raises(ModelsDisagree, match="are 80, but the student has 79 positions"):
        check_models(job, limited(tmp_path / "student", 79), tokenizer())


def test_a_context_length_is_the_scaled_and_the_stated_one(tmp_path: Path) -> None:
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert limits(limited(tmp_path / "a", 32, **yarn), []).positions == 128
    original = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    assert limits(limited(tmp_path / "b", 128, **original), []).positions == 128
    llama = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert limits(limited(tmp_path / "c", 128, **llama), []).positions == 128
    assert limits(tmp_path / "c", ["--context-length", "64"]).positions == 64
    assert limits(tmp_path / "c", ["--context-length=65"]).positions == 65


def test_a_token_without_an_embedding_row_is_named(tmp_path: Path) -> None:
    student, job = limited(tmp_path / "student", 8192, rows=3), spec(Path("/models/elsewhere"))
    with pytest.raises(ModelsDisagree, match=r"EmbeddingRows: .*'\[UNK\]' with id 3, and its embedding has 3 rows"):
        check_models(job, student, tokenizer())
