"""What the preflight says that it has checked."""

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from conftest import spec_of

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
