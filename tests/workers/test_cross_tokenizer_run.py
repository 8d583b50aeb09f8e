"""A teacher with a tokenizer of its own in the parts of a run: prompts, scores, samples, micro-batches, checks."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import spec_of
from cross_tokenizers import byte_level, normalizing, sentence_piece
from test_evaluation import Engines as Answering
from test_evaluation import Teacher as Scoring
from test_rollout_pipeline import Engines, Teacher, pipeline, samples_of
from tokenizers import normalizers

from distill_api.spec.job_spec import Prompts
from distill_workers.data.identity import content_of
from distill_workers.data.prompts import load_prompts
from distill_workers.data.routing import Route
from distill_workers.data.sample import Prompt, Sample
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import PreflightFailed, PromptError
from distill_workers.megatron.batch import collate
from distill_workers.metrics import Metrics
from distill_workers.reporting.token_kl import turns
from distill_workers.run.preflight.model_agreement import check_models, teacher_tokenizers
from distill_workers.run.preflight.replicas import replicas_agree
from distill_workers.run.preflight.vocabulary import same_vocabulary, tokens_align
from distill_workers.teacher.cross_tokenizer.token_bytes import TokenBytes
from distill_workers.teacher.cross_tokenizer.translators import translators
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.protocol import Scores, TeacherRequest
from distill_workers.teacher.teachers import Teachers

STUDENT, TEACHER = byte_level(), sentence_piece()
OWN, THEIRS = TokenBytes(STUDENT), TokenBytes(TEACHER)
OF_TEACHER = {"teacher": TEACHER}


def load(
    folder: Path, *rows: Any, route: Route | None = None, teachers: Any = OF_TEACHER, **fields: Any
) -> list[Prompt]:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = Prompts(path=str(file), **fields)
    return load_prompts(prompts, STUDENT, 200, None, route or Route(), teachers=teachers)[0]


def test_the_teacher_is_asked_by_its_own_template_in_its_own_tokens(tmp_path: Path) -> None:
    [prompt] = load(tmp_path, {"prompt": "12 + 30?"})
    assert prompt.text == "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.privileged_ids == TEACHER("<s>[INST] 12 + 30? [/INST]", add_special_tokens=False)["input_ids"]
    assert content_of([prompt])["prompts"] != content_of(load(tmp_path, {"prompt": "12 + 30?"}, teachers={}))["prompts"]


def test_privileged_context_is_rendered_by_it_too(tmp_path: Path) -> None:
    [prompt] = load(tmp_path, {"prompt": "a", "hint": "b"}, teacher_prompt="{prompt}, {hint}")
    assert prompt.privileged_ids == TEACHER("<s>[INST] a, b [/INST]", add_special_tokens=False)["input_ids"]


def test_of_several_teachers_each_is_asked_in_its_own_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": text, "who": who} for text, who in (("a", "ours"), ("b", "theirs"), ("c", "ours"))]
    found = load(
        tmp_path,
        *rows,
        route=Route(("ours", "theirs"), None, None),
        teachers={"theirs": TEACHER},
        teacher_field="who",
        prompt_field="prompt",
    )
    assert [prompt.privileged_ids is None for prompt in found] == [True, False, True]


def test_an_argument_that_the_teachers_template_lacks_says_nothing_to_it(tmp_path: Path) -> None:
    student = byte_level()
    student.chat_template = "{{ enable_thinking }}" + str(student.chat_template)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n')
    prompts = Prompts(path=str(file), chat_template_arguments={"enable_thinking": False})
    [prompt] = load_prompts(prompts, student, 200, None, teachers=OF_TEACHER)[0]
    assert prompt.text.startswith("False")
    assert prompt.privileged_ids == TEACHER("<s>[INST] a [/INST]", add_special_tokens=False)["input_ids"]


def test_a_prompt_that_the_teachers_template_refuses_names_the_teacher(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"p.jsonl:1: teacher teacher's chat template refuses .* no system prompt"):
        load(tmp_path, {"prompt": "a"}, system_prompt="Be brief.")


def pool(**teacher: Any) -> TeacherPool:
    spec = spec_of(Path("/s"), Path("/t"), teacher={"model": "/t", "tokenizer": "/t", **teacher})
    made = TeacherPool("127.0.0.1:1", spec, Metrics())
    of_job = Teachers({"teacher": made})
    of_job.bound_ids(len(STUDENT))
    of_job.translate(translators(spec, STUDENT, {STUDENT.eos_token_id}, OF_TEACHER))
    return made


def answering(made: TeacherPool, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Have a pool be answered, log-prob -i / 100 for the token i; returns the ids that it sends."""
    sent: list[list[int]] = []

    async def answer(request: TeacherRequest, *_: Any) -> Any:
        sent.append(request.body["input_ids"])
        entries = [[-i / 100, i, None] for i in sent[-1][request.body["logprob_start_len"] :]]
        return {"meta_info": {"input_token_logprobs": entries, "cached_tokens": 0}}

    monkeypatch.setattr(made, "_request", answer)
    return sent


