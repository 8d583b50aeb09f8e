"""A teacher with a tokenizer of its own in the parts of a run: prompts, scores, samples, micro-batches, checks."""

import json
import logging
import threading
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import pytest
import torch
from conftest import spec_of
from cross_tokenizers import byte_level, normalizing, sentence_piece
from test_evaluation import Engines as Answering
from test_evaluation import Teacher as Scoring
from test_rollout_pipeline import Engines, Teacher, pipeline, samples_of
from tokenizers import normalizers

from distill_api.spec.job_spec import Prompts, Spec
from distill_workers.data.cursor import Cursor
from distill_workers.data.identity import content_of
from distill_workers.data.prompts import load_prompts
from distill_workers.data.routing import Route
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.request import Response
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import PreflightFailed, PromptError
from distill_workers.megatron.batch import collate
from distill_workers.megatron.context import OwnTokens
from distill_workers.megatron.logprobs import Vocabulary
from distill_workers.megatron.micro_batch_loss import micro_batch_loss
from distill_workers.metrics import Metrics
from distill_workers.objective.coefficients import step_coefficients
from distill_workers.objective.statistics import means, no_sums
from distill_workers.reporting.sample_lines import sample_line
from distill_workers.reporting.token_kl import summary, token_kl, turns
from distill_workers.run.preflight import preflight as preflight_module
from distill_workers.run.preflight.model_agreement import check_models, teacher_tokenizers
from distill_workers.run.preflight.replicas import replicas_agree
from distill_workers.run.preflight.student import probe, probe_of
from distill_workers.run.preflight.vocabulary import same_vocabulary, tokens_align
from distill_workers.teacher.cross_tokenizer.token_bytes import TokenBytes
from distill_workers.teacher.cross_tokenizer.translation import Translation
from distill_workers.teacher.cross_tokenizer.translators import translators
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.protocol import Scores, TeacherRequest, WrittenResponse
from distill_workers.teacher.teachers import Teachers

STUDENT, TEACHER = byte_level(), sentence_piece()
OWN, THEIRS = TokenBytes(STUDENT), TokenBytes(TEACHER)
OF_TEACHER = {"teacher": TEACHER}
SPEC = spec_of(Path("/s"), Path("/t"), teacher={"model": "/t", "tokenizer": "/t"})


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


def test_a_teacher_need_not_be_able_to_render_a_source_that_it_has_no_prompt_of(tmp_path: Path) -> None:
    bare = sentence_piece()
    bare.chat_template = None
    route = Route(("ours", "theirs"), None, None)
    given = {"route": route, "teachers": {"theirs": bare}, "teacher_field": "who"}
    [prompt] = load(tmp_path, {"prompt": "a", "who": "ours"}, **given)
    assert prompt.privileged_ids is None
    with pytest.raises(PromptError, match="teacher theirs has no chat template"):
        load(tmp_path, {"prompt": "a", "who": "theirs"}, **given)


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


async def test_a_response_is_translated_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    made, threads = pool(), list[threading.Thread]()
    answering(made, monkeypatch)
    translator = made.translator
    assert translator is not None

    class Watched:
        def translate(self, response_ids: list[int]) -> Translation:
            threads.append(threading.current_thread())
            return translator.translate(response_ids)

    made.translator = cast(Any, Watched())
    await made.score([5], [*OWN.encode("the cats"), STUDENT.eos_token_id], None)
    assert threads and threading.main_thread() not in threads


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


def test_the_share_of_aligned_tokens_is_of_those_that_such_a_teacher_scored_in_any_split() -> None:
    mine, plain = sample(4, [False, True, True, True]), sample(2, None)

    def statistics(parts: list[list[Sample]]) -> dict[str, float]:
        objective, coefficients = SPEC.objective, step_coefficients(SPEC.objective, 0)
        total = no_sums(torch.device("cpu"))
        for part in parts:
            batch = collate(part, list(range(len(part))), torch.device("cpu"), scored=True)
            own = OwnTokens(batch.rows, None, None)  # type: ignore[arg-type]  # one rank has no group
            hidden, head = torch.ones(len(batch.targets), 4), torch.ones(16, 4)
            whole = Vocabulary(0, 16, None)
            total = total + micro_batch_loss(objective, coefficients, batch, own, hidden, head, whole)[1]
        return means(total)

    assert statistics([[mine, plain]])["aligned_ratio"] == statistics([[mine], [plain]])["aligned_ratio"] == 0.5
    assert "aligned_ratio" not in statistics([[plain]])


