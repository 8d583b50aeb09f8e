"""Privileged context: the teacher is asked another question about the student's response (OPSD, arXiv 2601.18734)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_tokenizer
from runs import arithmetic
from test_rollout_pipeline import Engines, Teacher, pipeline

from distill_api.job import parse_job
from distill_api.spec.job_spec import Prompts
from distill_workers.data.cursor import Cursor
from distill_workers.data.dataset_responses import supervised_sample
from distill_workers.data.identity import content_of
from distill_workers.data.prompts import load_prompts
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.engine import Response
from distill_workers.failures import PromptError
from distill_workers.metrics import Metrics
from distill_workers.reporting.step_line import Step, step_line
from distill_workers.run.preflight.replicas import replicas_agree
from distill_workers.run.preflight.student import probe
from distill_workers.run.preflight.teacher import teacher_is_sane


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def load(folder: Path, tokenizer: Any, *rows: Any, longest: int = 200, **fields: Any) -> list[Prompt]:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(Prompts(path=str(file), **fields), tokenizer, longest, None)[0]


def chat(*messages: tuple[str, str]) -> str:
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
    return f"{turns}<|im_start|>assistant\n"


def asked(prompt: Prompt, tokenizer: Any) -> str:
    assert prompt.privileged_ids is not None
    return str(tokenizer.decode(prompt.privileged_ids))


def test_the_teacher_is_asked_with_fields_of_the_row_and_the_student_as_ever(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "1+1?", "label": 2, "extra": {"hints": ["count", "add"]}, "level": 3, "solution": "It is 2."}
    template = "{prompt} {answer} {response} {extra.hints.1} {level} {extra} \\boxed{}"
    fields = {"answer_field": "label", "response_field": "solution", "teacher_prompt": template}
    [prompt] = load(tmp_path, tokenizer, row, **fields)
    [plain] = load(tmp_path, tokenizer, row, answer_field="label", response_field="solution")
    assert (prompt.ids, prompt.text, prompt.key) == (plain.ids, plain.text, plain.key)
    said = '1+1? 2 It is 2. add 3 {"hints": ["count", "add"]} \\boxed{}'
    assert asked(prompt, tokenizer) == chat(("user", said))
    assert plain.privileged_ids is None and plain.teacher_ids == plain.ids
    assert prompt.teacher_ids == prompt.privileged_ids


def test_of_a_chat_the_last_message_is_replaced_and_the_system_message_is_the_teachers(
    tmp_path: Path, tokenizer: Any
) -> None:
    messages = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {"prompt": [{"role": role, "content": text} for role, text in messages], "hint": "d"}
    [prompt] = load(tmp_path, tokenizer, row, teacher_prompt="{prompt}, {hint}", teacher_system_prompt="Know {hint}.")
    assert prompt.text == chat(*messages)
    assert asked(prompt, tokenizer) == chat(("system", "Know d."), ("user", "a"), ("assistant", "b"), ("user", "c, d"))


def test_the_teacher_has_the_students_system_message_where_it_has_no_own(tmp_path: Path, tokenizer: Any) -> None:
    [prompt] = load(tmp_path, tokenizer, {"prompt": "a"}, system_prompt="Be brief.", teacher_prompt="{prompt}!")
    assert asked(prompt, tokenizer) == chat(("system", "Be brief."), ("user", "a!"))


def test_a_text_without_a_template_is_replaced_whole(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "1+1=", "answer": "2"}
    [prompt] = load(tmp_path, tokenizer, row, apply_chat_template=False, teacher_prompt="({answer}) {prompt}")
    assert (prompt.text, asked(prompt, tokenizer)) == ("1+1=", "(2) 1+1=")


def test_a_row_that_lacks_a_field_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(
        PromptError, match=r"p.jsonl:2: has no \{hint\} for prompts.teacherPrompt; it has prompt, level"
    ):
        load(tmp_path, tokenizer, {"prompt": "a", "hint": "b"}, {"prompt": "c", "level": 1}, teacher_prompt="{hint}")


def test_a_prompt_whose_teachers_is_too_long_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "hint": "b"}, {"prompt": "c", "hint": "d" * 500}]
    [prompt] = load(tmp_path, tokenizer, *rows, longest=60, teacher_prompt="{prompt} {hint}")
    assert "a b" in asked(prompt, tokenizer)


def test_another_question_for_the_teacher_is_another_run_and_none_is_the_same_as_before(
    tmp_path: Path, tokenizer: Any
) -> None:
    row = {"prompt": "a", "hint": "b"}
    contents = [content_of(load(tmp_path, tokenizer, row, **fields)) for fields in (
        {}, {"teacher_prompt": "{prompt} {hint}"}, {"teacher_prompt": "{prompt} {hint}!"},
    )]  # fmt: skip
    assert len({content["prompts"] for content in contents}) == 3
    assert len({content["other fields"] for content in contents}) == 1


class Asked(Teacher):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__({})
        self.asked = list[list[int]]()

        self.teacher = SimpleNamespace(name="teacher", title="t", model="/m", max_disagreement=1.0)

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Any:
        self.asked.append(prompt_ids)
        return await super().score(prompt_ids, response_ids, top_k)

    async def score_everywhere(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Any:
        return [("here", await self.score(prompt_ids, response_ids, top_k))]


async def test_responses_are_scored_and_prefetched_after_the_teachers_prompt(tmp_path: Path) -> None:
    engines, teacher = Engines(set()), Asked()
    work = pipeline(tmp_path, Metrics(), engines, teacher, promptsPerStep=1)
    [iterator] = work._cursor._iterators.values()
    iterator.prompts = [Prompt(0, [5, 6], "?", privileged_ids=[7, 8, 9])]
    iterator._order = [0]
    samples = [s async for part in work.take(0, 1).arrivals(in_order=True) for s in part]
    assert teacher.asked == [[7, 8, 9]] * 2 and teacher.prefetched == [[7, 8, 9]]
    assert [(s.prompt_ids, s.teacher_prompt_ids) for s in samples] == [([5, 6], [7, 8, 9])] * 2


def test_the_share_of_a_response_that_was_copied_of_what_the_student_cannot_know() -> None:
    def share(response: list[int], privileged: list[int] | None) -> float | None:
        sample = Sample(0, 0, [1, 2, 3, 4, 5], response, [], [], False)
        sample.privileged_ids = privileged
        return sample.copied_share

    hint = [1, 2, 3, 4, 5, 20, 21, 22, 23, 24]
    assert share([1, 2, 3, 4, 5], None) is None
    assert share([1, 2, 3, 4, 5], hint) == 0, "the student was asked that too"
    assert share([20, 21, 22], hint) == 0, "three tokens stand in any two texts"
    assert share([9, 20, 21, 22, 23, 9, 9, 9], hint) == 0.5
    assert share([20, 21, 22, 23, 24], hint) == 1
    assert share([], hint) == 0


async def test_preflight_scores_what_training_will_score(tmp_path: Path) -> None:
    """The student's own start, asked with a hint, is another teacher than the student."""
    spec = parse_job(arithmetic(tmp_path, "probe")).spec
    samples = [Sample(0, 0, [5, 6], [1, 2], [-0.5, -0.5], [0, 0], False, privileged_ids=[7, 8, 9])]
    teacher: Any = Asked()
    await teacher_is_sane(spec, samples, teacher, 384)
    await replicas_agree(spec, samples, teacher)
    assert teacher.asked and all(asked == [7, 8, 9] for asked in teacher.asked)

    class OneEngine:
        async def sample(self, prompt_ids: list[int], **_: Any) -> list[Response]:
            assert prompt_ids == [5, 6]
            return [Response([1, 2], [-0.5, -0.5], [0, 0], False)]

        def count_placed(self) -> int:
            return 1

    engines: Any = OneEngine()
    cursor = Cursor([Prompt(0, [5, 6], "?", privileged_ids=[7, 8, 9])], seed=0, shuffle=False)
    [drawn] = await probe(spec, engines, cursor)
    assert drawn.teacher_prompt_ids == [7, 8, 9]


def test_a_response_of_the_data_set_is_scored_after_the_teachers_prompt_too() -> None:
    prompt = Prompt(0, [5, 6], "?", response="It is 2.", privileged_ids=[7, 8, 9])
    assert supervised_sample(prompt, tiny_tokenizer(), 8, 0).teacher_prompt_ids == [7, 8, 9]


def test_a_step_tells_the_share_that_was_copied() -> None:
    def line(*privileged: list[int] | None) -> dict[str, Any]:
        samples = [
            Sample(i, 0, [1], [20, 21, 22, 23], [-1.0] * 4, [0] * 4, False, [-1.0] * 4, privileged_ids=ids)
            for i, ids in enumerate(privileged)
        ]
        return step_line(Step(1, samples, {}, 0.0, 1.0), {})

    assert line(None)["copied_ratio"] is None
    assert line([1, 20, 21, 22, 23], [1, 9, 9, 9, 9])["copied_ratio"] == 0.5