async def test_the_pool_sends_the_teachers_tokens_and_answers_with_the_students(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = pool()
    sent = answering(made, monkeypatch)
    response = [*OWN.encode("the answer is 42."), STUDENT.eos_token_id]
    theirs = [*THEIRS.encode(" the answer is 42."), TEACHER.eos_token_id]
    scores = await made.score([5, 6], response, None)
    assert sent == [[5, 6, *theirs]], "with the space that its template writes before an answer"
    assert len(scores.logprobs) == len(response) and sum(scores.logprobs) == pytest.approx(-sum(theirs) / 100)
    assert scores.span_ends is not None and scores.logprobs[-1] == -TEACHER.eos_token_id / 100


async def test_all_replicas_are_compared_on_the_teachers_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pool()
    sent = answering(made, monkeypatch)

    async def none_yet(*, again: bool) -> None: ...

    monkeypatch.setattr(made._replicas, "resolve", none_yet)
    response = [*OWN.encode("the cats"), STUDENT.eos_token_id]
    [(_, scores)] = await made.score_everywhere([5], response, None)
    assert sent == [[5, *THEIRS.encode(" the cats"), TEACHER.eos_token_id]] and len(scores.logprobs) == len(response)
    sample = Sample(0, 0, [1], response, [-1.0] * len(response), [0] * len(response), False, privileged_ids=[5])
    await replicas_agree(spec_of(Path("/s"), Path("/t")), [sample], made)


class Translating(Teacher):
    """Scores one span of two tokens, and leaves `unscored` of them out."""

    def __init__(self, unscored: int = 0) -> None:
        super().__init__({})
        self.unscored = unscored

    async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
        ends = [False, True] if not self.unscored else [True, False]
        return Scores([-1.0, -1.0], None, None, ends, self.unscored)


async def test_a_sample_knows_its_spans_and_what_was_not_scored_is_not_trained_on(tmp_path: Path) -> None:
    metrics = Metrics()
    whole = await samples_of(pipeline(tmp_path, metrics, Engines(set()), Translating(), promptsPerStep=1).take(0, 1))
    assert [(s.span_ends, s.loss_mask) for s in whole] == [([False, True], None)] * 2
    cut = await samples_of(pipeline(tmp_path, metrics, Engines(set()), Translating(1), promptsPerStep=1).take(0, 1))
    assert [(s.span_ends, s.loss_mask, s.trained_tokens) for s in cut] == [([True, False], [True, False], 1)] * 2
    assert turns(cut) is None, "a response is no conversation"


async def test_the_baseline_of_the_other_responses_is_of_whole_spans(tmp_path: Path) -> None:
    """Each token has d = -0.5 + 1, and its span twice that."""
    work = pipeline(
        tmp_path,
        Metrics(),
        Engines(set()),
        Translating(),
        objective={"support": "sampled-token", "topK": 16, "baseline": "leave-one-out"},
        promptsPerStep=1,
    )
    assert [s.baseline for s in await samples_of(work.take(0, 1))] == [1.0, 1.0]


def sample(tokens: int, span_ends: list[bool] | None, mask: list[bool] | None = None) -> Sample:
    numbers = [-0.5] * tokens
    ids = list(range(3, 3 + tokens))
    made = Sample(0, 0, [1, 2], ids, numbers, [0] * tokens, False, numbers)
    made.span_ends, made.loss_mask = span_ends, mask
    return made


def test_a_micro_batch_holds_the_spans_of_what_is_trained_on_and_none_where_nobody_has_any() -> None:
    mine = sample(4, [False, True, True, False], [True, True, True, False])
    device = torch.device("cpu")
    found = collate([mine, sample(2, None)], [0, 1], device, scored=True).span_ends
    assert found is not None and found.tolist() == [False, True, True, True, True]
    assert collate([sample(2, None)], [0], device, scored=True).span_ends is None
    with pytest.raises(ValueError, match="span_ends"):
        collate([sample(2, [True])], [0], device, scored=True)


def test_nothing_is_said_to_be_copied_between_tokens_of_two_vocabularies() -> None:
    made = sample(5, [True] * 5)
    made.privileged_ids = [3, 4, 5, 6, 7]
    assert made.copied_share is None


async def test_the_served_teacher_is_compared_with_the_tokenizer_that_the_job_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = pool()

    async def texts(ids: list[int]) -> list[str]:
        return [TEACHER.decode([i]) for i in ids]

    monkeypatch.setattr(made, "token_texts", texts)
    made._protocol.vocabulary = len(TEACHER)
    await same_vocabulary(STUDENT, made)
    made.translator = None
    with pytest.raises(PreflightFailed, match=r"to the student and .* or name the teacher's in spec.teacher.tokenizer"):
        await same_vocabulary(STUDENT, made)


async def test_the_share_of_tokens_that_align_is_said(caplog: pytest.LogCaptureFixture) -> None:
    response = [*OWN.encode("the \u4f60"), STUDENT.eos_token_id]
    with caplog.at_level(logging.INFO):
        share = await tokens_align([sample_of(response)], STUDENT, pool())
    translator = pool().translator
    assert translator is not None
    spans = translator.translate(response).spans
    assert spans is not None and share == sum(s.is_one_to_one for s in spans) / len(response) and 0 < share < 1
    assert (
        f"{100 * share:.0f} % of {len(response)} tokens that the student wrote are one token to it too" in caplog.text
    )
    plain = pool()
    plain.translator = None
    assert await tokens_align([sample_of(response)], STUDENT, plain) is None


async def test_a_probe_that_the_teachers_tokenizer_changes_ends_the_preflight() -> None:
    made = pool()
    spec = spec_of(Path("/s"), Path("/t"), teacher={"model": "/t", "tokenizer": "/t"})
    composing = {"teacher": normalizing(normalizers.NFC())}
    made.translator = translators(spec, STUDENT, {STUDENT.eos_token_id}, composing)["teacher"]
    with pytest.raises(
        PreflightFailed, match=r"TokensAlign: teacher teacher \(/t\) cannot score a probe .* not_reproduced"
    ):
        await tokens_align([sample_of(OWN.encode("cafe\u0301"))], STUDENT, made)


async def test_a_student_whose_decoder_writes_otherwise_than_its_bytes_ends_the_preflight() -> None:
    class Cleaning:
        def decode(self, ids: list[int], **_: Any) -> str:
            return str(STUDENT.decode(ids)).upper()

    with pytest.raises(PreflightFailed, match="TokensAlign: the student's tokens of a probe are the text 'the cats'"):
        await tokens_align([sample_of(OWN.encode("the cats"))], Cleaning(), pool())


def sample_of(response: list[int]) -> Sample:
    return Sample(0, 0, [1], response, [-0.5] * len(response), [0] * len(response), False)


def model(folder: Path, tokenizer: Any, **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    return folder


def test_templates_special_tokens_and_ends_of_such_a_teacher_are_not_compared_and_its_positions_are(
    tmp_path: Path,
) -> None:
    student, teacher = model(tmp_path / "student", STUDENT), model(tmp_path / "teacher", TEACHER)
    refused = spec_of(student, teacher)
    with pytest.raises(PreflightFailed, match="ChatTemplate"):
        check_models(refused, student, STUDENT)
    spec = spec_of(student, teacher, teacher={"model": str(teacher), "tokenizer": str(teacher)})
    found = check_models(spec, student, STUDENT)
    assert (found.stop_token_ids, found.notes) == ((), [])
    assert list(teacher_tokenizers(spec)) == ["teacher"]
    short = model(tmp_path / "short", TEACHER, max_position_embeddings=256)
    spec = spec_of(student, short, teacher={"model": str(short), "tokenizer": str(short)})
    with pytest.raises(PreflightFailed, match=r"ContextLength: .* teacher teacher has 256"):
        check_models(spec, student, STUDENT)


def test_a_base_student_ends_its_turns_as_its_template_does(tmp_path: Path) -> None:
    base = byte_level(special=("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    student, teacher = model(tmp_path / "base", base), model(tmp_path / "teacher", TEACHER)
    spec = spec_of(student, teacher, teacher={"model": str(teacher), "tokenizer": str(teacher)})
    assert check_models(spec, student, base).stop_token_ids == (base.convert_tokens_to_ids("<|im_end|>"),)


async def test_an_evaluation_leaves_out_what_was_not_scored_and_reads_the_teachers_own_answer(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "12 + 30?", "answer": "42"}\n')
    prompts = {"path": str(file), "answerField": "answer"}
    evaluation = {"name": "sums", "prompts": prompts, "reward": {"source": "exact-match"}, "scoreTeacher": True}
    spec = spec_of(Path("/s"), Path("/t"), teacher={"model": "/t", "tokenizer": "/t"}, evaluation=[evaluation])

    class Other(Scoring):
        async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
            logprobs = [-1.5] * (len(response_ids) - 1) + [-1000.0]
            return Scores(logprobs, None, None, [True] * len(logprobs), 1)

        async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
            assert prompt_ids == TEACHER("<s>[INST] 12 + 30? [/INST]", add_special_tokens=False)["input_ids"]
            return [*THEIRS.encode(" 42"), TEACHER.eos_token_id]

    made = Evaluator(spec, spec.evaluation[0], STUDENT, Metrics(), teachers=OF_TEACHER)
    sampled = await made.sample(5, Answering(["42 and more"]))
    sampled.step = 0
    other: Any = Other()
    found = await made.grade(sampled, Teachers({"teacher": other}))
    assert found.reverse_kl == pytest.approx(0.5) and found.teacher_score == 1.0