def test_what_is_reported_of_a_token_is_the_mean_of_its_span() -> None:
    """The teacher's log-prob of a span comes in equal shares, and the student's does not."""
    made = sample(4, [False, True, True, False], [True, True, True, False])
    made.engine_logprobs, made.teacher_logprobs = [-0.5, -5.5, -1.0, -9.0], [-2.0, -2.0, -4.0, 0.0]
    assert token_kl(made).tolist() == [-1.0, -1.0, 3.0]
    assert sample_line(1, "first", made, str)["kl"] == [-1.0, -1.0, 3.0, None]
    found = summary([made])
    assert found is not None and (found["max"], found["mean"]) == (3.0, pytest.approx(1 / 3))
    made.loss_mask = [False] * 4
    assert token_kl(made).tolist() == []


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
        share = await tokens_align(SPEC, [sample_of(response)], STUDENT, pool())
    translator = pool().translator
    assert translator is not None
    spans = translator.translate(response).spans
    assert spans is not None and share == sum(s.is_one_to_one for s in spans) / len(response) and 0 < share < 1
    assert (
        f"{100 * share:.0f} % of {len(response)} tokens that the student wrote are one token to it too" in caplog.text
    )
    plain = pool()
    plain.translator = None
    assert await tokens_align(SPEC, [sample_of(response)], STUDENT, plain) is None


async def test_a_probe_that_the_teachers_tokenizer_changes_ends_the_preflight() -> None:
    made = pool()
    spec = spec_of(Path("/s"), Path("/t"), teacher={"model": "/t", "tokenizer": "/t"})
    composing = {"teacher": normalizing(normalizers.NFC())}
    made.translator = translators(spec, STUDENT, {STUDENT.eos_token_id}, composing)["teacher"]
    with pytest.raises(
        PreflightFailed, match=r"TokensAlign: teacher teacher \(/t\) cannot score a probe .* not_reproduced"
    ):
        await tokens_align(SPEC, [sample_of(OWN.encode("cafe\u0301"))], STUDENT, made)


async def test_a_probe_that_was_cut_off_within_a_character_is_compared_no_further() -> None:
    """SentencePiece's decoder writes U+FFFD for each byte, others for the part of the character."""
    made = pool()
    made.translator = translators(SPEC, TEACHER, {TEACHER.eos_token_id}, {"teacher": STUDENT})["teacher"]
    cut = THEIRS.encode("the cats \U0001f600")[:-1]
    assert TEACHER.decode(cut).count("\ufffd") > 1
    assert await tokens_align(SPEC, [sample_of(cut)], TEACHER, made) is not None


