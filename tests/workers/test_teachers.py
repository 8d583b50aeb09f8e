"""Which teacher scores which prompt, where each of them is, and what its coefficient does."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import yaml
from conftest import spec_of, tiny_tokenizer
from runs import MODELS, REPO

from distill_api import protocol
from distill_api.job import parse_job
from distill_api.spec.job_spec import Spec
from distill_workers.data.prompts import load_data
from distill_workers.data.sample import Prompt, Sample
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.failures import ConfigurationError, PromptError
from distill_workers.local.run import LocalRun, with_volumes
from distill_workers.megatron.batch import collate
from distill_workers.metrics import Metrics
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.progress_server import ProgressServer
from distill_workers.reporting.token_kl import teacher_kl
from distill_workers.rollout.batch import Batch
from distill_workers.run_folder.run_folder import ForeignRun, RunFolder, fingerprint
from distill_workers.serving.ports import reserve_port
from distill_workers.teacher.local_servers import TeacherServers
from distill_workers.teacher.teachers import Teachers

TWO: list[dict[str, Any]] = [
    {"name": "math", "model": "/models/math", "coefficient": 0.25},
    {
        "name": "code",
        "endpoint": {
            "url": "https://vllm.example/v1",
            "protocol": "openai",
            "model": "big",
            "keySecret": {"name": "vllm", "key": "token"},
        },
    },
]


def rows(path: Path, *topics: Any) -> Path:
    lines = ({"prompt": f"{n}", **({} if topic is None else {"topic": topic})} for n, topic in enumerate(topics))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def spec(data: dict[str, Any], **changes: Any) -> Spec:
    return spec_of(Path("/s"), Path("/t"), teacher=None, teachers=TWO, data=data, **changes)


def prompts(path: Path, **fields: Any) -> dict[str, Any]:
    return {"path": str(path), "applyChatTemplate": False, **fields}


def test_a_row_names_the_teacher_of_its_prompt(tmp_path: Path) -> None:
    of = spec({"prompts": prompts(rows(tmp_path / "p.jsonl", "math", "code", "math"), teacherField="topic")})
    assert [p.teacher for p in load_data(of, tiny_tokenizer(), Metrics())] == ["math", "code", "math"]


def test_a_source_names_the_teacher_of_all_its_prompts_or_its_rows_do(tmp_path: Path) -> None:
    sources = [
        {"name": "a", "prompts": prompts(rows(tmp_path / "a.jsonl", None, "math")), "teacher": "code"},
        {"name": "b", "prompts": prompts(rows(tmp_path / "b.jsonl", "math"), teacherField="topic")},
    ]
    found = load_data(spec({"sources": sources}), tiny_tokenizer(), Metrics())
    assert [(p.source, p.teacher) for p in found] == [("a", "code"), ("a", "code"), ("b", "math")]


@pytest.mark.parametrize(("topic", "said"), [("poetry", "is 'poetry'"), (7, "is 7"), (None, "is missing")])
def test_a_prompt_that_names_no_teacher_is_an_error_with_file_line_and_value(
    tmp_path: Path, topic: Any, said: str
) -> None:
    file = rows(tmp_path / "p.jsonl", "math", topic)
    data = {"prompts": prompts(file, teacherField="topic")}
    with pytest.raises(PromptError) as error:
        load_data(spec(data), tiny_tokenizer(), Metrics())
    assert str(error.value) == (
        f"{file}:2: field topic (prompts.teacherField) {said}; it must name one of spec.teachers (math, code), or "
        "data.defaultTeacher says who scores such a prompt"
    )
    lenient = load_data(spec({**data, "defaultTeacher": "code"}), tiny_tokenizer(), Metrics())
    assert [p.teacher for p in lenient] == ["math", "code"]


def test_no_training_prompt_goes_to_the_reference_and_an_evaluation_may(tmp_path: Path) -> None:
    by_row = {"prompts": prompts(rows(tmp_path / "p.jsonl", "code", "math"), teacherField="topic")}
    objective = {"reference": "math", "extrapolation": 1.5}
    teachers = [{"name": n, "model": f"/models/{n}"} for n in ("math", "code")]
    drift = {"name": "drift", "prompts": prompts(tmp_path / "p.jsonl"), "teacher": "math"}
    of = spec_of(
        Path("/s"), Path("/t"), teacher=None, teachers=teachers, data=by_row, objective=objective, evaluation=[drift]
    )
    with pytest.raises(PromptError, match=r"p\.jsonl:2: .* is 'math'; it must name one of spec\.teachers \(code\)"):
        load_data(of, tiny_tokenizer(), Metrics())
    made = Evaluator(of, of.evaluation[0], tiny_tokenizer(), Metrics())
    assert {p.teacher for p in made.prompts} == {"math"}


async def test_an_evaluation_measures_against_the_teacher_that_it_or_its_rows_name(tmp_path: Path) -> None:
    from test_evaluation import Engines

    from distill_workers.teacher.protocol import Scores

    class Far:
        def __init__(self, nats: float) -> None:
            self.nats = nats

        async def score(self, prompt_ids: list[int], response_ids: list[int], top_k: int | None) -> Scores:
            return Scores([-1.0 - self.nats] * len(response_ids), None, None)

    by_row = prompts(rows(tmp_path / "e.jsonl", "math", "code"), teacherField="topic")
    evaluations = [
        {"name": "by-row", "prompts": by_row},
        {"name": "fixed", "prompts": prompts(tmp_path / "e.jsonl"), "teacher": "code"},
    ]
    of = spec({"prompts": by_row}, evaluation=evaluations)
    teachers: Any = Teachers({"math": Far(1.0), "code": Far(3.0)})  # type: ignore[dict-item]
    found = []
    for evaluation in of.evaluation:
        made = Evaluator(of, evaluation, tiny_tokenizer(), Metrics())
        found.append((await made.measure(5, Engines(["42"]), teachers)).reverse_kl)
    assert found == pytest.approx([2.0, 3.0])


def test_each_teacher_has_its_address_and_its_key_from_the_environment() -> None:
    environment = {"DISTILL_TEACHER_ADDRESS": "math=job-teacher-math:30000", "DISTILL_TEACHER_KEY_CODE": " secret\n"}
    of = spec({"prompts": {"path": "/p.jsonl", "teacherField": "topic"}})
    teachers = Teachers.of_job(of, environment, Metrics())
    math, code = teachers.of("math")._endpoint, teachers.of("code")._endpoint
    assert (math.names, math.scheme, math.key) == (("job-teacher-math:30000",), "http", "")
    assert (code.names, code.scheme, code.key) == (("vllm.example:443",), "https", "secret")
    assert code.url("10.0.0.1:443", "/v1/completions") == "https://10.0.0.1:443/v1/completions"
    assert code.headers["Host"] == code.certificate_name == "vllm.example", "each address by the name it must prove"
    assert (teachers.coefficient("math"), teachers.coefficient("code")) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DISTILL_TEACHER_KEY_CODE": "k"}, r"DISTILL_TEACHER_ADDRESS has no address of teacher math \(/models/math\)"),
        ({"DISTILL_TEACHER_ADDRESS": "math=h:1"}, "DISTILL_TEACHER_KEY_CODE is not set: .* keySecret vllm"),
    ],
)
def test_what_the_environment_lacks_is_named(environment: dict[str, str], said: str) -> None:
    of = spec({"prompts": {"path": "/p.jsonl", "teacherField": "topic"}})
    with pytest.raises(ConfigurationError, match=said):
        Teachers.of_job(of, environment, Metrics())


def test_addresses_are_read_as_they_are_written() -> None:
    several = {"math": "a:1,b:2", "code": "[::1]:3"}
    assert protocol.teacher_addresses(several) == "math=a:1,b:2;code=[::1]:3"
    assert protocol.read_teacher_addresses(protocol.teacher_addresses(several)) == several
    assert protocol.teacher_addresses({"teacher": "a:1,b:2"}) == "a:1,b:2"
    assert protocol.read_teacher_addresses("a:1,b:2") == {"teacher": "a:1,b:2"}
    assert protocol.read_teacher_addresses("") == {}


def test_a_teacher_of_a_cluster_is_refused_where_there_is_none(tmp_path: Path) -> None:
    of = spec_of(Path("/s"), Path("/t"), teacher={"ref": {"name": "shared"}})
    with pytest.raises(ConfigurationError, match=r"Teacher shared \(ref\) is an object of a cluster"):
        TeacherServers(of, tmp_path)


def sample(teacher: str, coefficient: float, gap: float) -> Sample:
    return Sample(0, 0, [1], [2, 3], [-1.0, -1.0], [0, 0], False, [-1.0 - gap] * 2, None, None, teacher, coefficient)


def test_kl_is_told_by_teacher() -> None:
    found = teacher_kl([sample("math", 1.0, 2.0), sample("code", 1.0, 0.5), sample("math", 1.0, 4.0)])
    assert found == pytest.approx({"code": 0.5, "math": 3.0})


def test_the_coefficient_of_its_teacher_goes_with_each_token_of_a_sample() -> None:
    batch = collate([sample("math", 0.25, 1.0), sample("code", 1.0, 1.0)], [0, 1], torch.device("cpu"), scored=True)
    assert batch.teacher_coefficients.tolist() == [0.25, 0.25, 1.0, 1.0]


async def test_a_sample_carries_its_teachers_name_and_coefficient(tmp_path: Path) -> None:
    from test_rollout_pipeline import Engines, Teacher, pipeline

    rollouts = pipeline(tmp_path, Metrics(), Engines(set()), Teacher({}))
    played: Any = {"math": Teacher({}), "code": Teacher({})}
    rollouts._teachers = Teachers(played, {"math": 0.25})
    batch, scored = Batch(0, {}, rollouts.phases.objective(0)), []
    for teacher in ("math", "code"):
        made = sample("", 1.0, 0.0)
        await rollouts._score(batch, Prompt(0, [1], "", teacher=teacher), made)
        scored.append((made.teacher, made.coefficient))
    assert scored == [("math", 0.25), ("code", 1.0)]


async def test_a_trainer_publishes_what_it_has_for_each_shared_teacher_to_do_and_for_no_other(tmp_path: Path) -> None:
    teachers = [TWO[0], {"name": "poet", "ref": {"name": "poet"}}]
    data = {"prompts": prompts(tmp_path, teacherField="topic")}
    of = spec_of(Path("/s"), Path("/t"), teacher=None, teachers=teachers, data=data)
    found = Teachers.of_job(of, {protocol.Variable.TEACHER: "math=127.0.0.1:1;poet=poet-scoring:30000"}, Metrics())
    found.of("math").requests, found.of("poet").requests = 5, 41
    manifest = yaml.safe_load((REPO / "tests" / "manifests" / "good" / "minimal.yaml").read_text())
    manifest["spec"]["output"] = {"path": str(tmp_path)}
    folder = RunFolder(parse_job(manifest))
    server = ProgressServer(ProgressReporter(folder, Metrics(), 10), folder)
    server.teachers = found.shared_requests
    port = reserve_port()
    await server.start(port)
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/progress") as answer:
        report = protocol.ProgressReport.model_validate_json(await answer.text())
    await server.close()
    assert [(t.name, t.requests) for t in report.progress.teachers] == [("poet", 41)]


def test_what_says_where_a_teacher_is_served_does_not_make_another_run() -> None:
    def marked(**changes: Any) -> str:
        manifest = yaml.safe_load((REPO / "tests" / "manifests" / "good" / "several-teachers.yaml").read_text())
        manifest["spec"]["teachers"][0].update(changes)
        return fingerprint(parse_job(manifest))

    assert marked() == marked(replicas=5) == marked(maxDisagreement=1)
    assert marked() != marked(coefficient=2) and marked() != marked(model="/models/other")


def test_a_run_of_an_earlier_release_is_taken_up_by_one_that_knows_more_fields(tmp_path: Path) -> None:
    manifest = yaml.safe_load((REPO / "tests" / "manifests" / "good" / "minimal.yaml").read_text())
    manifest["spec"]["output"] = {"path": str(tmp_path)}
    folder = RunFolder(parse_job(manifest))
    folder.claim()
    mark = folder.root / "run.json"
    earlier = json.loads(mark.read_text())
    del earlier["job"]["spec"]["teachers"], earlier["job"]["spec"]["teacher"]["maxDisagreement"]
    mark.write_text(json.dumps(earlier | {"fingerprint": "of a shorter spec"}))
    folder.claim()
    other = manifest | {"spec": manifest["spec"] | {"seed": 7}}
    with pytest.raises(ForeignRun):
        RunFolder(parse_job(other)).claim()


@pytest.mark.timeout(400)
def test_a_run_of_the_example_with_two_teachers_tells_how_far_the_student_is_from_each(tmp_path: Path) -> None:
    """One of them is the student itself, as it was: to that one it has no distance, but for the steps that it took."""
    manifest = yaml.safe_load((REPO / "examples" / "several-teachers-cpu.yaml").read_text())
    body = manifest["spec"]
    body["rollout"] |= {"promptsPerStep": 8, "samplesPerPrompt": 2}
    body["schedule"] = {"steps": 2}
    for evaluation in body["evaluation"]:
        evaluation["maxPrompts"] = 8
    local = LocalRun(parse_job(with_volumes(manifest, {"/models": str(MODELS), "/output": str(tmp_path)})))
    code = local.run(lambda report: None, lambda text: None)
    assert code == protocol.ExitCode.DONE, (tmp_path / "several" / "logs" / "trainer.log").read_text()[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "several" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "step")["reverse_kl_by_teacher"]
    assert abs(first["before"]) < 1e-3 and first["adder"] > 0.05, first
    at_start = {line["name"]: line["reverse_kl"] for line in lines if line["kind"] == "evaluation" and not line["step"]}
    assert abs(at_start["drift"]) < 1e-3 and at_start["sums"] > 0.05, at_start
