"""What the preflight says that it has checked."""

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from conftest import spec_of

from distill_workers.data.sample import Sample
from distill_workers.metrics import Metrics
from distill_workers.run.preflight import preflight as module
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.teachers import Teachers

WORK = (
    "gap_nats",
    "teacher_answers",
    "top_k_fits",
    "same_vocabulary",
    "probe",
    "teacher_is_sane",
    "teacher_differs",
    "replicas_agree",
    "responses_end",
)


async def said(teacher: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The names of the checks that are logged as passed, with a teacher and everything else right."""
    for name in (*WORK, "engine_matches_trainer"):
        monkeypatch.setattr(module, name, AsyncMock(return_value=[]))
    spec = spec_of(Path("/s"), Path("/t"), teacher=teacher, objective={"support": "top-k", "topK": 4})
    pool = TeacherPool("127.0.0.1:1", spec, Metrics())
    rest: Any = Mock()
    with caplog.at_level("INFO"):
        await module.preflight(spec, range(8), rest, rest, Teachers({"": pool}), rest)
    return [record.args[0] for record in caplog.records if isinstance(record.args, tuple) and len(record.args) == 4]


async def test_nothing_is_said_of_the_answers_of_a_teacher_that_the_job_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no url, protocol or key that could be wrong, and nothing is sent to it for this."""
    names = await said({"model": "/t"}, monkeypatch, caplog)
    assert "TeacherAnswers" not in names and "SameVocabulary" in names


async def test_an_endpoint_is_said_to_answer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    names = await said({"endpoint": {"url": "http://127.0.0.1:1"}}, monkeypatch, caplog)
    assert names[:4] == ["ObjectiveDistils", "TeacherAnswers", "TopKFits", "SameVocabulary"]


async def test_the_reference_is_given_the_students_own_prompt_and_may_be_the_student(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, list[Any]] = {"teacher_is_sane": [], "replicas_agree": [], "teacher_differs": []}

    def watched(name: str) -> Any:
        async def check(*parts: Any, **_: Any) -> list[list[float]]:
            given[name].append(parts)
            return [[-1.0]]

        return check

    samples = [Sample(0, 0, [5], [6], [-1.0], [0], False, privileged_ids=[5, 7])]
    for name in ("same_vocabulary", "responses_end", "engine_matches_trainer"):
        monkeypatch.setattr(module, name, AsyncMock())
    monkeypatch.setattr(module, "probe", AsyncMock(return_value=samples))
    for name in given:
        monkeypatch.setattr(module, name, watched(name))
    teachers = [{"name": n, "model": f"/{n}"} for n in ("expert", "start")]
    objective = {"reference": "start", "referenceCoefficient": 0.1}
    data = {"prompts": {"path": "/p.jsonl"}, "defaultTeacher": "expert"}
    spec = spec_of(Path("/s"), Path("/t"), teacher=None, teachers=teachers, objective=objective, data=data)
    pools = {t.name: TeacherPool("127.0.0.1:1", spec, Metrics(), teacher=t) for t in spec.all_teachers}
    rest: Any = Mock()
    await module.preflight(spec, range(8), rest, rest, Teachers(pools), rest)
    for name in ("teacher_is_sane", "replicas_agree"):
        asked = {pool.teacher.name: few[0].teacher_prompt_ids for _, few, pool, *_ in given[name]}
        assert asked == {"expert": [5, 7], "start": [5]}
    assert [gaps for _, gaps in given["teacher_differs"]] == [{"expert": 0.0}]
