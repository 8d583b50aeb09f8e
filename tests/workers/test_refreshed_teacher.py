"""A teacher that is given the student's weights every so many steps: no score is by other weights than it should be."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from aiohttp import web
from conftest import TinyModel, hf_logprobs, source_of, spec_of
from runs import arithmetic, twice
from safetensors.torch import load_file

import distill_workers.teacher.pool as pool_module
import distill_workers.teacher.refreshed as refreshed_module
from distill_api.base import API_VERSION, KIND
from distill_api.job import DistillationJob, parse_job
from distill_api.protocol import Variable
from distill_workers.failures import Failure, Superseded
from distill_workers.metrics import Metrics
from distill_workers.run.callbacks.teacher_weights import TeacherWeights
from distill_workers.run.run_state import RunState
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.serving.admin_key import bearer
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer
from distill_workers.teacher.protocol import TeacherUnreachable
from distill_workers.teacher.refreshed import RefreshedTeacher
from distill_workers.teacher.replicas import BREAK_AFTER, NotReached
from distill_workers.teacher.sglang_protocol import weights_name
from distill_workers.teacher.teachers import Teachers

pytestmark = pytest.mark.asyncio(loop_scope="session")
DATA = {"prompts": {"reasoningGym": {"task": "chain_sum", "size": 8}, "teacherPrompt": "{prompt} It is {answer}."}}
KEY_OF_JOB = "key-of-the-job"
PROMPT, RESPONSE = list(range(60, 110)), [200, 301, 17, 2]


def job_of(output: Path, student: Path = Path("/s"), **teacher: Any) -> DistillationJob:
    chosen = {"student": {"weights": "lagged", "everySteps": 2, **teacher}}
    spec = spec_of(student, student, teacher=chosen, data=DATA, output={"path": str(output)})
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "own"}}
    return parse_job({**manifest, "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True)})


class Server:
    """The part of SGLang's API that a teacher is asked by. Its log-probs tell its weights: -(n + 1) those of step n."""

    def __init__(self) -> None:
        self.port, self.name, self.asked = reserve_port(), "0", 0
        self.loads, self.refuses, self.nameless = list[dict[str, Any]](), False, False
        self.tells, self.takes = asyncio.Event(), asyncio.Event()
        """Its weights' name, and other weights. One that hangs does not."""
        self.tells.set()
        self.takes.set()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/model_info", self.info)
        app.router.add_post("/update_weights_from_disk", self.update)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "token_ids_logprob" in body:
            return web.json_response({"error": {"message": "valid range is [0, 1000)."}}, status=400)
        self.asked += 1
        logprob = -1.0 - int(self.name.partition("-")[0])
        entries = [[logprob, token, None] for token in body["input_ids"][body["logprob_start_len"] :]]
        meta = {"input_token_logprobs": entries, "weight_version": self.name, "cached_tokens": 0}
        return web.json_response({"meta_info": meta})

    async def info(self, request: web.Request) -> web.Response:
        await self.tells.wait()
        return web.json_response({} if self.nameless else {"weight_version": self.name})

    async def update(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == bearer(KEY_OF_JOB)["Authorization"]
        await self.takes.wait()
        if self.refuses:
            return web.json_response({"success": False, "message": "no such folder"}, status=400)
        self.loads.append(await request.json())
        self.name = self.loads[-1]["weight_version"]
        return web.json_response({"success": True})


@pytest_asyncio.fixture(loop_scope="session")
async def servers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Server]]:
    monkeypatch.setenv(Variable.KEY, KEY_OF_JOB)
    monkeypatch.setattr(pool_module, "BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(refreshed_module, "LEAST_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(refreshed_module, "INFO_SECONDS", 0.2)
    made = [Server(), Server()]
    for server in made:
        await server.start()
    yield made
    for server in made:
        await server.runner.cleanup()


async def teacher_of(job: DistillationJob, *ports: int) -> Any:
    address = ",".join(f"127.0.0.1:{port}" for port in ports)
    made = Teachers.of_job(job.spec, {Variable.TEACHER: address}, Metrics())
    teacher = made.of("teacher")
    assert isinstance(teacher, RefreshedTeacher)
    await teacher.start(60)
    return teacher


async def scores(teacher: Any, count: int = 8) -> set[tuple[int, float]]:
    """Version and log-prob of so many scores at once."""
    found = await asyncio.gather(*(teacher.score([1, 2, 3], [4, 5 + n], None) for n in range(count)))
    return {(s.version, x) for s in found for x in s.logprobs}


async def test_all_servers_get_the_weights_and_every_score_names_them(servers: list[Server], tmp_path: Path) -> None:
    teacher = await teacher_of(job_of(tmp_path), *(s.port for s in servers))
    try:
        await teacher.hold(0, Path("/start"))
        assert [s.loads for s in servers] == [[], []], "they start with these"
        assert await scores(teacher) == {(0, -1.0)}
        await teacher.hold(2, Path("/two"))
        assert [[load["model_path"] for load in s.loads] for s in servers] == [["/two"], ["/two"]]
        assert all(load["flush_cache"] for s in servers for load in s.loads)
        assert await scores(teacher) == {(2, -3.0)}
        assert all(s.asked for s in servers)
    finally:
        await teacher.close()


async def test_a_server_that_comes_back_gets_the_right_weights_before_a_score_of_it_is_taken(
    servers: list[Server], tmp_path: Path
) -> None:
    teacher = await teacher_of(job_of(tmp_path), *(s.port for s in servers))
    try:
        await teacher.hold(4, Path("/four"))
        servers[0].name = "0"
        assert await scores(teacher) == {(4, -5.0)}
        assert [len(s.loads) for s in servers] == [2, 1] and servers[0].name == servers[1].name
    finally:
        await teacher.close()


async def test_weights_of_one_version_that_were_made_twice_are_two(servers: list[Server], tmp_path: Path) -> None:
    """A run that was rolled back comes to a step again, and a server may have been away all the while."""
    teacher = await teacher_of(job_of(tmp_path), *(s.port for s in servers))
    try:
        await teacher.hold(4, Path("/four"))
        before = servers[0].name
        for version, folder in ((2, "/two"), (4, "/four")):
            await teacher.hold(version, Path(folder))
        servers[0].name = before
        assert await scores(teacher) == {(4, -5.0)}
        assert servers[0].name != before and len(servers[0].loads) == 4
    finally:
        await teacher.close()


async def test_a_server_that_cannot_load_them_scores_nothing_and_the_others_go_on(
    servers: list[Server], tmp_path: Path
) -> None:
    teacher = await teacher_of(job_of(tmp_path), *(s.port for s in servers))
    try:
        servers[0].refuses = True
        await teacher.hold(2, Path("/two"))
        assert await scores(teacher) == {(2, -3.0)}
        servers[0].refuses = False
    finally:
        await teacher.close()


@pytest.mark.parametrize("hangs", ["takes", "tells"])
async def test_a_server_that_hangs_holds_up_nothing_and_scores_again_once_it_has_the_weights(
    hangs: str, servers: list[Server], tmp_path: Path
) -> None:
    teacher = await teacher_of(job_of(tmp_path), *(s.port for s in servers))
    try:
        hanging: asyncio.Event = getattr(servers[0], hangs)
        hanging.clear()
        async with asyncio.timeout(20):
            await teacher.hold(2, Path("/two"))
            assert [len(s.loads) for s in servers] == [0, 1]
            assert await scores(teacher) == {(2, -3.0)}
            assert servers[0].asked == 0, "it is asked for no score that cannot be taken"
            hanging.set()
            for replica in teacher._replicas.all():
                replica.succeeded()  # skipped no longer
            while not servers[0].asked:
                assert await scores(teacher) == {(2, -3.0)}
    finally:
        await teacher.close()


async def test_a_teacher_none_of_whose_servers_takes_the_weights_is_unreachable(
    servers: list[Server], tmp_path: Path
) -> None:
    teacher = await teacher_of(job_of(tmp_path), *(s.port for s in servers))
    try:
        teacher._limit = 0.1
        servers[0].refuses, servers[1].nameless = True, True
        with pytest.raises(TeacherUnreachable, match="has taken the weights of step 2"):
            await teacher.hold(2, Path("/two"))
    finally:
        await teacher.close()


async def test_an_answer_by_other_weights_is_no_success_and_costs_a_sample_nothing_but_time(
    servers: list[Server], tmp_path: Path
) -> None:
    """A server that scores and cannot load is away: it is skipped, and the teacher unreachable once nobody else is."""
    teacher = await teacher_of(job_of(tmp_path), servers[0].port)
    try:
        await teacher.hold(2, Path("/two"))
        before = teacher._last_success
        servers[0].name, servers[0].refuses, teacher._limit = "0", True, 0.5
        with pytest.raises(TeacherUnreachable, match=r"it lacks the teacher's weights: .*no such folder"):
            await teacher.score([1], [2], None)
        [replica] = teacher._replicas.all()
        assert teacher._last_success == before and replica.failures >= BREAK_AFTER
        assert servers[0].asked == 1, "what it cannot load by is asked for before a score that costs a prefill"
    finally:
        await teacher.close()


async def test_a_server_that_takes_weights_and_answers_by_others_is_asked_twice_a_try(
    servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = await teacher_of(job_of(tmp_path), servers[0].port)
    try:
        await teacher.hold(2, Path("/two"))
        held, real = servers[0].name, weights_name
        monkeypatch.setattr(refreshed_module, "weights_name", lambda answer: f"x{real(answer)}")
        [replica] = teacher._replicas.all()
        request = teacher._protocol.score_request([1], [2], None)
        with pytest.raises(NotReached, match="it answers by the weights x2-"):
            await teacher._send(replica, request, 2, 5.0)
        assert servers[0].asked == 2 and servers[0].name == held
    finally:
        await teacher.close()


async def test_a_real_server_scores_by_what_it_was_given_also_after_it_was_started_again(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Variable.KEY, KEY_OF_JOB)
    job = job_of(tmp_path, tiny_model(0))
    [source] = job.spec.served_teachers
    assert source.model == str(tiny_model(0))
    server = SGLangServer(
        source.model, job.spec, "teacher", port=reserve_port(), log=tmp_path / "t.log", serving=source, key=KEY_OF_JOB
    )
    server.start()
    try:
        await asyncio.to_thread(server.wait_ready, 240)
        teacher = await teacher_of(job, server.port)
        for version, model in ((0, tiny_model(0)), (2, tiny_model(1)), (4, tiny_model(2))):
            await teacher.hold(version, model)
            found = await teacher.score(PROMPT, RESPONSE, None)
            assert found.version == version
            assert found.logprobs == pytest.approx(hf_logprobs(model, PROMPT, RESPONSE), abs=1e-4)
        server.start()
        await asyncio.to_thread(server.wait_ready, 240)
        again = await teacher.score(PROMPT, RESPONSE, None)
        assert (again.version, again.logprobs) == (4, pytest.approx(found.logprobs, abs=1e-5))
        await teacher.close()
    finally:
        server.stop()


class Held(RefreshedTeacher):
    """Remembers what it was given."""

    held: list[tuple[int, str]]
    there: list[list[str]]
    """The versions in the run folder meanwhile."""

    async def hold(self, version: int, folder: Path) -> None:
        self.held.append((version, folder.name))
        self.there.append(sorted(path.name for path in folder.parent.glob("version-*")))


def weights_of_job(
    job: DistillationJob, trainer: Any, state: RunState, *, claimed: bool = False
) -> tuple[TeacherWeights, Held]:
    teacher = Held("127.0.0.1:1", job.spec, Metrics(), teacher=job.spec.all_teachers[0])
    teacher.held, teacher.there = [], []
    folder = RunFolder(job)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    if claimed:
        folder.claim()
    return TeacherWeights(job.spec, folder, trainer, Teachers({"teacher": teacher}), state), teacher


async def test_weights_are_given_every_so_many_steps_and_kept_as_long_as_a_checkpoint_needs_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    job, state = job_of(tmp_path, tiny_model(0)), RunState({})
    tensors = {seed: list(load_file(tiny_model(seed) / "model.safetensors").items()) for seed in (0, 1)}
    trainer: Any = SimpleNamespace(model_path=tiny_model(0), weights=source_of(tensors[1]))
    weights, teacher = weights_of_job(job, trainer, state)
    folder = RunFolder(job)
    step: Any = None
    await weights.restore()
    for state.step in range(1, 8):
        if state.step == 3:
            (folder.checkpoints / "step-000003").mkdir()
        if state.step == 7:
            (folder.checkpoints / "step-000007.tmp").mkdir()
        await weights.after_step(step)
    assert teacher.held == [(0, tiny_model(0).name), *((v, f"version-{v:06d}") for v in (2, 4, 6))]
    assert teacher.there[3] == [f"version-{v:06d}" for v in (2, 4, 6)], "a server may still load the one before"
    assert sorted(p.name for p in folder.teacher.iterdir()) == ["version-000002", "version-000006"]
    read = {k: v for p in (folder.teacher / "version-000002").glob("*.safetensors") for k, v in load_file(p).items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors[1])
    # Another attempt goes on from each of the checkpoints.
    for state.step, version in ((3, 2), (7, 6)):
        weights, teacher = weights_of_job(job, trainer, state)
        await weights.restore()
        assert teacher.held == [(version, f"version-{version:06d}")]
    state.step = 5
    with pytest.raises(Failure, match=r"version-000004 is not there: the teacher's weights of step 4"):
        await weights.restore()
    state.step = 4
    await weights.restore()
    assert teacher.held[-1] == (4, "version-000004"), "the trainer has the weights of this step"


async def test_an_average_is_what_is_given_where_that_is_asked_for(tiny_model: TinyModel, tmp_path: Path) -> None:
    job, state = job_of(tmp_path, tiny_model(0), weights="ema", everySteps=1), RunState({}, 1)
    average = list(load_file(tiny_model(1) / "model.safetensors").items())
    trainer: Any = SimpleNamespace(model_path=tiny_model(0), averages=source_of(average))
    weights, teacher = weights_of_job(job, trainer, state)
    step: Any = None
    await weights.after_step(step)
    assert teacher.held == [(1, "version-000001")]


@pytest.mark.parametrize("writes", [True, False])
async def test_a_trainer_that_is_superseded_while_it_writes_takes_no_place(
    writes: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Both write the same version at once, and the newer one has removed what it found; or that has yet to begin."""
    job, state = job_of(tmp_path, tiny_model(0)), RunState({}, 2)
    tensors = {seed: list(load_file(tiny_model(seed) / "model.safetensors").items()) for seed in (0, 1)}
    step: Any = None
    goes_on, entered = asyncio.Event(), asyncio.Event()

    async def slowly(buffers: Any) -> AsyncIterator[Any]:
        async for bucket in source_of(tensors[0])(buffers):
            entered.set()
            await goes_on.wait()
            yield bucket

    older, old_teacher = weights_of_job(
        job, SimpleNamespace(model_path=tiny_model(0), weights=slowly), state, claimed=True
    )
    writing = asyncio.create_task(older.after_step(step))
    await entered.wait()
    newer, new_teacher = weights_of_job(
        job, SimpleNamespace(model_path=tiny_model(0), weights=source_of(tensors[1])), state, claimed=True
    )
    if writes:
        await newer.after_step(step)
    goes_on.set()
    with pytest.raises(Superseded):
        await writing
    assert old_teacher.held == []
    folder = RunFolder(job).teacher
    assert (folder / "version-000002").exists() == writes
    await newer.after_step(step)
    assert new_teacher.held[-1] == (2, "version-000002")
    assert [path.name for path in folder.iterdir()] == ["version-000002"], "what the dead have left is removed"
    read = {k: v for p in (folder / "version-000002").glob("*.safetensors") for k, v in load_file(p).items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors[1])


RUN: dict[str, Any] = {
    "deterministic": True,
    "rollout": {"promptsPerStep": 4, "samplesPerPrompt": 2, "maxPromptTokens": 32},
    "schedule": {"steps": 6, "checkpointEverySteps": 3, "evaluateEverySteps": 6},
    "evaluation": [],
}


async def test_a_run_that_goes_on_has_the_same_last_bit_with_the_average_that_its_teacher_had(tmp_path: Path) -> None:
    """The server lives on, and has other weights than the checkpoint's."""
    manifest = arithmetic(tmp_path, "own", **RUN)
    manifest["spec"]["teacher"] = {"student": {"weights": "ema", "everySteps": 2, "decay": 0.5}}
    manifest["spec"]["data"]["prompts"]["teacherPrompt"] = "{answer}+{prompt}"
    spec = parse_job(manifest).spec
    [source] = spec.served_teachers
    server = SGLangServer(
        source.model or "", spec, "teacher", port=reserve_port(), log=tmp_path / "t.log", serving=source, key=KEY_OF_JOB
    )
    server.start()
    try:
        await asyncio.to_thread(server.wait_ready, 240)
        key = {Variable.KEY.value: KEY_OF_JOB}
        whole, again = await asyncio.to_thread(twice, manifest, f"127.0.0.1:{server.port}", tmp_path, 3, **key)
    finally:
        server.stop()
    assert whole == again
    assert [(step, lag) for step, *_, lag in whole[0]] == [(step, float((step - 1) % 2)) for step in range(1, 7)]