@pytest.mark.parametrize(("responses", "warned"), [(64, False), (128, True)])
async def test_a_teacher_with_more_tokens_than_positions_for_the_longest_response_is_warned_of(
    responses: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its model is a hub id, so that only its tokenizer's folder is here."""
    of_tokenizer = model(tmp_path / "tokenizer", TEACHER, max_position_embeddings=256 + 128 + 1)
    teacher = {"model": "research/teacher", "tokenizer": str(of_tokenizer)}
    rollout = {"maxPromptTokens": 256, "maxResponseTokens": responses}
    spec = spec_of(Path("/s"), Path("/t"), teacher=teacher, rollout=rollout)
    response = [*OWN.encode("unbelievable believers believe"), STUDENT.eos_token_id]
    made = pool(**teacher)
    assert made.translator is not None
    ratio = len(made.translator.translate(response).ids) / len(response)
    assert 1 < ratio < 2
    await tokens_align(spec, [sample_of(response)], STUDENT, made)
    assert ("ContextLength: teacher teacher (research/teacher) has" in caplog.text) is warned


async def test_a_student_whose_decoder_writes_otherwise_than_its_bytes_ends_the_preflight() -> None:
    class Cleaning:
        def decode(self, ids: list[int], **_: Any) -> str:
            return str(STUDENT.decode(ids)).upper()

    with pytest.raises(PreflightFailed, match="TokensAlign: the student's tokens of a probe are the text 'the cats'"):
        await tokens_align(SPEC, [sample_of(OWN.encode("the cats"))], Cleaning(), pool())


def routed(*names: str) -> tuple[Spec, Cursor]:
    """A job with the teachers ours and theirs, the second with a tokenizer of its own, and a prompt of each name."""
    teachers = [{"name": "ours", "model": "/a"}, {"name": "theirs", "model": "/b", "tokenizer": "/b"}]
    data = {"prompts": {"path": "/p.jsonl"}, "defaultTeacher": "ours"}
    spec = spec_of(Path("/s"), Path("/t"), teacher=None, teachers=teachers, data=data)
    prompts = [Prompt(i, [i], "", teacher=name, privileged_ids=[900 + i]) for i, name in enumerate(names)]
    return spec, Cursor(prompts, seed=0, shuffle=False)


class Drawing:
    def count_placed(self) -> int:
        return 1

    async def sample(self, prompt_ids: list[int], **_: Any) -> list[Response]:
        return [Response([7], [-1.0], [0], True)]


async def test_each_teacher_has_a_prompt_among_the_probes_where_one_has_a_tokenizer_of_its_own() -> None:
    spec, cursor = routed("ours", "ours", "ours", "theirs", "theirs")
    engines: Any = Drawing()
    found = await probe(spec, engines, cursor)
    assert [(s.prompt_index, s.teacher) for s in found] == [(0, "ours"), (1, "ours"), (3, "theirs")]
    assert [s.prompt_index for s in await probe(SPEC, engines, routed("teacher", "teacher", "teacher")[1])] == [0, 1]
    alike = spec_of(Path("/s"), Path("/t"))
    assert [s.prompt_index for s in await probe(alike, engines, cursor)] == [0, 1]


def test_a_teacher_is_asked_about_its_own_probes_where_one_has_a_tokenizer_of_its_own() -> None:
    spec, _ = routed("ours")
    ours, theirs = spec.all_teachers
    samples = [sample(2, None), sample(2, None)]
    samples[0].teacher, samples[1].teacher = "ours", "theirs"
    samples[1].privileged_ids = [900]
    assert probe_of(spec, samples, ours) == samples[:1] and probe_of(spec, samples, theirs) == samples[1:]
    assert probe_of(spec, samples[:1], theirs) == [], "the prompt of another is none of its tokens"
    [asked] = probe_of(spec, samples[1:], ours)
    assert asked.teacher_prompt_ids == samples[1].prompt_ids, "that of the student is"
    alike = spec_of(Path("/s"), Path("/t"))
    assert probe_of(alike, samples, alike.all_teachers[0]) is samples


async def test_no_teacher_is_sent_a_prompt_of_anothers_by_the_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, cursor = routed("ours", "ours", "theirs")
    asked: dict[str, list[tuple[str, list[int]]]] = {"ours": [], "theirs": []}

    def watched(name: str) -> Any:
        async def check(_: Any, samples: list[Sample], teacher: TeacherPool, *__: Any, **___: Any) -> list[list[float]]:
            asked[teacher.teacher.name] += [(name, s.teacher_prompt_ids) for s in samples]
            return [[-1.5] for _ in samples]

        return check

    for name in ("same_vocabulary", "responses_end", "engine_matches_trainer", "tokens_align", "teacher_differs"):
        monkeypatch.setattr(preflight_module, name, AsyncMock())
    for name in ("teacher_is_sane", "replicas_agree"):
        monkeypatch.setattr(preflight_module, name, watched(name))
    pools = {t.name: TeacherPool("127.0.0.1:1", spec, Metrics(), teacher=t) for t in spec.all_teachers}
    engines, rest = Drawing(), Mock()
    engines.ends = ()  # type: ignore[attr-defined]
    await preflight_module.preflight(spec, range(8), rest, cast(Any, engines), Teachers(pools), cursor)
    checks = ("teacher_is_sane", "replicas_agree")
    assert asked == {
        "ours": [(check, [900 + i]) for check in checks for i in (0, 1)],
        "theirs": [(check, [902]) for check in checks],
    }


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

        async def generate(self, prompt_ids: list[int], max_new_tokens: int) -> WrittenResponse:
            assert prompt_ids == TEACHER("<s>[INST] 12 + 30? [/INST]", add_special_tokens=False)["input_ids"]
            return WrittenResponse([*THEIRS.encode(" 42"), TEACHER.eos_token_id], False)

    made = Evaluator(spec, spec.evaluation[0], STUDENT, Metrics(), teachers=OF_TEACHER)
    sampled = await made.sample(5, Answering(["42 and more"]))
    sampled.step = 0
    other: Any = Other()
    found = await made.grade(sampled, Teachers({"teacher": other}))
    assert found.reverse_kl == pytest.approx(0.5) and found.teacher_score == 1.0
