"""The student as its own teacher (teacher.student): its rollout engines score, with the weights that they hold."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModel, hf_logprobs, spec_of
from runs import HINTED_SUMS, arithmetic, twice

from distill_api.base import API_VERSION, KIND
from distill_api.job import DistillationJob, parse_job
from distill_workers.data.sample import Sample
from distill_workers.engine.request import EngineRefused, EngineUnavailable
from distill_workers.failures import PreflightFailed
from distill_workers.local.evaluate import chosen
from distill_workers.metrics import Metrics
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.reporting.step_line import Step, step_line
from distill_workers.rollout.batch import Batch
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.request_batching import RequestBatcher
from distill_workers.rollout.student_teacher import StudentTeacher, student_teachers
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.callbacks.metrics import MetricsCallback
from distill_workers.run.preflight.model_agreement import check_models, load_tokenizer, size_notes
from distill_workers.run.preflight.replicas import replicas_agree
from distill_workers.run.preflight.teacher import teacher_differs
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.serving.server import SCORING_CHUNK_TOKENS, sglang_command
from distill_workers.teacher.pool import BadScore, TeacherPool
from distill_workers.teacher.teachers import Teachers

pytestmark = pytest.mark.asyncio(loop_scope="session")
HINTED, RESPONSE = list(range(60, 110)), [200, 301, 17, 2]
DATA = {"prompts": {"reasoningGym": {"task": "chain_sum", "size": 8}, "teacherPrompt": "{prompt} It is {answer}."}}


def job_of(student: Path, output: Path, **changes: Any) -> DistillationJob:
    spec = spec_of(student, student, teacher={"student": {}}, data=DATA, output={"path": str(output)}, **changes)
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "own"}}
    return parse_job({**manifest, "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True)})


def pool_of(job: DistillationJob, *engines: Any) -> EnginePool:
    """A pool of engines that have started."""
    pool = EnginePool(job, RunFolder(job), Metrics())
    pool._engines = dict(enumerate(engines))
    pool._batchers = {number: RequestBatcher(engine) for number, engine in enumerate(engines)}
    for number in pool._engines:
        pool._scheduler.add(number)
    return pool


def teacher_of(job: DistillationJob, pool: EnginePool) -> Any:
    [teacher] = student_teachers(job.spec, pool, Metrics()).values()
    assert isinstance(teacher, StudentTeacher)
    return teacher


async def test_the_score_of_an_engine_is_that_of_a_served_teacher_with_its_weights_and_names_them(
    engine: Any, teacher_server: Any, tiny_model: TinyModel, tiny_spec: Any, tmp_path: Path
) -> None:
    await engine.load_folder(str(tiny_model(1)), 3, 60.0)
    job = job_of(tiny_model(0), tmp_path)
    own = teacher_of(job, pool_of(job, engine))
    served = TeacherPool(f"127.0.0.1:{teacher_server.port}", tiny_spec, Metrics())
    try:
        await asyncio.gather(own.start(60), served.start(60))
        assert own.vocabulary == served.vocabulary == 512
        for top_k in (None, 8):
            mine = await own.score(HINTED, RESPONSE, top_k)
            theirs = await served.score(HINTED, RESPONSE, top_k)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
            assert (mine.version, theirs.version) == (3, None)
        assert mine.top_ids is not None and theirs.top_ids is not None
        assert mine.top_ids.tolist() == theirs.top_ids.tolist()
        assert mine.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-5)
        await engine.load_folder(str(tiny_model(0)), 4, 60.0)
        newer = await own.score(HINTED, RESPONSE, None)
        assert newer.version == 4
        assert newer.logprobs == pytest.approx(hf_logprobs(tiny_model(0), HINTED, RESPONSE), abs=1e-4)
        assert newer.logprobs != pytest.approx(mine.logprobs, abs=0.1), "those of the weights before"
        with pytest.raises(BadScore, match="outside_vocabulary"):
            await own.score(HINTED, [512], None)
        with pytest.raises(BadScore, match="refused"):
            await own.score([5] * 3000, RESPONSE, None)
    finally:
        await own.close()
        await served.close()


class Played:
    """An engine that answers once it is told to, with the log-prob and version that it was given."""

    def __init__(self, logprob: float = -1.0, version: int = 0, error: Exception | None = None) -> None:
        self.logprob, self.version, self.error, self.incarnation = logprob, version, error, 1
        self.asked, self.order, self.go = 0, list[str](), asyncio.Event()
        self.go.set()

    async def generate(self, requests: list[Any]) -> list[Any]:
        await self.go.wait()
        self.order += ["response"] * len(requests)
        return [None] * len(requests)

    async def answer(self, request: dict[str, Any]) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error
        version = str(self.version)
        await self.go.wait()
        self.order.append("score")
        ids = request["input_ids"][request["logprob_start_len"] :]
        entries = [[self.logprob - i % 7, token, None] for i, token in enumerate(ids)]
        return {"meta_info": {"input_token_logprobs": entries, "weight_version": version}}

    async def start(self, model: str) -> float:
        raise EngineUnavailable("it does not come back")

    async def stop(self) -> None:
        pass


async def test_scores_go_before_the_responses_of_training(tmp_path: Path) -> None:
    job, engine = job_of(Path("/s"), tmp_path, deterministic=True), Played()
    pool = pool_of(job, engine)
    how: Any = {"max_new_tokens": 100, "temperature": 1.0, "top_p": 1.0}
    engine.go.clear()
    work = [asyncio.create_task(pool.generate([1], **how, seed=seed)) for seed in range(3)]
    await asyncio.sleep(0.01)
    work.append(asyncio.create_task(teacher_of(job, pool).score([1, 2], [3], None)))
    await asyncio.sleep(0.01)
    engine.go.set()
    await asyncio.gather(*work)
    assert engine.order == ["response", "score", "response", "response"], "one slot: what runs ends first"


async def test_new_weights_wait_until_a_score_has_ended_and_the_next_names_them(tmp_path: Path) -> None:
    job, engine = job_of(Path("/s"), tmp_path, rollout={"maxPolicyLag": 1}), Played(version=1)
    pool = pool_of(job, engine)
    teacher = teacher_of(job, pool)
    engine.go.clear()
    first = asyncio.create_task(teacher.score([1, 2], [3], None))
    await asyncio.sleep(0.01)
    async with pool.updating_weights():
        drained = asyncio.create_task(pool.drain())
        late = asyncio.create_task(teacher.score([1, 2], [3], None))
        await asyncio.sleep(0.01)
        assert not drained.done() and engine.asked == 1, "no score begins while new weights wait"
        engine.go.set()
        await drained
        assert first.done()
        engine.version = 2
    assert (first.result().version, (await late).version) == (1, 2)


async def test_an_engine_that_is_lost_costs_no_score(tmp_path: Path) -> None:
    job = job_of(Path("/s"), tmp_path, rollout={"replicas": 2})
    lost, other = Played(error=EngineUnavailable("it has ended")), Played(version=7)
    pool = pool_of(job, lost, other)
    try:
        scores = await asyncio.gather(*(teacher_of(job, pool).score([1, 2], [3], None) for _ in range(4)))
        assert [s.version for s in scores] == [7] * 4
        assert lost.asked >= 1 and pool.serving == [1]
    finally:
        await pool.close()


async def test_what_an_engine_refuses_fails_its_sample(tmp_path: Path) -> None:
    job = job_of(Path("/s"), tmp_path)
    teacher = teacher_of(job, pool_of(job, Played(error=EngineRefused("too long"))))
    with pytest.raises(BadScore, match="refused: too long"):
        await teacher.score([1, 2], [3], None)


async def test_preflight_compares_each_engine(tmp_path: Path) -> None:
    job = job_of(Path("/s"), tmp_path, rollout={"replicas": 2})
    samples = [Sample(0, 0, [5], [6, 7], [-1.0] * 2, [0] * 2, False, privileged_ids=[5, 9])]
    same = pool_of(job, Played(), Played())
    await replicas_agree(job.spec, samples, teacher_of(job, same))
    assert [engine.asked for engine in same._engines.values()] == [2, 2]  # type: ignore[attr-defined]
    unlike = pool_of(job, Played(), Played(-2.0))
    with pytest.raises(PreflightFailed, match=r"ReplicasAgree: teacher teacher \(the student itself\).*engine [01]"):
        await replicas_agree(job.spec, samples, teacher_of(job, unlike))


async def test_a_prompt_that_tells_the_teacher_nothing_is_refused_before_the_first_step(tmp_path: Path) -> None:
    spec = job_of(Path("/s"), tmp_path).spec
    await teacher_differs(spec, {"teacher": 0.2})
    with pytest.raises(PreflightFailed, match=r"TeacherDiffers: .*what does prompts.teacherPrompt add for these rows"):
        await teacher_differs(spec, {"teacher": 1e-6})


async def test_it_needs_no_server_no_address_and_no_comparison_of_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    job, model = job_of(tiny_model(0), tmp_path), tiny_model(0)
    spec, pool = job.spec, pool_of(job, Played())
    assert spec.served_teachers == [] and not spec.needs_hub
    found = Teachers.of_job(spec, {}, Metrics(), student_teachers(spec, pool, Metrics()))
    assert isinstance(found.of("teacher"), StudentTeacher)
    tokenizer = load_tokenizer(model, "spec.student.model", trust_remote_code=False)
    assert check_models(spec, model, tokenizer).notes == [] and size_notes(spec, model) == []
    command, _ = sglang_command(str(model), spec, "engine", "127.0.0.1", 1)
    assert command[command.index("--chunked-prefill-size") + 1] == str(SCORING_CHUNK_TOKENS)
    plain = spec_of(model, model)
    assert "--chunked-prefill-size" not in sglang_command(str(model), plain, "engine", "127.0.0.1", 1)[0]
    hinted = {"name": "e", "prompts": DATA["prompts"]}
    with pytest.raises(ValueError, match=r"--teacher: the teacher is the student itself"):
        chosen(job_of(model, tmp_path, evaluation=[hinted]).spec, [], with_teacher=True)


@pytest.mark.parametrize(("versions", "lag"), [([2, 3, 3, 3], 0.25), ([1, None], 2.0), ([None, None], None)])
async def test_a_step_tells_by_how_much_the_weights_that_scored_lag(
    versions: list[int | None], lag: float | None, tmp_path: Path
) -> None:
    """The mean over the samples that the student has scored."""

    class Recorded:
        def spent(self, stage: Any, seconds: float) -> None:
            pass

        def step(self, step: Step) -> dict[str, Any]:
            return step_line(step, {})

    recorder: Any = Recorded()
    objective = job_of(Path("/s"), tmp_path).spec.objective
    step = TrainStep(3, StepCoefficients(divergence=1.0, reward=0.0), batch=Batch(3, {}, objective))
    step.samples = [Sample(0, 0, [1], [2], [-1.0], [2], False, [-1.0], teacher_version=v) for v in versions]
    await MetricsCallback(recorder).after_step(step)
    assert (step.line["teacher_lag"], step.line["policy_lag"]) == (lag, 1.0)


RUN: dict[str, Any] = {
    "deterministic": True,
    "teacher": None,
    "rollout": {"promptsPerStep": 4, "samplesPerPrompt": 2, "maxPromptTokens": 32},
    "schedule": {"steps": 6, "checkpointEverySteps": 3, "evaluateEverySteps": 6},
    "evaluation": [{"name": "drift", "maxPrompts": 2, "prompts": HINTED_SUMS}],
}


async def test_a_run_that_goes_on_has_the_same_last_bit_and_each_step_tells_which_weights_scored_it(
    tmp_path: Path,
) -> None:
    manifest = arithmetic(tmp_path, "own", **RUN)
    manifest["spec"]["teacher"] = {"student": {"weights": "live"}}
    manifest["spec"]["data"]["prompts"]["teacherPrompt"] = "{answer}+{prompt}"
    whole, again = await asyncio.to_thread(twice, manifest, "", tmp_path, 3)
    assert whole == again
    assert [(step, lag) for step, *_, lag in whole[0]] == [(step, 0.0) for step in range(1, 7)]
    assert all(kl != 0 for _, _, kl, _, _ in whole[0])
    assert [step for step, _ in whole[2]] == [0, 6] and all(kl for _, kl in whole[2]), "an evaluation is scored as well"
